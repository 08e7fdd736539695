"""The outbox on disks that are really full, or really read-only."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from support.broker_stub import PUBLISH, BrokerStub
from support.device_command import DeviceCommand
from support.device_folder import enrolled
from support.mounts import mount, mounted
from support.outbox_alone import TOPIC, outbox_at
from support.patience import PATIENCE_S
from support.pki import Pki
from support.waiting import eventually

from birthmark.device.errors import SystemFailureError
from birthmark.device.outbox import outbox as module

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from birthmark.device.outbox.outbox import Outbox


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte; skipped where nobody may mount one."""
    with mounted("-t", "tmpfs", "-o", "size=512k,mode=700", "tmpfs", at=tmp_path / "disk") as folder:
        yield folder


def fill(outbox: Outbox) -> int:
    """Store until the disk takes no more; return how many were stored."""
    for number in range(10_000):
        try:
            outbox.put(TOPIC, f"{number:0200}", retain=False).wait_stored(PATIENCE_S)
        except SystemFailureError:
            assert outbox.state().failing == "the disk is full"
            return number
    raise AssertionError("the disk was never full")


def test_a_full_disk(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_DISK_S", 0.05)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(200_000))
    with outbox_at(small_disk / "o.db") as (outbox, told):
        count = fill(outbox)
        assert count > 100
        assert outbox.state().messages == count
        outbox.connected()
        assert outbox.take()[0].outgoing.payload == f"{0:0200}".encode()
        ballast.unlink()
        eventually(lambda: not outbox.state().failing, "that it works again")
        outbox.put(TOPIC, "after", retain=False).wait_stored(PATIENCE_S)
        assert [event.state for event in told] == ["failing", "working"]
    with outbox_at(small_disk / "o.db") as (again, _):
        again.start()
        eventually(lambda: again.state().messages == count + 1, "what was stored")


def test_a_disk_that_is_full_from_the_start(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_DISK_S", 0.05)
    (small_disk / "room").write_bytes(bytes(100_000))
    with outbox_at(small_disk / "o.db") as (outbox, _):
        count = fill(outbox)
    # The log was written back at the end, which made room: take it.
    with contextlib.suppress(OSError), (small_disk / "ballast").open("wb") as ballast:
        while True:
            ballast.write(bytes(512))
            ballast.flush()
    with outbox_at(small_disk / "o.db") as (outbox, told):
        with pytest.raises(SystemFailureError):
            outbox.put(TOPIC, "no", retain=False).wait_stored(PATIENCE_S)
        assert [event.state for event in told][-1] == "failing"
        (small_disk / "ballast").unlink(missing_ok=True)
        (small_disk / "room").unlink()
        eventually(lambda: not outbox.state().failing, "that it works")
        assert outbox.state().messages == count
        outbox.put(TOPIC, "yes", retain=False).wait_stored(PATIENCE_S)


def test_a_file_system_that_becomes_read_only(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_DISK_S", 0.05)
    with outbox_at(small_disk / "o.db") as (outbox, _):
        outbox.put(TOPIC, "before", retain=False).wait_stored(PATIENCE_S)
    assert not mount("-o", "remount,ro", str(small_disk)).returncode
    with outbox_at(small_disk / "o.db") as (outbox, told):
        with pytest.raises(SystemFailureError, match=r"[Rr]ead-only"):
            outbox.put(TOPIC, "no", retain=False).wait_stored(PATIENCE_S)
        assert [event.state for event in told] == ["failing"]
        assert not mount("-o", "remount,rw", str(small_disk)).returncode
        eventually(lambda: not outbox.state().failing, "that it works again")
        assert outbox.state().messages == 1
        outbox.put(TOPIC, "after", retain=False).wait_stored(PATIENCE_S)


def test_the_command_goes_on_with_a_disk_that_takes_nothing(tmp_path: Path) -> None:
    pki = Pki.create()
    nowhere = tmp_path / "file"
    nowhere.touch()
    with BrokerStub(pki) as broker:
        state = enrolled(tmp_path / "state", pki, port=broker.port)
        (state / "device.toml").write_text(f'[outbox]\npath = "{nowhere}/outbox.db"\n')
        with DeviceCommand("run", "--state", state, "--simulate", "--interval", "0.05", "--json") as device:
            said = device.wait_for("outbox")
            assert (said["state"], str(nowhere) in said["detail"]) == ("failing", True)
            assert "Not a directory" in device.wait_for("not_published", count=3)["reason"]
            assert len([record for record in device.records if record["event"] == "outbox"]) == 1
            broker.wait_for(PUBLISH)  # presence
            (state / "device.toml").write_text('[outbox]\nwhen_failing = "memory"\npath = "/dev/full/o.db"\n')
            assert device.end(15) == 0
        with DeviceCommand("run", "--state", state, "--simulate", "--interval", "0.05", "--json") as device:
            device.wait_for("published", count=3)
            assert device.end(15) == 0
