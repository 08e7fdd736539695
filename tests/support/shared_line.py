"""Several stations on one database, each with a fixture of simulated boards: flashed at once, killed, restarted.

Everything is a process of its own: `birthmark run`, `flash` and `crl` at each station, `birthmark-sim board` with
the boards, PostgreSQL. A `Shift` is what happens at all stations at the same time; between shifts, boards are
handed on to the next station, as they would be when one breaks.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from support.station import PASSPHRASE

from birthmark.device.agent import keys
from birthmark.device.agent.slots import Slots
from birthmark.device.errors import RegistryError
from birthmark.device.pem import CRL, read_blocks
from birthmark.firmware_sim.boards import board_folder
from birthmark.provisioning import audit
from birthmark.provisioning.registry.model import Kind, State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from random import Random

    from support.postgres import Server

    from birthmark.provisioning.registry.model import Row

LIMIT_S = 120.0
WHERE = ("--broker", "gateway-1.example.com:8883")
MADE = ["reserve", "key", "issue", "prepare", "commit", "attest"]


class Boards:
    """`birthmark-sim board` as a process: blank boards, each on a pty of its own, until the block ends."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folders = [board_folder(folder, number) for number in range(1, count + 1)]
        words = ["board", "--state", str(folder), "--count", str(count), "--json"]
        self._command = [sys.executable, "-m", "birthmark.firmware_sim", *words]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        ready: dict[int, str] = {}
        while len(ready) < len(self.folders):
            record = json.loads(self._process.stdout.readline())
            if record["event"] == "ready":
                ready[record["board"]] = record["link"]
        self.ports = [ready[number] for number in sorted(ready)]
        # What else the boards have to say nobody needs, but they must be able to say it.
        self._reader = threading.Thread(target=self._process.stdout.read)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(LIMIT_S)
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()


