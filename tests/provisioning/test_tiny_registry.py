"""The registry on TinyDB: its file, and what can happen to it."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from base64 import b64encode
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.patience import PATIENCE_S

from birthmark.device.errors import RegistryError
from birthmark.provisioning import audit_check
from birthmark.provisioning.registry.interface import moment
from birthmark.provisioning.registry.model import Kind, Row, State
from birthmark.provisioning.registry.tiny import TinyRegistry

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.station import Clock

KILLING_GROUND = Path(__file__).parents[1] / "support" / "killing_ground.py"
WHOLE = os.environ.get("BIRTHMARK_PROOF") == "whole"

ADDER = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from birthmark.provisioning.registry.model import Kind
from birthmark.provisioning.registry.tiny import TinyRegistry
registry = TinyRegistry(Path(sys.argv[1]), clock=lambda: datetime.now(UTC), actor="test@host")
for each in range(int(sys.argv[3])):
    name = f"d-{sys.argv[2]}-{each}"
    with registry.transaction() as transaction:
        transaction.set_counter("n", transaction.counter("n") + 1)
        transaction.insert(kind=Kind.DEVICE, name=name, role="sensor", hwid=name.encode(), txn=bytes(16))
        transaction.record("reserve", name)
"""


@pytest.fixture
def registry(tmp_path: Path, clock: Clock) -> TinyRegistry:
    return TinyRegistry.create(tmp_path, clock=clock, actor="test@host")


def add(registry: TinyRegistry, name: str = "sensor-1") -> Row:
    with registry.transaction() as transaction:
        row = transaction.insert(
            kind=Kind.DEVICE, name=name, role="sensor", hwid=name.encode().ljust(4), txn=bytes(16)
        )
        transaction.record("reserve", name)
        return row


def edit(path: Path, change: dict[str, Any]) -> None:
    tables = json.loads(path.read_text())
    tables.update(change)
    path.write_text(json.dumps(tables))


def test_processes_at_once_lose_nothing(registry: TinyRegistry, tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", ADDER, str(tmp_path), str(number), "15"]) for number in range(3)
    ]
    assert [process.wait(timeout=90) for process in processes] == [0, 0, 0]
    with registry.view() as view:
        assert view.counter("n") == 45
        assert len({row.name for row in view.rows()}) == 45
        assert [row.number for row in view.rows()] == list(range(1, 46))
    verdict = audit_check.check(registry)
    assert verdict.entries == 45
    assert not verdict.problems


def test_a_registry_that_nobody_holds_any_more_lets_go_of_its_file(tmp_path: Path, clock: Clock) -> None:
    TinyRegistry.create(tmp_path, clock=clock, actor="test@host")
    for _ in range(3):
        registry = TinyRegistry(tmp_path, clock=clock, actor="test@host")
        with registry.view() as view:
            assert view.rows() == []
    del registry, view
    gc.collect()
    opened = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert tmp_path / "registry.json" not in opened


