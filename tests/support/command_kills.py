"""SIGKILL at every durable step of every command of the station: run as `command_kills.py FOLDER KILLS [NAME...]`.

A command runs in a forked child. Before its n-th step (a file opened for writing, a write, an fsync, a rename, a
removal, a folder, a mode, a statement that changes a database) the child is killed; a write that is the n-th step
is cut in the middle. After each kill the station is looked at as the next process would, then the same command is
run again: it finishes, or says plainly that it is done. KILLS is how many steps are tried, spread evenly; 0: every
one.

A process of its own, with one thread: only such a one may fork safely.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
from cryptography import x509
from sqlalchemy import Engine, event
from support.command_scenarios import (
    NEW_PASSPHRASE,
    SECRET,
    chosen,
    enter,
    run_here,
    stopping_after_a_turn,
)
from support.line_scenarios import powered
from support.scenario import all_listed
from support.softhsm import PIN
from support.station import CHEAP, PASSPHRASE, new_station

from birthmark.device.durable import TEMPORARY_SUFFIX
from birthmark.device.pem import CRL, read_blocks
from birthmark.provisioning import (
    audit_check,
    backup_commands,
    ca_commands,
    crl_commands,
    renewal_commands,
    rollover_commands,
    station_commands,
)
from birthmark.provisioning.backup import back_up
from birthmark.provisioning.crl_store import crl_number_counter, current_crl
from birthmark.provisioning.founding import found_station
from birthmark.provisioning.passphrase_change import change_passphrase
from birthmark.provisioning.rollover.starting import start_issuing, start_root
from birthmark.provisioning.station import Station

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from support.scenario import Scenario

STEPS = frozenset({"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "os.chmod"})
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# --- the child that dies -----------------------------------------------------------------------------------------


class Killer:
    """Counts the durable steps of this process, and kills it before the `at`-th one."""

    def __init__(self, at: int) -> None:
        self.count = 0
        self._at = at
        self._real_pwrite = os.pwrite
        self._real_fsync = os.fsync

    def arm(self) -> None:
        os.pwrite = self._pwrite
        os.fsync = self._fsync
        sys.addaudithook(self._saw)
        event.listen(Engine, "before_cursor_execute", self._executes)

    def _saw(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in STEPS or (event == "open" and _is_for_writing(*arguments)):
            self._step()

    def _step(self) -> None:
        self.count += 1
        if self.count == self._at:
            os.kill(os.getpid(), signal.SIGKILL)

    def _executes(self, _connection: object, _cursor: object, statement: str, *_: object) -> None:
        if not statement.startswith("SELECT"):  # what is only read leaves nothing
            self._step()

    def _fsync(self, fd: Any) -> None:
        self._step()
        self._real_fsync(fd)

    def _pwrite(self, descriptor: int, content: Any, offset: int) -> int:
        if self.count + 1 == self._at:
            self._real_pwrite(descriptor, bytes(content)[: len(content) // 2], offset)
        self._step()
        return self._real_pwrite(descriptor, content, offset)


def _is_for_writing(path: object, _mode: object, flags: object) -> bool:
    is_ours = isinstance(path, str | Path) and not str(path).startswith(("/dev/", "/proc/"))
    return is_ours and isinstance(flags, int) and bool(flags & WRITING)


def in_child(root: Path, words: Sequence[str], at: int) -> tuple[int | None, int, str]:
    """Run a command that is killed before its `at`-th step (0: never): exit code (None: killed), steps, output."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        killer = Killer(at)
        killer.arm()
        try:
            code, said = run_here(root, words)
        except BaseException as error:  # noqa: BLE001 - a traceback is what the parent has to see
            code, said = 99, repr(error)
        os.write(writing, f"{code} {killer.count} {said}".encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as answers:  # noqa: PTH123 - a descriptor
        answer = answers.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        return None, 0, ""
    ended, count, said = answer.split(" ", 2)
    return int(ended), int(count), said


# --- what must hold ----------------------------------------------------------------------------------------------


@dataclass
class History:
    """Every CRL that was ever seen of a station: a number stands for one CRL, and for no other."""

    seen: dict[tuple[str, int], str] = field(default_factory=dict)
    dated: dict[tuple[str, int], datetime] = field(default_factory=dict)

    def look(self, folder: Path, *, killed: bool = False) -> None:
        """Look at a station, as the next process does; just after a kill a CA may still be without its CRL."""
        opened = Station.open(folder, passphrase=PASSPHRASE)
        with opened.registry.transaction() as transaction:
            transaction.record("look", "station")
        problems = audit_check.check(opened.registry).problems
        assert not problems, problems
        with opened.registry.view() as view:
            rows, revoked = view.rows(), {row.cert_serial for row in view.revoked()}
            numbers = {ca.key_id: view.counter(crl_number_counter(ca.key_id)) for ca in opened.cas}
        for name in ("cert_serial", "public_key_der", "number"):
            values = [value for row in rows if (value := getattr(row, name)) is not None]
            assert len(values) == len(set(values)), f"twice: {name}"
        names = [row.name_folded for row in rows if row.is_live]
        assert len(names) == len(set(names)), names
        for ca in opened.cas.signing:
            assert opened.authority_of(ca.key_id).key_id == ca.key_id
        crls = current_crl(opened)
        assert crls is not None or killed, "a CA has no CRL"
        assert crls is None or crls.cert_serials <= revoked
        for crl in () if crls is None else crls.crls:
            assert crl.number <= numbers[crl.issuer]
        for path in (opened.crl_path, folder / "root-crl.pem"):
            for label, der in read_blocks(path.read_bytes()):
                assert label == CRL
                self._add(x509.load_der_x509_crl(der), der)

    def _add(self, crl: x509.CertificateRevocationList, der: bytes) -> None:
        number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        digest = hashlib.sha256(der).hexdigest()
        issuer = crl.issuer.rfc4514_string()
        self.dated[issuer, number] = crl.last_update_utc
        dates = [at for (whose, _), at in sorted(self.dated.items()) if whose == issuer]
        assert dates == sorted(set(dates)), "a later CRL is dated no later"
        assert self.seen.setdefault((issuer, number), digest) == digest, f"twice: CRL {number}"


def stations(root: Path) -> list[Path]:
    return [folder for folder in (root / "station", root / "restored") if folder.exists()]


def leftovers(root: Path) -> list[Path]:
    return [*root.rglob(f".*{TEMPORARY_SUFFIX}"), *root.rglob("*.unfinished")]


def kill_once(scenario: Scenario, prepared: Path, root: Path, at: int) -> bool:
    """Kill the command before its `at`-th step, look, run it again, look; return whether it came to that step."""
    shutil.copytree(prepared, root, symlinks=True)
    enter(root)
    with powered(root, scenario.boards):
        came = _kill_once(scenario, root, at)
    shutil.rmtree(root)
    return came


def _kill_once(scenario: Scenario, root: Path, at: int) -> bool:
    history = History()
    for folder in stations(root):
        history.look(folder)
    code, _, said = in_child(root, scenario.words, at)
    if code is not None:
        assert code == scenario.code, said
        return False
    for folder in stations(root):
        history.look(folder, killed=True)
    scenario.killed(root)
    code, _, said = in_child(root, scenario.words, 0)
    if code != scenario.code:
        assert any(word in said for word in scenario.done_already), (code, said)
        assert "hint: " in said or scenario.boards, said
        if scenario.boards:
            all_listed(root)
        # What it says is to be done: the next CRL carries what was revoked, and clears away what the kill left.
        if (root / "station").exists():
            assert in_child(root, ["crl", "--timeout", "0.05"], 0)[0] in (0, 1)
    for folder in stations(root):
        history.look(folder)
    scenario.finished(root)
    found = leftovers(root)
    assert not found, found
    return True


def survive(scenario: Scenario, root: Path, kills: int) -> tuple[int, int]:
    """Kill a command at its steps; return how many there are, and how often it was killed."""
    prepared = root / "prepared"
    prepared.mkdir(parents=True)
    if scenario.founds:
        new_station(prepared / "station", registry=scenario.registry).close()
    scenario.prepare(prepared)
    whole = root / "whole"
    shutil.copytree(prepared, whole, symlinks=True)
    enter(whole)
    with powered(whole, scenario.boards):
        code, steps, said = in_child(whole, scenario.words, 0)
    assert code == scenario.code, (code, said)
    scenario.finished(whole)
    assert steps > 0, "it writes nothing"
    count = min(kills, steps) if kills else steps
    chosen = [1 + int((n + 0.5) * steps / count) for n in range(count)]
    for at in chosen:
        try:
            came = kill_once(scenario, prepared, root / str(at), at)
        except BaseException:
            print(f"killed before step {at} of {steps}", file=sys.stderr)
            raise
        assert came, f"it has no step {at} of {steps} any more"
    return steps, len(chosen)


def main(root: Path, kills: int, names: Sequence[str]) -> None:
    os.environ["BIRTHMARK_PASSPHRASE"] = PASSPHRASE.decode()
    os.environ["BIRTHMARK_BACKUP_PASSPHRASE"] = SECRET.decode()
    os.environ["BIRTHMARK_TOKEN_PIN"] = PIN.decode()
    # What a passphrase costs has no bearing on what a kill leaves.
    monkeypatch = pytest.MonkeyPatch()
    os.environ["BIRTHMARK_NEW_PASSPHRASE"] = NEW_PASSPHRASE.decode()
    monkeypatch.setattr(ca_commands, "change_passphrase", functools.partial(change_passphrase, derivation=CHEAP))
    monkeypatch.setattr(backup_commands, "back_up", functools.partial(back_up, cost_log2=2))
    monkeypatch.setattr(station_commands, "found_station", functools.partial(found_station, derivation=CHEAP))
    monkeypatch.setattr(crl_commands, "stopping_on_signals", stopping_after_a_turn)
    monkeypatch.setattr(renewal_commands, "SENT_WITHIN_S", 0.05)
    for start in (start_issuing, start_root):
        monkeypatch.setattr(rollover_commands, start.__name__, functools.partial(start, derivation=CHEAP))
    scenarios = chosen(kills)
    for name in names or scenarios:
        steps, killed = survive(scenarios[name], root / name.replace(" ", "_"), kills)
        print(f"{name}: {killed} of {steps}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
