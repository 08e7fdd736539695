"""Backups: one file, whole and consistent, or none; and a clear word about every file that is not one."""

from __future__ import annotations

import io
import resource
import stat
import subprocess
import sys
import tarfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pyrage
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from support.station import PASSPHRASE, Command, enrolled_row

from birthmark.device.durable import exclusive_lock
from birthmark.device.errors import BirthmarkError, ConfigurationError
from birthmark.provisioning import audit
from birthmark.provisioning.age import Encrypting
from birthmark.provisioning.backup import LAST_BACKUP_AT, BackupError, Manifest, back_up, opened, read_backup
from birthmark.provisioning.issuing import issue_operator
from birthmark.provisioning.restore import restore

if TYPE_CHECKING:
    from birthmark.provisioning.station import Station

SECRET = b"the backup's own passphrase"
CHEAP = 2


def backed_up(station: Station, path: Path, *extra: Path) -> Path:
    back_up(station, path, SECRET, extra=extra, cost_log2=CHEAP)
    return path


def written(path: Path, *members: tuple[str, bytes]) -> Path:
    """A file as a backup is written, with members of a test's own."""
    with path.open("wb") as file:
        encrypting = Encrypting(file, SECRET, cost_log2=CHEAP)
        with tarfile.open(fileobj=encrypting, mode="w|") as archive:
            for name, content in members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        encrypting.finish()
    return path


def manifest(*files: str) -> bytes:
    return Manifest(datetime.now(UTC), "test@host", "Acme", files).to_bytes()


def test_a_backup_that_finds_no_room_is_named_and_not_there(living: Station, tmp_path: Path) -> None:
    folder = tmp_path / "medium"
    folder.mkdir()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large") as full:
            backed_up(living, folder / "backup.age")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert full.value.filename == str(folder / "backup.age")
    assert list(folder.iterdir()) == []


def test_everything_that_is_the_stations_is_in_it_and_age_and_tar_open_it(living: Station, tmp_path: Path) -> None:
    enrolled_row(living, "sensor-1")
    operator = tmp_path / "alice.pem"
    operator.write_bytes(b"an operator's file")
    path = backed_up(living, tmp_path / "backup.age", operator)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    plain = pyrage.passphrase.decrypt(path.read_bytes(), SECRET.decode())
    with tarfile.open(fileobj=io.BytesIO(plain)) as archive:
        held = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    in_station = {
        file.relative_to(living.folder).as_posix(): file.read_bytes()
        for file in living.folder.rglob("*")
        if file.is_file() and file.suffix != ".lock"
    }
    assert held.pop("backup.json")
    assert held.pop("extra/alice.pem") == b"an operator's file"
    # The backup's own entry follows it.
    del in_station["registry.json"], held["registry.json"]
    assert in_station.pop("audit.jsonl").startswith(held.pop("audit.jsonl"))
    assert held == in_station


def test_what_lies_in_the_stations_folder_comes_along_but_for_somebodys_key(
    living: Station, tmp_path: Path
) -> None:
    (living.folder / "kept-by-a-later-version.jsonl").write_bytes(b"{}")
    (living.folder / ".registry.json.12345678.part").write_bytes(b"half")
    issue_operator(living, "alice", living.folder)
    older_form = PrivateFormat.TraditionalOpenSSL
    key_pem = generate_private_key(SECP256R1()).private_bytes(Encoding.PEM, older_form, NoEncryption())
    (living.folder / "alice-of-old.pem").write_bytes(key_pem)
    held = read_backup(backed_up(living, tmp_path / "backup.age"), SECRET).manifest.files
    assert "kept-by-a-later-version.jsonl" in held
    assert "ca.pem" in held
    assert not any("alice" in name or "lock" in name or "part" in name for name in held)
    assert len(held) == len(set(held))