@pytest.mark.proof
def test_a_kill_at_any_step_of_a_write_loses_nothing(tmp_path: Path, proven: Callable[[str], None]) -> None:
    command = [sys.executable, str(KILLING_GROUND), "write", str(tmp_path), "1" if WHOLE else "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 25
    proven(f"killed at {int(done.stdout)} of its steps: the row is there or it is not, and the file is whole")


def test_a_full_disk_is_a_clear_error_and_changes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(KILLING_GROUND), "disk-full", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr


def test_one_transaction_is_one_write(registry: TinyRegistry, tmp_path: Path) -> None:
    path = tmp_path / "registry.json"
    seen = {path.stat().st_ino}
    with registry.transaction() as transaction:
        for number in range(5):
            transaction.insert(
                kind=Kind.DEVICE, name=f"d{number}", role="sensor", hwid=bytes([number] * 4), txn=bytes(16)
            )
            seen.add(path.stat().st_ino)
        transaction.record("reserve", "d0")
    assert len(seen) == 1
    assert path.stat().st_ino not in seen


def test_a_transaction_that_changes_nothing_writes_nothing(registry: TinyRegistry, tmp_path: Path) -> None:
    before = (tmp_path / "registry.json").stat()
    with registry.transaction() as transaction:
        transaction.rows()
    after = (tmp_path / "registry.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_what_another_process_wrote_is_seen(registry: TinyRegistry, tmp_path: Path, clock: Clock) -> None:
    other = TinyRegistry(tmp_path, clock=clock, actor="other@host")
    row = add(other)
    with registry.view() as view:
        assert view.rows() == [row]
    with other.transaction() as transaction:
        void = transaction.update(row.changed(state=State.VOID, void_reason="test"))
    with registry.view() as view:
        assert view.rows() == [void]


def test_files_are_for_the_owner_alone(registry: TinyRegistry, tmp_path: Path) -> None:
    add(registry)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"registry.json": 0o600, "registry.lock": 0o600, "audit.jsonl": 0o600}


def test_a_missing_registry_is_not_an_empty_one(tmp_path: Path, clock: Clock) -> None:
    registry = TinyRegistry(tmp_path, clock=clock, actor="test@host")
    with pytest.raises(RegistryError, match="not there") as caught, registry.view():
        pass
    assert "birthmark init" in caught.value.hint
    with pytest.raises(RegistryError, match="not there"), registry.transaction():
        pass
    assert not (tmp_path / "registry.json").exists()
    nowhere = TinyRegistry(tmp_path / "nowhere", clock=clock, actor="test@host")
    with pytest.raises(RegistryError, match="not there"), nowhere.transaction():
        pass


def test_a_registry_is_made_once(registry: TinyRegistry, tmp_path: Path, clock: Clock) -> None:
    add(registry)
    with pytest.raises(RegistryError, match="one already"):
        TinyRegistry.create(tmp_path, clock=clock, actor="test@host")
    with registry.view() as view:
        assert len(view.rows()) == 1


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "damaged"),
        (b'{"meta": {"1": {"program": "birthmark registry", "form', "damaged"),
        (b"\xff\xfe", "damaged"),
        (b"[]", "no registry"),
        (b"{}", "no registry"),
        (b'{"_default": {"1": {"name": "x"}}}', "no registry"),
        (b'{"meta": {"1": {"program": "birthmark registry"}}}', "no format number"),
        (b'{"meta": {"1": {"program": "birthmark registry", "format": 2}}}', "format 2"),
        (b'{"meta": {"1": {"program": "birthmark registry", "format": 1}}}', "no table"),
        (b'{"meta":{"1":{"program":"birthmark registry","format":1}},"outbox":{},"rows":{"1":[]}}', "row '1'"),
        (b'{"meta":{"1":{"program":"birthmark registry","format":1}},"outbox":{},"rows":{"1":{}}}', "row '1'"),
        (b'{"meta":{"1":{"program":"birthmark registry","format":1}},"outbox":{},"rows":{"x":{}}}', "row 'x'"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_refused_and_kept(
    registry: TinyRegistry, tmp_path: Path, content: bytes, cause: str
) -> None:
    path = tmp_path / "registry.json"
    replacement = tmp_path / "replacement"
    replacement.write_bytes(content)
    replacement.replace(path)
    with pytest.raises(RegistryError, match=cause) as caught, registry.view():
        pass
    assert caught.value.hint
    with pytest.raises(RegistryError, match=cause), registry.transaction():
        pass
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("state", "UNHEARD-OF"),
        ("kind", "toaster"),
        ("name", "a/b"),
        ("hwid", "not base64!"),
        ("created_at", "yesterday"),
        ("created_at", "2026-01-01T00:00:00"),
        ("cert_serial", "xyz"),
        ("txn", b64encode(bytes(3)).decode()),
        ("replaces", "first"),
        ("name_folded", "another"),
        ("replaces_reason", "\x1b[31m"),
    ],
)
def test_a_damaged_row_is_a_clear_error(
    registry: TinyRegistry, tmp_path: Path, clock: Clock, key: str, value: str
) -> None:
    add(registry)
    path = tmp_path / "registry.json"
    tables = json.loads(path.read_text())
    tables["rows"]["1"][key] = value
    path.write_text(json.dumps(tables))
    damaged = TinyRegistry(tmp_path, clock=clock, actor="test@host")
    with pytest.raises(RegistryError, match="row 1"), damaged.view() as view:
        view.rows()


