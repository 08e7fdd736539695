"""The audit log: who did what to whom at this station, append-only and hash-chained.

Rules:

- One JSON object a line, written in one way only: `seq` (1, 2, 3, ...), `at`, `actor`, `action`, `subject`,
  `details`, `previous` (the hash of the entry before) and `hash` (SHA-256 over the others, as JSON with sorted
  keys). Changing, removing or moving an entry breaks the chain at that place.
- The registry makes the entries: they are durable in it, with the transaction that they tell of, and it knows the
  last number and hash. Only then are they appended here and fsynced. After a kill in between, the next
  transaction appends what is missing; an entry that is here already is not appended again. So the two agree,
  and a cut at the log's end shows too.
- What a transaction finds missing of the one before it, it puts back and records as RESTORED: a command was
  killed there, or somebody cut the log's end. `audit verify` names every such place.
- A torn last line, which a power cut can leave, is replaced when it is the beginning of the missing entry;
  anything else is evidence and stays.
- The chain makes tampering evident, it does not stop it: a log that was damaged never keeps anybody from
  revoking.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import orjson

from birthmark.device.durable import sync_folder
from birthmark.device.errors import RegistryError
from birthmark.device.escape import escaped

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from datetime import datetime
    from pathlib import Path

GENESIS: Final = "0" * 64
"""What the first entry has as `previous`."""
RESTORED: Final = "audit-restored"
"""The action of the entry that says how many lines were missing at the log's end, and were put back."""
_ENCODER: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True)
_KEYS: Final = {"seq", "at", "actor", "action", "subject", "details", "previous", "hash"}


class Head(NamedTuple):
    """The last entry of the log: its number (0: none yet) and its hash."""

    seq: int = 0
    hash: str = GENESIS


def chained(
    head: Head, *, at: datetime, actor: str, action: str, subject: str, details: Mapping[str, Any]
) -> tuple[str, Head]:
    """Return the next entry's line (without a line end) and the head after it."""
    entry: dict[str, Any] = {
        "seq": head.seq + 1,
        "at": at.isoformat(),
        "actor": actor,
        "action": action,
        "subject": subject,
        "details": dict(details),
        "previous": head.hash,
    }
    body = written(entry)
    own_hash = hashlib.sha256(body.encode()).hexdigest()
    # Into its place among the sorted keys: writing the whole a second time would take as long again. No text has
    # these characters in it: its quotation marks are escaped.
    before, mark, after = body.rpartition(',"previous":"')
    return f'{before},"hash":"{own_hash}"{mark}{after}', Head(head.seq + 1, own_hash)


def append_missing(path: Path, lines: Sequence[str]) -> int:
    """Append those of `lines` that the log does not end with, and fsync. The caller holds the registry's lock.

    Returns:
        How many lines were missing.

    Raises:
        OSError: the log cannot be written; call again with the same lines.
    """
    if not lines:
        return 0
    is_new = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        reach = sum(len(line) + 1 for line in lines) + 1
        start = max(0, size - reach)
        tail = os.pread(descriptor, size - start, start)
        *whole, torn = tail.split(b"\n")
        present = set(whole)
        missing = [line for line in map(str.encode, lines) if line not in present]
        count = len(missing)
        if torn and any(line.startswith(torn) for line in missing):
            size -= len(torn)
            os.ftruncate(descriptor, size)
        elif torn:
            missing.insert(0, b"")  # ends the foreign line, and leaves it for `verify` to find
        if missing:
            _write_all(descriptor, b"".join(line + b"\n" for line in missing), size)
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if is_new:
        sync_folder(path.parent)
    return count


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the log's entries in their order; lines that are none are left out.

    Raises:
        RegistryError: the log cannot be read.
    """
    for _, raw in lines_of(path):
        entry = parsed(raw)
        if entry is not None:
            yield entry


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the log's lines without their ends, counted from 1; a log that is not there has none.

    Raises:
        RegistryError: the log cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                yield number, raw.rstrip(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise RegistryError(
            f"could not read the audit log {path}: {error.strerror}", hint="repair its permissions"
        ) from error


def parsed(raw: bytes) -> dict[str, Any] | None:
    """Return the entry that a line is; None if it is none."""
    try:
        entry = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        return None
    if (
        isinstance(entry["seq"], bool)
        or not isinstance(entry["seq"], int)
        or not isinstance(entry["details"], dict)
        or not all(value is None or isinstance(value, str | int) for value in entry["details"].values())
    ):
        return None
    texts = _KEYS - {"seq", "details"}
    return entry if all(isinstance(entry[key], str) for key in texts) else None


def described(entry: Mapping[str, Any]) -> str:
    """Return an entry in one printable line."""
    details = " ".join(
        f"{escaped(key)}={escaped(str(value))}"
        for key, value in entry["details"].items()
        if value not in (None, "")
    )
    subject = escaped(entry["subject"])
    who = escaped(entry["actor"])
    return (
        f"{entry['seq']:>6}  {escaped(entry['at'][:19])}Z  {who}  {escaped(entry['action'])} {subject}  {details}"
    )


def digest(entry: Mapping[str, Any]) -> str:
    """Return the hash of an entry: over all of it but `hash`."""
    entry = {key: value for key, value in entry.items() if key != "hash"}
    return hashlib.sha256(written(entry).encode()).hexdigest()


def written(entry: Mapping[str, Any]) -> str:
    """Return an object as the log has it: in one way only.

    That is `json`'s. Of printable ASCII, which nearly all of a log is, orjson makes the same, much sooner.
    """
    try:
        text = orjson.dumps(entry, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # half a character, or a number of more than 64 bits: nobody's but who edited the log
        return _ENCODER.encode(entry)
    return text.decode() if text.isascii() and b"\x7f" not in text else _ENCODER.encode(entry)


def _write_all(descriptor: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