def test_it_is_on_record_and_says_what_is_in_it(living: Station, tmp_path: Path) -> None:
    enrolled_row(living, "sensor-1")
    path = backed_up(living, tmp_path / "backup.age")
    found = read_backup(path, SECRET)
    assert (found.rows, found.manifest.organization) == (1, "Acme")
    with living.registry.view() as view:
        assert view.counter(LAST_BACKUP_AT) == int(found.manifest.created_at.timestamp())
    *before, last = audit.read(living.registry.audit_path)
    assert (last["action"], last["details"]["file"]) == ("backup", str(path))
    assert found.audit_entries == len(before)


def test_nothing_is_replaced_and_nothing_is_written_into_the_station(living: Station, tmp_path: Path) -> None:
    path = backed_up(living, tmp_path / "backup.age")
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match="it is there already"):
        backed_up(living, path)
    assert path.read_bytes() == before
    with pytest.raises(ConfigurationError, match="in the station's own folder"):
        backed_up(living, living.folder / "backup.age")
    assert not list(living.folder.glob("*.age"))


def test_a_failure_leaves_no_file(living: Station, tmp_path: Path) -> None:
    for passphrase, extra in ((b"", ()), (SECRET, (tmp_path / "missing.pem",))):
        with pytest.raises((BackupError, OSError)):
            back_up(living, tmp_path / "backup.age", passphrase, extra=extra, cost_log2=CHEAP)
        assert not list(tmp_path.glob("*backup.age*"))
    twice = [tmp_path / name / "alice.pem" for name in ("one", "two")]
    for path in twice:
        path.parent.mkdir()
        path.touch()
    with pytest.raises(ConfigurationError, match="both called"):
        backed_up(living, tmp_path / "backup.age", *twice)


def test_a_backup_that_is_none_is_said_to_be_so(living: Station, tmp_path: Path) -> None:
    good = backed_up(living, tmp_path / "good.age")
    cases = {
        "the passphrase is wrong": (good, b"another"),
        "its end is missing": (_copy(tmp_path, good.read_bytes()[:-1]), SECRET),
        "it is no encrypted backup": (_copy(tmp_path, b"PK\3\4"), SECRET),
        "but it is no backup of a station": (written(tmp_path / "tar.age", ("x", b"y")), SECRET),
        "it has format 2, this birthmark knows 1": (
            written(tmp_path / "new.age", ("backup.json", manifest().replace(b'"format": 1', b'"format": 2'))),
            SECRET,
        ),
        "is not where its list says": (
            written(tmp_path / "less.age", ("backup.json", manifest("registry.json"))),
            SECRET,
        ),
        "more than its list says": (
            written(tmp_path / "more.age", ("backup.json", manifest()), ("registry.json", b"{}")),
            SECRET,
        ),
        r"a file with the name \.\./x": (
            written(tmp_path / "out.age", ("backup.json", manifest("../x")), ("../x", b"y")),
            SECRET,
        ),
        "the registry in it is damaged": (
            written(tmp_path / "bad.age", ("backup.json", manifest("registry.json")), ("registry.json", b"[]")),
            SECRET,
        ),
    }
    for cause, (path, passphrase) in cases.items():
        with pytest.raises(BackupError, match=cause) as caught:
            read_backup(path, passphrase)
        assert caught.value.message.startswith(f"could not read the backup {path}: ")
        with pytest.raises(BirthmarkError):
            restore(path, tmp_path / "to", backup_passphrase=passphrase, passphrase=PASSPHRASE)
        assert not (tmp_path / "to").exists()
        assert not list(tmp_path.glob(".to*"))


