"""The gateway's own certificate: when it is an alarm, and what the alarm says."""

from __future__ import annotations

import datetime as dt
import logging
from typing import TYPE_CHECKING

import pytest
from support.pki import Pki, now

from birthmark.broker.own_certificate import OwnCertificate, read_own_certificate

if TYPE_CHECKING:
    from pathlib import Path

PKI = Pki.create()
DAY = dt.timedelta(days=1)
SECOND = dt.timedelta(seconds=1)


def certificate(folder: Path, life: dt.timedelta, *hosts: str) -> OwnCertificate:
    begins = now()
    issued = PKI.issuing.server(*(hosts or ("gw-1",)), not_before=begins, not_after=begins + life)
    found = read_own_certificate(issued.write(folder / "server.pem"))
    assert found is not None
    assert (found.not_before, found.not_after) == (begins, begins + life)
    return found


@pytest.mark.parametrize(
    ("life", "left", "code"),
    [
        (365 * DAY, 365 * DAY + SECOND, "certificate-not-yet-valid"),
        (365 * DAY, 365 * DAY, None),
        (365 * DAY, 30 * DAY, None),
        (365 * DAY, 30 * DAY - SECOND, "certificate-due"),
        (365 * DAY, 0 * DAY, "certificate-due"),
        (365 * DAY, -SECOND, "certificate-expired"),
        (30 * DAY, 30 * DAY, None),
        (30 * DAY, 10 * DAY, None),
        (30 * DAY, 10 * DAY - SECOND, "certificate-due"),
    ],
)
def test_when_it_is_an_alarm(tmp_path: Path, life: dt.timedelta, left: dt.timedelta, code: str | None) -> None:
    own = certificate(tmp_path, life)
    assert [alarm.code for alarm in own.alarms(own.not_after - left)] == ([code] if code else [])


def test_it_says_what_to_do_and_how_bad_it_is(tmp_path: Path) -> None:
    own = certificate(tmp_path, 365 * DAY, "gw-1.example.com", "192.0.2.7")
    renew = (
        "`birthmark issue-broker gw-1.example.com 192.0.2.7 --renew` at the station, then bring server.pem here"
    )
    (due,) = own.alarms(own.not_after - DAY)
    assert (due.level, due.hint) == (logging.WARNING, renew)
    assert f"{tmp_path / 'server.pem'}, expires on {own.not_after:%F %T} UTC" in due.message
    (expired,) = own.alarms(own.not_after + DAY)
    assert (expired.level, expired.hint) == (logging.ERROR, renew)
    (early,) = own.alarms(own.not_before - DAY)
    assert early.level == logging.ERROR
    assert early.hint.startswith("compare this gateway's clock")


def test_the_same_alarm_a_moment_later_is_the_same(tmp_path: Path) -> None:
    own = certificate(tmp_path, 365 * DAY)
    assert own.alarms(own.not_after - DAY) == own.alarms(own.not_after - DAY + SECOND)


def test_the_key_of_the_file_stays_out_of_it(tmp_path: Path) -> None:
    own = certificate(tmp_path, 365 * DAY)
    assert "PRIVATE" not in repr(own)


def test_what_cannot_be_read_is_no_alarm(tmp_path: Path) -> None:
    (tmp_path / "server.pem").write_text("no PEM")
    assert read_own_certificate(tmp_path / "server.pem") is None
