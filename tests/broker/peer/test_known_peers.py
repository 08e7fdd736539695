"""What is remembered of a certificate, and what is asked anew every time."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.pki import Pki, now

from birthmark.broker import known_peers
from birthmark.broker.known_peers import KnownPeers
from birthmark.broker.peer import PeerRefusedError, Trust, check_peer

PKI = Pki.create()
TRUST = Trust.from_pem(PKI.issuing.pem)
SENSOR = PKI.device()
DAY = dt.timedelta(days=1)


def knowing() -> KnownPeers:
    known = KnownPeers(TRUST)
    known.check(SENSOR.der, now())
    return known


def test_a_certificate_is_read_once_and_judged_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    known = knowing()

    def read_again(*_: object) -> None:
        raise AssertionError("the certificate was read again")

    monkeypatch.setattr(known_peers, "read_peer", read_again)
    assert known.check(SENSOR.der, now()) == check_peer(SENSOR.der, TRUST, now())


@pytest.mark.parametrize(
    ("moment", "reason"),
    [
        (SENSOR.certificate.not_valid_before_utc - DAY, "not-yet-valid"),
        (SENSOR.certificate.not_valid_after_utc + DAY, "expired"),
        (PKI.issuing.certificate.not_valid_after_utc + DAY, "expired"),
    ],
)
def test_a_known_certificate_is_refused_outside_its_time(moment: dt.datetime, reason: str) -> None:
    known = knowing()
    for _ in range(2):
        with pytest.raises(PeerRefusedError) as caught:
            known.check(SENSOR.der, moment)
        assert caught.value.reason == reason


def test_a_certificate_known_from_the_renewal_listener_is_not_let_in_at_the_other() -> None:
    known = KnownPeers(TRUST)
    later = SENSOR.certificate.not_valid_after_utc + DAY
    assert known.check(SENSOR.der, later, expired_by=2 * DAY).for_renewal
    with pytest.raises(PeerRefusedError, match="was valid until"):
        known.check(SENSOR.der, later)
    assert not known.check(SENSOR.der, now()).for_renewal


def test_who_comes_too_late_to_renew_is_refused_with_how_late_that_is() -> None:
    too_late = SENSOR.certificate.not_valid_after_utc + 3 * DAY
    with pytest.raises(PeerRefusedError, match="more than 2 days later, which is as long as it can be renewed"):
        knowing().check(SENSOR.der, too_late, expired_by=2 * DAY)
    with pytest.raises(PeerRefusedError) as caught:
        knowing().check(SENSOR.der, too_late)
    assert "renewed" not in caught.value.message


def test_a_known_service_does_not_renew_over_the_network() -> None:
    known, service = KnownPeers(TRUST), PKI.device("alice", "operator")
    assert known.check(service.der, now()).is_service
    with pytest.raises(PeerRefusedError, match="only devices renew"):
        known.check(service.der, now(), expired_by=DAY)


@given(at=st.integers(0, len(SENSOR.der) - 1), flip=st.integers(1, 255))
def test_one_octet_makes_another_certificate(at: int, flip: int) -> None:
    known = knowing()
    damaged = SENSOR.der[:at] + bytes([SENSOR.der[at] ^ flip]) + SENSOR.der[at + 1 :]
    with pytest.raises(PeerRefusedError):
        known.check(damaged, now())
    assert len(known) == 1


def test_other_issuing_cas_know_nobody() -> None:
    stranger = Trust.from_pem(Pki.create().issuing.pem)
    with pytest.raises(PeerRefusedError) as caught:
        KnownPeers(stranger).check(SENSOR.der, now())
    assert caught.value.reason == "issuer"


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_peers, "MAX_KNOWN", 3)
    known = KnownPeers(TRUST)
    for number in range(5):
        known.check(PKI.device(f"sensor-{number}").der, now())
    assert len(known) == 3
    assert str(known.check(SENSOR.der, now()).device_id) == "sensor-1"
