"""Durable files: whole or not at all, private, and no leftovers."""

import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from birthmark.device import durable


@contextmanager
def a_full_disk() -> Iterator[None]:
    """Have a write of more than 1 MiB fail as on a full disk: the error names no file."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_replaces_whole_and_sets_the_mode(tmp_path: Path) -> None:
    path = tmp_path / "key"
    old_umask = os.umask(0)
    try:
        durable.write_durably(path, b"one", mode=0o400)
        durable.write_durably(path, b"two", mode=0o600)
    finally:
        os.umask(old_umask)
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["key"]


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "record"
    path.mkdir()  # a folder in the way: the rename fails after the temporary file was written
    with pytest.raises(IsADirectoryError) as caught:
        durable.write_durably(path, b"new")
    assert (caught.value.filename, caught.value.filename2) == (str(path), None)
    assert [entry.name for entry in tmp_path.iterdir()] == ["record"]


def test_an_error_names_the_file_that_is_meant(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        durable.write_durably(tmp_path / "none" / "record", b"new")
    assert missing.value.filename == str(tmp_path / "none" / "record")
    with a_full_disk(), pytest.raises(OSError, match="File too large") as full:
        durable.write_durably(tmp_path / "record", bytes(2 << 20))
    assert full.value.filename == str(tmp_path / "record")
    assert list(tmp_path.iterdir()) == []


def test_an_error_over_a_file_that_is_written_for_another_names_that_one(tmp_path: Path) -> None:
    matched = pytest.raises(OSError, match="File too large")
    with a_full_disk(), matched as full, durable.durable_file(tmp_path / "archive"):
        durable.write_durably(tmp_path / "part", bytes(2 << 20))
    assert full.value.filename == str(tmp_path / "part")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_file_is_never_replaced(tmp_path: Path) -> None:
    """As root, `--out /dev/stdout` would put a file where everybody's link is."""
    mine = tmp_path / "mine"
    mine.write_bytes(b"mine")
    os.mkfifo(tmp_path / "pipe")
    with mine.open("rb") as file:
        (tmp_path / "stdout").symlink_to(f"/proc/self/fd/{file.fileno()}")
        for name in ("pipe", "stdout"):
            with pytest.raises(OSError, match="no file") as caught:
                durable.write_durably(tmp_path / name, b"new")
            assert caught.value.filename == str(tmp_path / name)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["mine", "pipe", "stdout"]
    assert mine.read_bytes() == b"mine"
    (tmp_path / "link").symlink_to(mine)
    durable.write_durably(tmp_path / "link", b"new")
    assert (tmp_path / "link").read_bytes() == b"new", "a link of somebody's own is replaced as ever"


def test_leftovers_of_a_crash_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".key.0a0b0c0d.part").write_bytes(b"half")
    (tmp_path / "key").write_bytes(b"whole")
    durable.remove_leftovers(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["key"]


def test_the_leftovers_of_one_file_are_removed_and_no_other_ones(tmp_path: Path) -> None:
    for name in (".key.0a0b0c0d.part", ".key.pem.0a0b0c0d.part"):
        (tmp_path / name).write_bytes(b"half")
    durable.remove_leftovers(tmp_path, "key.pem")
    assert [entry.name for entry in tmp_path.iterdir()] == [".key.0a0b0c0d.part"]


def test_the_lock_is_exclusive_and_given_back(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with durable.exclusive_lock(path), pytest.raises(BlockingIOError), durable.exclusive_lock(path, wait=False):
        pass
    with durable.exclusive_lock(path, wait=False):
        pass


def test_a_private_folder_is_private(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True, mode=0o755)
    assert stat.S_IMODE(durable.private_folder(folder).stat().st_mode) == 0o700
    (folder / "record").write_bytes(b"ours")
    assert durable.private_folder(folder) == folder


def test_a_folder_of_others_is_not_taken_from_them(tmp_path: Path) -> None:
    """`--state /var/lib` is a slip of the finger, not a wish to lock everybody out of it."""
    tmp_path.chmod(0o755)
    (tmp_path / "somebody's").write_bytes(b"")
    with pytest.raises(PermissionError, match="open to others"):
        durable.private_folder(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    (tmp_path / "active").write_bytes(b"")  # restored from a backup that forgot the mode
    assert stat.S_IMODE(durable.private_folder(tmp_path, ("active", "hwid")).stat().st_mode) == 0o700
