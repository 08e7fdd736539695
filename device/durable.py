"""Files that survive a power cut: written whole or not at all.

A file is written to a temporary name in the same folder, fsynced, renamed over its final name, and the folder
is fsynced. A reader sees the old content or the new one; after the call returns, the new one is on disk.
Temporary names end in `.part`; `remove_leftovers` clears those that a crash left behind.

What is no file is never replaced: to rename over a device, or over `/dev/stdout`, is something that root can do,
and that takes it away from everybody.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from pathlib import Path
    from typing import BinaryIO

TEMPORARY_SUFFIX = ".part"
_PIECE_BYTES = 1 << 18
"""How much of a file goes to the system at once: in pieces of Python's 8 KiB, large ones take thrice the time."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_durably(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Put `content` at `path` with file mode `mode`, whole and durable, replacing what was there.

    Raises:
        OSError: it could not be written; what was at `path` is unchanged and no temporary file is left.
    """
    with durable_file(path, mode=mode) as file:
        file.write(content)


@contextlib.contextmanager
def durable_file(path: Path, *, mode: int = 0o600) -> Iterator[BinaryIO]:
    """Open a file to be written piece by piece; it is at `path`, whole and durable, once the block has ended.

    Raises:
        OSError: it could not be written. After this, or any other exception in the block, what was at `path` is
            unchanged and no temporary file is left.
    """
    with _replacing(path, mode, buffer_bytes=_PIECE_BYTES) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def write_many(folder: Path, contents: Iterable[tuple[str, bytes]], *, mode: int = 0o600) -> None:
    """Put many files into `folder`, by name, each whole or not at all; all are durable once this returns.

    One sync of the whole system takes the place of two for each file. What is there already stays as it is. A
    power cut before that sync may leave a file without its content; the same call again puts it right.

    Raises:
        OSError: one could not be written; those before it are there, durable or not.
    """
    for name, content in contents:
        path = folder / name
        with contextlib.suppress(FileNotFoundError):
            if path.read_bytes() == content:
                continue
        with _replacing(path, mode) as file:
            file.write(content)
    os.sync()


@contextlib.contextmanager
def _replacing(path: Path, mode: int, *, buffer_bytes: int = -1) -> Iterator[BinaryIO]:
    """Open a temporary file that takes the place of `path` at the end of the block; it is gone if that fails."""
    _check_replaceable(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with open(descriptor, "wb", buffer_bytes) as file:  # noqa: PTH123 - a descriptor, not a path
            os.fchmod(descriptor, mode)  # the umask does not decide the mode of a key
            yield file
        temporary.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and (error.filename == str(temporary) or _names_none_and_is_full(error)):
            error.filename, error.filename2 = str(path), None  # the file that is meant
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _check_replaceable(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError:  # most often it is not there; whatever else it is, the attempt to write says it
        return
    is_file = stat.S_ISREG(mode) or stat.S_ISDIR(mode)  # a folder in the way has an error of its own
    # `/dev/stdout` is a link into /proc, to a file where the shell has put one.
    if not is_file or (path.is_symlink() and str(path.readlink()).startswith("/proc/")):
        raise OSError(errno.ENOTSUP, "it is a device, a pipe or a link to one, and no file", str(path))


def _names_none_and_is_full(error: OSError) -> bool:
    """Whether a write to a descriptor met a full disk; one that names a file is about another one than ours."""
    return error.filename is None and error.errno in _FULL


def rename_durably(source: Path, target: Path) -> None:
    """Rename `source` to `target` in one folder, atomically, and make it durable."""
    source.replace(target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove the temporary files that a crash left in `folder`, those of the file `name` or of all.

    The caller keeps off everybody who may be writing there: a file that is being written looks the same.
    """
    for leftover in folder.glob(f".{name}.*{TEMPORARY_SUFFIX}"):
        leftover.unlink(missing_ok=True)


def private_folder(path: Path, known: Collection[str] = ()) -> Path:
    """Make `path` (and its parents) if needed, readable by its owner alone (0700), and return it.

    Args:
        path: the folder.
        known: names of files that show it to be the caller's own.

    Raises:
        OSError: it cannot be made, or it is there, open to others, and what is in it is not the caller's: it may
            be a folder of the system that a slip of the finger named, and nobody could use it any more.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    mode = stat.S_IMODE(path.stat().st_mode)
    names = {entry.name for entry in path.iterdir()} if mode & 0o077 else set()
    if names and names.isdisjoint(known):
        cause = f"it has something in it and is open to others: name another folder, or chmod 700 {path}"
        raise PermissionError(errno.EPERM, cause, str(path))
    if mode != 0o700:
        path.chmod(0o700)
    return path


def is_on_read_only_disk(path: Path) -> bool:
    """Whether the file system that `path` is on is mounted read-only; `OSError` if there is no such path."""
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


@contextlib.contextmanager
def exclusive_lock(path: Path, *, wait: bool = True, as_it_is: bool = False) -> Iterator[None]:
    """Hold the lock file at `path`, between processes and between threads of one process, for the block.

    The file is made if needed and stays behind, empty: removing it would let two holders in.

    Args:
        path: the lock's.
        wait: whether to wait for who holds it.
        as_it_is: for who reads on a disk that cannot be written. The file is locked as it is, since somebody may
            have the same file system mounted to write; one that is not there is held by nobody.

    Raises:
        BlockingIOError: `wait` is false and somebody else holds it.
    """
    if as_it_is and not path.exists():
        yield
        return
    flags = os.O_RDONLY if as_it_is else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)
