"""What a person is asked for at a terminal, where root and issuing CAs have a passphrase each, or share one."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from support.patience import PATIENCE_S
from support.station import CHEAP, PASSPHRASE

from birthmark.device.errors import AuthorityError
from birthmark.device.stopping import stopping_on_signals
from birthmark.provisioning.founding import found_station
from birthmark.provisioning.keyfile import read_key, replace_key
from birthmark.provisioning.rollover.starting import RootKey, start_issuing
from birthmark.provisioning.settings import Settings
from birthmark.provisioning.station import Station

if TYPE_CHECKING:
    from pathlib import Path

OF_THE_ROOT = b"of the root alone"
PROMPT = re.compile(rb"Passphrase of [^:]*: $")
SECRETS = ("BIRTHMARK_PASSPHRASE", "BIRTHMARK_ROOT_PASSPHRASE")


def stationed(folder: Path, root_passphrase: bytes | None = None) -> Station:
    station = found_station(
        folder, Settings("Acme"), passphrase=PASSPHRASE, root_passphrase=root_passphrase, derivation=CHEAP
    )
    station.close()
    return station


def asked(station: Station, line: str, *answers: bytes) -> tuple[list[str], int, str]:
    """Run a command at a terminal; return what it asked for, its exit code, and what else it said."""
    leader, follower = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
    process = subprocess.Popen(
        [sys.executable, "-m", "birthmark.provisioning", *line.split(), "--station", str(station.folder)],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment | {"NO_COLOR": "1"},
        start_new_session=True,
    )
    os.close(follower)
    left, prompts, shown, said = list(answers), [], b"", b""
    with contextlib.suppress(OSError):  # how a terminal says that nobody is there any more
        while chunk := os.read(leader, 1024):
            shown += chunk
            if found := PROMPT.search(shown):
                prompts.append(found[0].decode())
                said, shown = said + shown[: found.start()], b""
                os.write(leader, left.pop(0) + b"\n" if left else b"\x04")
    code = process.wait(PATIENCE_S)
    os.close(leader)
    said = (said + shown).replace(b"\r\n", b"\n")
    assert not any(answer in said for answer in answers)
    return prompts, code, said.decode()


def named(station: Station, kind: str) -> str:
    cas = station.cas
    ca = cas.for_clients if kind == "issuing" else cas.get(cas.for_clients.root)
    return f"Passphrase of the {kind} CA {ca.short}: "


def test_one_passphrase_is_asked_for_once(tmp_path: Path) -> None:
    station = stationed(tmp_path / "station")
    prompts, code, said = asked(station, "ca rollover start issuing", PASSPHRASE)
    assert (prompts, code) == (["Passphrase of the root CA: "], 0), said


@pytest.mark.parametrize("first", [OF_THE_ROOT, PASSPHRASE], ids=["the-root-s-first", "the-issuing-ca-s-first"])
def test_a_key_that_the_first_answer_does_not_open_is_asked_for_by_its_name(tmp_path: Path, first: bytes) -> None:
    station = stationed(tmp_path / "station", OF_THE_ROOT)
    other, kind = (PASSPHRASE, "issuing") if first is OF_THE_ROOT else (OF_THE_ROOT, "root")
    prompts, code, said = asked(station, "ca rollover start issuing", first, other)
    assert (prompts, code) == (["Passphrase of the root CA: ", named(station, kind)], 0), said
    new = next(ca for ca in station.cas.issuing if not ca.clients)
    prompts, code, said = asked(station, "crl", PASSPHRASE)
    assert (prompts, code) == (["Passphrase of the CA: "], 0), f"{new.short} has another passphrase: {said}"


def test_a_new_root_s_key_is_under_the_issuing_ca_s_passphrase(tmp_path: Path) -> None:
    station = stationed(tmp_path / "station", OF_THE_ROOT)
    prompts, code, said = asked(station, "ca rollover start root", PASSPHRASE)
    assert (prompts, code) == (["Passphrase of the CA: "], 0), said


@pytest.mark.parametrize("line", ["ca rollover start issuing", "crl --root", "crl"])
def test_two_wrong_answers_end_it_and_change_nothing(tmp_path: Path, line: str) -> None:
    station = stationed(tmp_path / "station", OF_THE_ROOT)
    before = {path: path.read_bytes() for path in station.folder.rglob("*.pem")}
    kind = "issuing" if line == "crl" else "root"
    prompts, code, said = asked(station, line, b"horse", b"house")
    assert code == 6
    assert prompts[1:] == [named(station, kind)]
    assert "the passphrase is wrong" in said
    assert {path: path.read_bytes() for path in station.folder.rglob("*.pem")} == before


def test_a_service_asks_for_no_key_that_comes_while_it_is_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    station = stationed(tmp_path / "station")
    service = Station.open(station.folder)
    answers = [PASSPHRASE.decode(), "another"]
    monkeypatch.delenv("BIRTHMARK_PASSPHRASE", raising=False)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("getpass.getpass", lambda _prompt: answers.pop(0))
    assert service.authority.key_id == station.cas.for_clients.key_id
    new = start_issuing(station, lambda: RootKey(PASSPHRASE), derivation=CHEAP)
    path = station.key_path(new)
    replace_key(path, read_key(path, PASSPHRASE, whose="it"), b"another", CHEAP)
    with stopping_on_signals(), pytest.raises(AuthorityError, match="passphrase is wrong"):
        service.authority_of(new.key_id)
    assert len(answers) == 1
    assert service.authority_of(new.key_id).key_id == new.key_id


def test_roots_with_a_passphrase_each_are_moved_in_one_go(tmp_path: Path) -> None:
    station = stationed(tmp_path / "station", OF_THE_ROOT)
    asked(station, "ca rollover start root", PASSPHRASE)
    medium = tmp_path / "medium"
    medium.mkdir()
    prompts, code, said = asked(station, f"ca detach-root --to {medium} --same-disk", PASSPHRASE, OF_THE_ROOT)
    assert (prompts, code) == (["Passphrase of the root CA: ", named(station, "root")], 0), said
    assert sorted(path.name for path in medium.iterdir()) == sorted(
        station.key_path(root).name for root in station.cas.roots
    )
