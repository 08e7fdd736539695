"""When the certificates that renewals have replaced are revoked, and what keeps the gateways from knowing."""

from __future__ import annotations

import queue
from contextlib import contextmanager
from datetime import datetime, time, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from support.patience import PATIENCE_S
from support.renewing import renewed

from birthmark.device.console import Console
from birthmark.provisioning.retirement import Retiring, retire_due, retirement_at

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from support.renewing import PaperDevice
    from support.station import Clock

    from birthmark.provisioning.station import Station


@pytest.mark.parametrize(
    ("at", "after_hours", "due"),
    [
        ("12:00:00", 24, "12:00:00"),
        ("12:00:01", 24, "13:00:00"),
        ("12:59:59.999999", 1, "14:00:00"),
        ("23:30:00", 1, "01:00:00"),
        ("12:34:56", 0, "12:34:56"),
    ],
)
def test_what_is_replaced_within_an_hour_is_revoked_together(at: str, after_hours: int, due: str) -> None:
    now = datetime.fromisoformat(f"2026-05-04T{at}+00:00")
    due_at = retirement_at(now, after_hours)
    assert due_at.timetz() == time.fromisoformat(f"{due}+00:00")
    assert timedelta(hours=after_hours) <= due_at - now < timedelta(hours=after_hours + 1)


class Told(Console):
    """A console that a test hears."""

    def __init__(self) -> None:
        super().__init__()
        self.warnings: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.records: queue.SimpleQueue[Mapping[str, Any]] = queue.SimpleQueue()

    def warn(self, text: str) -> None:
        self.warnings.put(text)

    def emit(self, record: Mapping[str, Any], text: str) -> None:  # noqa: ARG002 - a test reads the record
        self.records.put(record)


@contextmanager
def retiring(station: Station) -> Iterator[tuple[Retiring, Told]]:
    told = Told()
    service = Retiring(station, told)
    service.start()
    try:
        yield service, told
    finally:
        service.stop()


def test_a_crl_that_could_not_be_written_is_tried_again(
    station: Station, device: PaperDevice, clock: Clock
) -> None:
    replaced = x509.load_der_x509_certificate(device.leaf_der).serial_number
    renewed(station, device)
    with retiring(station) as (service, told):
        station.crl_path.rename(station.folder / "aside")
        station.crl_path.mkdir()
        clock.advance(hours=25)
        service.look()
        assert "Is a directory" in told.warnings.get(timeout=PATIENCE_S)
        station.crl_path.rmdir()
        service.look()
        assert told.records.get(timeout=PATIENCE_S)["entries"] == 1
    crl = x509.load_pem_x509_crl(station.crl_path.read_bytes())
    assert [entry.serial_number for entry in crl] == [replaced]


def test_a_defect_is_told_without_its_words_and_tried_again(
    station: Station, device: PaperDevice, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    renewed(station, device)
    with retiring(station) as (service, told):
        with monkeypatch.context() as defective:
            defective.setattr(
                "birthmark.provisioning.retirement.bring_new_crl", lambda *_: int("what nobody reads")
            )
            clock.advance(hours=25)
            service.look()
            warning = told.warnings.get(timeout=PATIENCE_S)
        assert "ValueError at" in warning
        assert "nobody" not in warning
        service.look()
        assert told.records.get(timeout=PATIENCE_S)["entries"] == 1


def test_what_a_killed_service_has_revoked_is_on_a_crl_when_it_is_back(
    station: Station, device: PaperDevice, clock: Clock
) -> None:
    renewed(station, device)
    clock.advance(hours=25)
    assert retire_due(station) == 1
    with retiring(station) as (_, told):
        assert told.records.get(timeout=PATIENCE_S)["entries"] == 1