class Shift:
    """What happens at all stations at the same time. Safe to use from several threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._steps = 0
        self._waiting = 0
        self._at_work = 0
        self._failures: list[BaseException] = []
        self._threads: list[threading.Thread] = []
        self.server_up = threading.Event()
        self.server_up.set()
        self.done: Counter[str] = Counter()
        """What became of the commands, and what was done to the stations."""

    def heard(self, record: dict[str, Any]) -> None:
        """Take note of what a command said."""
        with self._changed:
            self._steps += record.get("event") == "step"
            if record.get("event") == "registry":
                is_back = record["text"] == "it is back"
                self._waiting += not is_back
                self.done["waited"] += is_back
            self._changed.notify_all()

    def noted(self, what: str) -> None:
        """Count something that was done."""
        with self._changed:
            self.done[what] += 1

    def begin(self, work: Callable[..., object], *arguments: object) -> None:
        """Let somebody work beside the others."""

        def working() -> None:
            try:
                work(*arguments)
            except BaseException as error:  # noqa: BLE001 - raised again by `end`
                self._failures.append(error)
            with self._changed:
                self._at_work -= 1
                self._changed.notify_all()

        with self._changed:
            self._at_work += 1
        self._threads.append(threading.Thread(target=working))
        self._threads[-1].start()

    def restart(self, server: Server, after_steps: int) -> None:
        """Stop the server in the middle of the work; start it when a station waits for it, or nobody is left."""
        with self._changed:
            alone = 1  # whoever does this
            self._changed.wait_for(lambda: self._steps >= after_steps or self._at_work == alone, LIMIT_S)
            waited = self._waiting
        self.server_up.clear()
        server.stop("immediate")
        with self._changed:
            self._changed.wait_for(lambda: self._waiting > waited or self._at_work == alone, LIMIT_S / 4)
        server.start()
        self.server_up.set()
        self.noted("restarts")

    def end(self) -> None:
        """Wait for everybody."""
        for thread in self._threads:
            thread.join()
        if self._failures:
            raise self._failures[0]


@dataclass
class LineStation:
    """One station: its folder, and the commands that are run there."""

    folder: Path
    chance: Random
    shift: Shift = field(default_factory=Shift)
    crls: set[tuple[int, str]] = field(default_factory=set)
    """The CRLs that were in its file after it had signed some: number and SHA-256."""

    def run(self, ports: Sequence[str], *, is_killed: bool) -> None:
        """`birthmark run` on these ports, until it ends by itself, or it is killed at a random moment.

        Once it has begun it waits for the registry; only where it was away at the start it is the same again.
        """
        where = [word for port in ports for word in ("--port", port)]
        after = self.chance.randint(1, 8 * len(ports)) if is_killed else None
        code = self._again("run", *where, "--template", "unit-{n}", *WHERE, killed_after=after)
        # Boards that were made before are duplicates.
        assert code in (0, 3) or is_killed, f"{self.folder.name} ended with {code}"

    def flash(self, ports: Sequence[str], *, is_killed: bool) -> None:
        """`birthmark flash` on each of these ports, all at once; where the registry goes away, the same again."""
        together = Shift()
        for port in ports:
            name = "solo-" + "-".join(Path(port).parts[-3:-1])
            after = self.chance.randint(1, 8) if is_killed else None
            words = ("flash", "--port", port, "--id", name, *WHERE)
            together.begin(lambda words=words, after=after: self._again(*words, killed_after=after))
        together.end()

    def sign(self) -> None:
        """`birthmark crl`; what it signed is kept."""
        assert self._again("crl", "--timeout", "1") == 0
        for label, der in read_blocks((self.folder / "crl.pem").read_bytes()):
            assert label == CRL
            crl = x509.load_der_x509_crl(der)
            number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
            self.crls.add((number, hashlib.sha256(der).hexdigest()))

    def says(self, *words: str) -> tuple[int, list[dict[str, Any]]]:
        """Run a command to its end; its exit code, and the records that it printed."""
        process = self._start(*words)
        said, failed = process.communicate(timeout=LIMIT_S)
        assert "Traceback" not in failed, failed
        return process.returncode, [json.loads(line) for line in said.splitlines()]

    def _start(self, *words: str) -> subprocess.Popen[str]:
        environment = os.environ | {"BIRTHMARK_PASSPHRASE": PASSPHRASE.decode()}
        command = [sys.executable, "-m", "birthmark.provisioning", *words, "--json", "--station", str(self.folder)]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def _again(self, *words: str, killed_after: int | None = None) -> int:
        """Run a command, and the same again as long as the registry is away."""
        while (code := self._command(*words, killed_after=killed_after)) == RegistryError.exit_code:
            assert self.shift.server_up.wait(LIMIT_S)
        return code

    def _command(self, *words: str, killed_after: int | None = None) -> int:
        """Run a command; kill it a few milliseconds after so many steps, or let it come to its end."""
        process = self._start(*words)
        assert process.stdout is not None
        assert process.stderr is not None
        steps = 0
        with process.stdout, process.stderr:
            for line in process.stdout:
                if not line.endswith("\n"):
                    break  # a kill may cut the last line
                record = json.loads(line)
                assert words[0] != "run" or record.get("code") != "REGISTRY", record
                self.shift.heard(record)
                steps += record.get("event") == "step"
                if steps == killed_after and process.poll() is None:
                    time.sleep(self.chance.uniform(0, 0.02))  # anywhere in what follows the step
                    process.kill()
            failed = process.stderr.read()
        code = process.wait(LIMIT_S)
        assert "Traceback" not in failed, failed
        self.shift.noted("killed" if code < 0 else f"{words[0]} {code}")
        return code


def nothing_is_half(rows: Sequence[Row], folders: Iterable[Path]) -> None:
    """Nothing was given out twice, and every board has the identity that its row says, or none."""
    for what in ("number", "txn", "cert_serial", "public_key_der"):
        given = [getattr(row, what) for row in rows if getattr(row, what) is not None]
        assert len(given) == len(set(given)), f"twice: {what}"
    live = [row for row in rows if row.is_live]
    assert len({row.name_folded for row in live}) == len(live), "an id twice"
    hwids = [row.hwid for row in live if row.hwid is not None]
    assert len(hwids) == len(set(hwids)), "a board twice"
    for folder in folders:
        hwid = bytes.fromhex((folder / "hwid").read_text())
        mine = [row for row in rows if row.hwid == hwid]
        active = Slots(folder).active()
        if active is None:
            assert not any(row.state.reached(State.COMMITTED) for row in mine if row.state is not State.VOID)
            continue
        (row,) = [row for row in mine if row.txn == active.txn]
        leaf = x509.load_der_x509_certificate(active.bundle.leaf_der)
        own = keys.key_from_der(active.key_der).public_key()
        assert isinstance(own, ec.EllipticCurvePublicKey)
        assert leaf.public_key() == own, "it could not attest"
        assert row.state.reached(State.PREPARED), f"{row.name} is {row.state}"
        assert (row.cert_serial, row.bundle_sha256) == (leaf.serial_number, active.bundle_sha256)
        assert row.name == active.bundle.config.device_id.text


def all_is_accounted_for(rows: Sequence[Row], logs: Sequence[Path], counters: dict[str, int]) -> None:
    """Each step of each board is in one audit log, once; so is each CRL number of each CA, without a gap."""
    entries = [entry for path in logs for entry in audit.read(path)]
    steps: dict[int, list[str]] = {row.number: [] for row in rows if row.kind is Kind.DEVICE}
    for entry in entries:
        if entry["action"] in MADE:
            steps[entry["details"]["row"]].append(entry["action"])
    for row in rows:
        if row.kind is Kind.DEVICE and row.state is State.ATTESTED:
            assert sorted(steps[row.number]) == sorted(MADE), f"{row.name} by another way: {steps[row.number]}"
        elif row.kind is Kind.DEVICE:
            assert row.state is State.VOID, f"{row.name} is {row.state}"
            assert row.is_revoked or row.cert_serial is None, f"{row.name} is void, and its certificate is not"
    numbers = [
        (entry["details"]["issuer"], entry["details"]["number"])
        for entry in entries
        if entry["action"] == "crl" and entry["subject"] == "issuing-ca"
    ]
    assert len(numbers) == len(set(numbers)), "a CRL number twice"
    for issuer, last in counters.items():
        mine = sorted(number for whose, number in numbers if whose == issuer)
        assert mine == list(range(1, last + 1)), "a CRL number that nobody knows of"