@pytest.mark.parametrize("value", [None, "", "zz", -1, 1.5, [], "-1", "9" * 100])
@pytest.mark.parametrize("fact", ["counter rows", "audit_seq", "audit_hash"])
def test_damaged_facts_are_a_clear_error(
    registry: TinyRegistry, tmp_path: Path, clock: Clock, fact: str, value: object
) -> None:
    add(registry)
    path = tmp_path / "registry.json"
    tables = json.loads(path.read_text())
    tables["meta"]["1"][fact] = value
    path.write_text(json.dumps(tables))
    damaged = TinyRegistry(tmp_path, clock=clock, actor="test@host")
    if fact == "audit_hash" and isinstance(value, str):
        assert damaged.audit_head().hash == value  # that no entry has it is for `verify` to say
        return
    with pytest.raises(RegistryError, match="damaged"):
        add(damaged)


@pytest.mark.parametrize("line", [None, 7, [], "two\nlines", "caf\u00e9"])
def test_a_damaged_outbox_is_a_clear_error(
    registry: TinyRegistry, tmp_path: Path, clock: Clock, line: object
) -> None:
    add(registry)
    path = tmp_path / "registry.json"
    tables = json.loads(path.read_text())
    tables["outbox"]["1"]["line"] = line
    path.write_text(json.dumps(tables))
    with pytest.raises(RegistryError, match="outbox"):
        TinyRegistry(tmp_path, clock=clock, actor="test@host").audit_head()


def test_a_counter_that_is_no_time_is_a_clear_error(registry: TinyRegistry) -> None:
    with registry.transaction() as transaction:
        transaction.set_counter("last_issued_at", 1 << 200)
    with registry.view() as view, pytest.raises(RegistryError, match="no time"):
        moment(view, "last_issued_at")


def test_what_a_newer_birthmark_adds_survives_an_update(
    registry: TinyRegistry, tmp_path: Path, clock: Clock
) -> None:
    row = add(registry)
    path = tmp_path / "registry.json"
    tables = json.loads(path.read_text())
    tables["rows"]["1"]["colour"] = "blue"
    tables["labels"] = {"1": {"text": "hello"}}
    path.write_text(json.dumps(tables))
    newer = TinyRegistry(tmp_path, clock=clock, actor="test@host")
    with newer.transaction() as transaction:
        transaction.update(row.changed(state=State.VOID, void_reason="test"))
    tables = json.loads(path.read_text())
    assert tables["rows"]["1"]["colour"] == "blue"
    assert tables["rows"]["1"]["state"] == "VOID"
    assert tables["labels"] == {"1": {"text": "hello"}}


def test_an_unwritable_audit_log_stops_the_next_transaction_not_this_one(
    registry: TinyRegistry, tmp_path: Path
) -> None:
    log = tmp_path / "audit.jsonl"
    log.mkdir()  # whoever runs the tests may be root, whom permissions do not stop
    row = add(registry)
    with pytest.raises(RegistryError, match="audit log") as caught, registry.transaction():
        pass
    assert "nothing was changed" in caught.value.hint
    log.rmdir()
    verdict = audit_check.verify(log, registry.audit_head())
    assert (verdict.entries, verdict.problems, len(verdict.restored)) == (2, (), 1)
    with registry.view() as view:
        assert view.rows() == [row]


def test_temporary_files_of_a_crash_are_removed(registry: TinyRegistry, tmp_path: Path) -> None:
    leftover = tmp_path / ".registry.json.0badf00d.part"
    leftover.write_bytes(b"half")
    other = tmp_path / ".crl.pem.0badf00d.part"
    other.write_bytes(b"being written, under another lock")
    add(registry)
    assert not leftover.exists()
    assert other.exists()


def test_no_row_has_room_for_a_private_key() -> None:
    assert not [name for name in Row._fields if "private" in name or "scalar" in name or "secret" in name]