def _copy(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / f"{len(content)}.age"
    path.write_bytes(content)
    return path


def test_nobody_else_changes_anything_while_it_is_taken(
    living: Station, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    files = living.files

    def attempt() -> list[Path]:
        for name in ("crl.lock", "registry.lock"):
            with pytest.raises(BlockingIOError), exclusive_lock(living.folder / name, wait=False):
                pass
            tried.append(name)
        return files()

    monkeypatch.setattr(living, "files", attempt)
    backed_up(living, tmp_path / "backup.age")
    assert tried == ["crl.lock", "registry.lock"]


WRITER = """
import sys
from pathlib import Path
from support.station import enrolled_row
from cryptography import x509
from birthmark.provisioning.revocation import revoke
from birthmark.provisioning.station import Station
station = Station.open(Path(sys.argv[1]), passphrase=sys.argv[2].encode())
print("ready", flush=True)
for number in range(100_000):
    enrolled_row(station, f"sensor-{number}")
    if number % 3 == 0:
        revoke(station, f"sensor-{number}", x509.ReasonFlags.superseded)
"""


def test_it_is_consistent_while_other_commands_run(living: Station, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(living.folder), PASSPHRASE.decode()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        backups = [backed_up(living, tmp_path / f"{number}.age") for number in range(12)]
        writer.kill()
    for number, path in enumerate(backups):
        restored = restore(path, tmp_path / f"to-{number}", backup_passphrase=SECRET, passphrase=PASSPHRASE)
        assert restored.audit_problems == ()
        with restored.station.registry.view() as view:
            rows, revoked = view.rows(), {row.cert_serial for row in view.revoked()}
        assert restored.crls.cert_serials == revoked
        assert [row.number for row in rows] == list(range(1, len(rows) + 1))
    assert read_backup(backups[-1], SECRET).rows > read_backup(backups[0], SECRET).rows, "nobody wrote meanwhile"


def test_the_command_writes_checks_and_never_shows_a_passphrase(
    birthmark: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIRTHMARK_BACKUP_PASSPHRASE", SECRET.decode())
    monkeypatch.delenv("BIRTHMARK_PASSPHRASE")  # a locked station can be backed up
    path = tmp_path / "backup.age"
    answer = birthmark("backup", path, "--json")
    assert (answer.exit_code, answer.stderr) == (0, "")
    assert answer.records[0]["size_bytes"] == path.stat().st_size
    checked = birthmark("backup", "--verify", path, "--json")
    assert checked.exit_code == 0
    assert checked.records[0]["rows"] == 0
    assert any(name.startswith("keys/issuing-") for name in checked.records[0]["files"])
    again = birthmark("backup", path)
    assert (again.exit_code, again.stdout) == (1, "")
    assert "it is there already" in again.stderr
    monkeypatch.setenv("BIRTHMARK_BACKUP_PASSPHRASE", "wrong")
    wrong = birthmark("backup", "--verify", path)
    assert (wrong.exit_code, wrong.stdout) == (6, "")
    assert "the passphrase is wrong" in wrong.stderr
    monkeypatch.delenv("BIRTHMARK_BACKUP_PASSPHRASE")
    unasked = birthmark("backup", tmp_path / "other.age")
    assert "set BIRTHMARK_BACKUP_PASSPHRASE, or give --backup-passphrase-fd N" in unasked.stderr
    assert unasked.exit_code == 6
    assert not (tmp_path / "other.age").exists()


def test_a_log_that_does_not_verify_is_said_and_backed_up(
    birthmark: Command, living: Station, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIRTHMARK_BACKUP_PASSPHRASE", SECRET.decode())
    log = living.registry.audit_path
    log.write_bytes(log.read_bytes().replace(b"Acme", b"Acne", 1))
    answer = birthmark("backup", tmp_path / "backup.age")
    assert answer.exit_code == 0
    assert "warning: the audit log does not verify" in answer.stderr
    restored = restore(tmp_path / "backup.age", tmp_path / "to", backup_passphrase=SECRET, passphrase=PASSPHRASE)
    assert [problem.line for problem in restored.audit_problems] == [1]


def test_a_manifest_is_read_as_it_was_written() -> None:
    one = Manifest(datetime(2026, 5, 4, 12, tzinfo=UTC), "me@here", "Acme", ("a", "keys/b"))
    assert Manifest.from_bytes(one.to_bytes()) == one
    assert Manifest.from_bytes(replace(one, files=()).to_bytes()) != one


def test_members_are_read_in_turn(living: Station, tmp_path: Path) -> None:
    path = backed_up(living, tmp_path / "backup.age")
    with opened(path, SECRET) as (held, members):
        assert [member.name for member in members] == list(held.files)
