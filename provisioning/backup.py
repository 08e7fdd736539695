"""Backups: a whole station in one encrypted file, and that file read again.

The file is a tar archive in an age file (`birthmark.provisioning.age`), so `age -d FILE | tar x` opens it in an
emergency. Its first member, `backup.json`, says what it is and lists the others: the station's own files by their
path in its folder, the registry as `registry.json` whichever back end it lives in, the audit log, and below
`extra/` whatever the operator named.

Rules:

- One consistent state: CRL lock and registry lock are held while it is taken. The audit log is only appended to,
  so its length belongs to that state, and it is copied after the locks are free again. Other commands wait for
  the reading of a few files, not for the encryption.
- The file appears under its name once it is whole and on disk, mode 0600. One that is there is not replaced.
- Reading is all or nothing: nothing that was read counts before the end of the file is reached.
- Keys go in as they are in the station, encrypted under their own passphrases; the backup's passphrase is another.
"""

from __future__ import annotations

import io
import json
import stat
import tarfile
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from birthmark.device.durable import durable_file, remove_leftovers
from birthmark.device.errors import ConfigurationError, RegistryError
from birthmark.device.escape import escaped
from birthmark.provisioning.actor import actor
from birthmark.provisioning.age import DEFAULT_COST_LOG2, AgeError, Decrypting, Encrypting
from birthmark.provisioning.registry.content import write_json
from birthmark.provisioning.registry.place import AUDIT_FILE, REGISTRY_FILE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from birthmark.provisioning.station import Station

PROGRAM: Final = "birthmark backup"
FORMAT: Final = 1
MANIFEST: Final = "backup.json"
EXTRA: Final = "extra"
LAST_BACKUP_AT: Final = "last_backup_at"
"""The registry's counter of seconds since 1970 at which a backup was begun; 0: never."""
_MAX_MANIFEST_BYTES: Final = 1 << 20
_COPY_BYTES: Final = 1 << 16
_NO_BACKUP: Final = "it is encrypted under this passphrase, but it is no backup of a station"


class BackupError(RegistryError):
    """A backup cannot be written or read."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a backup says of itself."""

    created_at: datetime
    made_by: str
    organization: str
    files: tuple[str, ...]
    """Every other member, in its order."""

    def to_bytes(self) -> bytes:
        """Return the member's content."""
        record = {
            "program": PROGRAM,
            "format": FORMAT,
            "created_at": self.created_at.isoformat(),
            "made_by": self.made_by,
            "organization": self.organization,
            "files": list(self.files),
        }
        return json.dumps(record, indent=1).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Manifest:
        """Read the member.

        Raises:
            AgeError: it is none, or of a newer format.
        """
        try:
            record: Any = json.loads(content)
            program, version = record["program"], int(record["format"])
            manifest = cls(
                datetime.fromisoformat(record["created_at"]).astimezone(UTC),
                str(record["made_by"]),
                str(record["organization"]),
                tuple(map(str, record["files"])),
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            raise AgeError(_NO_BACKUP) from None
        if program != PROGRAM:
            raise AgeError(_NO_BACKUP)
        if version > FORMAT:
            raise AgeError(
                f"it has format {version}, this birthmark knows {FORMAT}",
                "a newer birthmark wrote it: update this one",
            )
        for name in manifest.files:
            if not _is_plain(name):
                raise AgeError(f"it has a file with the name {escaped(name, 80)}")
        return manifest


@dataclass(frozen=True, slots=True)
class Backup:
    """What a backup holds."""

    manifest: Manifest
    path: Path
    size_bytes: int
    rows: int
    audit_entries: int

    def record(self) -> dict[str, Any]:
        """Return this as a JSON object."""
        return {
            "backup": str(self.path),
            "created_at": self.manifest.created_at.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "made_by": self.manifest.made_by,
            "organization": self.manifest.organization,
            "size_bytes": self.size_bytes,
            "rows": self.rows,
            "audit_entries": self.audit_entries,
            "files": list(self.manifest.files),
        }


@dataclass(frozen=True, slots=True)
class Member:
    """One file in a backup, to be read before the next one."""

    name: str
    mode: int
    content: IO[bytes]


@dataclass(frozen=True, slots=True)
class _Part:
    """One member to be written: what it holds, or the file, by its path or open, of which so much is copied."""

    name: str
    content: bytes = b""
    mode: int = 0o600
    source: Path | IO[bytes] | None = None
    size_bytes: int = 0


def back_up(
    station: Station,
    path: Path,
    passphrase: bytes,
    *,
    extra: Sequence[Path] = (),
    cost_log2: int = DEFAULT_COST_LOG2,
) -> Manifest:
    """Write a backup of the whole station to `path`.

    Args:
        station: which; it need not be unlocked.
        path: the file to be made.
        passphrase: what the backup is encrypted under.
        extra: files that are to come along, such as those of operators: an unencrypted key, for instance.
        cost_log2: what trying a passphrase costs (`age.Encrypting`).

    Raises:
        ConfigurationError: `path` is there already, or lies in the station; an extra file's name comes twice.
        BackupError: the passphrase is empty.
        RegistryError: registry or audit log cannot be read.
        OSError: something cannot be read or written. After any of these there is no file at `path`.
    """
    path = path.absolute()
    check_target(path, station.folder)
    started_at = station.clock()
    # What the registry holds may be much: it is on its way in a file without a name, and in memory bit by bit.
    with naming("write", path), tempfile.TemporaryFile(dir=path.parent) as content:
        manifest, parts = _taken(station, started_at, _extra_parts(extra), content)
        remove_leftovers(path.parent, path.name)
        with durable_file(path) as file:
            encrypting = Encrypting(file, passphrase, cost_log2=cost_log2)
            with tarfile.open(fileobj=encrypting, mode="w|", format=tarfile.PAX_FORMAT) as archive:
                for part in parts:
                    _add(archive, part, manifest.created_at)
            encrypting.finish()
            check_target(path, station.folder)
    with station.registry.transaction() as transaction:
        transaction.set_counter(
            LAST_BACKUP_AT, max(transaction.counter(LAST_BACKUP_AT), int(started_at.timestamp()))
        )
        transaction.record("backup", "station", file=str(path), files=len(manifest.files))
    return manifest


def read_backup(path: Path, passphrase: bytes) -> Backup:
    """Read a backup whole, and say what is in it.

    Raises:
        BackupError: it is damaged, cut, no backup, of a newer format, or the passphrase is wrong.
        OSError: it cannot be read.
    """
    counts = {"rows": 0, "entries": 0}
    with opened(path, passphrase) as (manifest, members):
        for member in members:
            if member.name == REGISTRY_FILE:
                counts["rows"] = _row_count(member.content.read())
            elif member.name == AUDIT_FILE:
                counts["entries"] = sum(1 for _ in member.content)
            else:
                _drain(member.content)
    return Backup(manifest, path, path.stat().st_size, counts["rows"], counts["entries"])


@contextmanager
def opened(path: Path, passphrase: bytes) -> Iterator[tuple[Manifest, Iterator[Member]]]:
    """Open a backup: its manifest, and its members one after the other, each to be read before the next.

    The caller takes all members; only when the block has ended is the backup known to be whole.

    Raises:
        BackupError: as for `read_backup`.
    """
    with path.open("rb") as file, naming("read", path):
        decrypting = io.BufferedReader(Decrypting(file, passphrase), _COPY_BYTES)
        with tarfile.open(fileobj=decrypting, mode="r|") as archive:
            first = archive.next()
            content = None if first is None or first.name != MANIFEST else archive.extractfile(first)
            if content is None:
                raise AgeError(_NO_BACKUP)
            manifest = Manifest.from_bytes(content.read(_MAX_MANIFEST_BYTES))
            yield manifest, _members(archive, manifest)
        _drain(decrypting)  # the archive ends before the file does: what follows must be authentic, too


def _members(archive: tarfile.TarFile, manifest: Manifest) -> Iterator[Member]:
    for expected in manifest.files:
        member = archive.next()
        content = None if member is None or not member.isreg() else archive.extractfile(member)
        if member is None or content is None or member.name != expected:
            raise AgeError(f"its file {escaped(expected, 80)} is not where its list says")
        yield Member(expected, member.mode, content)
    if archive.next() is not None:
        raise AgeError("it holds more than its list says")


def _taken(
    station: Station, started_at: datetime, extra: Sequence[_Part], content: IO[bytes]
) -> tuple[Manifest, list[_Part]]:
    """Take one consistent state of the station; the registry goes into the file `content`."""
    registry = station.registry
    with ExitStack() as others:
        others.enter_context(station.crl_lock())
        snapshot = others.enter_context(registry.snapshot())
        parts = [_part_of(path, path.relative_to(station.folder).as_posix()) for path in station.files()]
        snapshot.release()
        parts.append(_Part(REGISTRY_FILE, source=content, size_bytes=write_json(snapshot.documents, content)))
    parts.append(_Part(AUDIT_FILE, source=registry.audit_path, size_bytes=snapshot.audit_bytes))
    parts += extra
    names = tuple(part.name for part in parts)
    manifest = Manifest(started_at, actor(), station.settings.organization, names)
    return manifest, [_Part(MANIFEST, manifest.to_bytes()), *parts]


def _extra_parts(paths: Sequence[Path]) -> list[_Part]:
    parts = [_part_of(path, f"{EXTRA}/{path.name}") for path in paths]
    names = [part.name for part in parts]
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(f"could not make a backup: two files to come along are both called {name}")
        if not _is_plain(name):
            raise ConfigurationError(f"could not make a backup: {escaped(name, 80)} is no name for a file in it")
    return parts


def _part_of(path: Path, name: str) -> _Part:
    return _Part(name, path.read_bytes(), stat.S_IMODE(path.stat().st_mode))


def _add(archive: tarfile.TarFile, part: _Part, at: datetime) -> None:
    member = tarfile.TarInfo(part.name)
    member.mode, member.mtime = part.mode, int(at.timestamp())
    if part.source is None:
        member.size = len(part.content)
        archive.addfile(member, io.BytesIO(part.content))
    elif not isinstance(part.source, Path):
        member.size = part.size_bytes
        part.source.seek(0)
        archive.addfile(member, part.source)
    elif part.size_bytes:
        member.size = part.size_bytes
        with part.source.open("rb") as file:
            archive.addfile(member, file)
    else:
        archive.addfile(member)


def check_target(path: Path, station_folder: Path) -> None:
    """Refuse to write a backup over a file, or into the station's own folder; `ConfigurationError`."""
    if path.exists() or path.is_symlink():
        raise ConfigurationError(
            f"could not write the backup {path}: it is there already",
            hint="name a new file: a backup is never replaced",
        )
    if path.is_relative_to(station_folder):
        raise ConfigurationError(
            f"could not write the backup {path}: it would be in the station's own folder, and be lost with it",
            hint="name a file on another disk",
        )


@contextmanager
def naming(verb: str, path: Path) -> Iterator[None]:
    """Turn what goes wrong inside the file into an error that names it."""
    try:
        yield
    except AgeError as error:
        raise BackupError(f"could not {verb} the backup {path}: {error.cause}", error.hint) from error
    except (tarfile.TarError, EOFError) as error:
        raise BackupError(
            f"could not {verb} the backup {path}: it is damaged ({error})", "take another copy of the backup"
        ) from error
    except MemoryError as error:
        raise BackupError(
            f"could not {verb} the backup {path}: there is not enough memory for its passphrase"
        ) from error
    except OSError as error:  # a write to a descriptor that finds no room names no file
        error.filename = error.filename or str(path)
        raise


def _row_count(content: bytes) -> int:
    try:
        return len(json.loads(content)["rows"])
    except (ValueError, KeyError, TypeError):
        raise AgeError("the registry in it is damaged") from None


def _drain(content: IO[bytes]) -> None:
    while content.read(_COPY_BYTES):
        pass


def _is_plain(name: str) -> bool:
    """Whether a name is a relative path that stays where it is put, and that a person can read."""
    parts = name.split("/")
    return name.isprintable() and all(part not in ("", ".", "..") for part in parts)
