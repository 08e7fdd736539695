"""What the authority signs, and when it refuses to."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from support.station import PASSPHRASE, Clock, enrolled_row, issue, keyed_row, public_key_der

from birthmark.device.errors import AuthorityError
from birthmark.provisioning.registry.model import Kind, State
from birthmark.provisioning.station import Station


def test_a_device_gets_what_the_registry_says(station: Station) -> None:
    row = keyed_row(station, "Sensor-17", role="camera")
    certificate = x509.load_der_x509_certificate(issue(station, row))
    assert certificate.subject.rfc4514_string() == "CN=Sensor-17,OU=camera,O=Acme"
    assert certificate.serial_number == row.cert_serial
    certificate.verify_directly_issued_by(x509.load_der_x509_certificate(station.authority.issuing_der))
    assert station.authority.key_id in repr(station.authority)
    issuer = station.authority.issuing_der
    x509.load_der_x509_certificate(issuer).verify_directly_issued_by(
        x509.load_der_x509_certificate(station.authority.anchors_der[0])
    )


@pytest.mark.parametrize("change", ["serial", "key", "name", "role", "kind"])
def test_nothing_is_signed_that_is_not_recorded(station: Station, change: str) -> None:
    changes: dict[str, dict[str, Any]] = {
        "serial": {"cert_serial": station.authority.new_cert_serial()},
        "key": {"public_key_der": public_key_der()},
        "name": {"name": "sensor-2"},
        "role": {"role": "camera"},
    }
    row = keyed_row(station, "sensor-1").changed(**changes.get(change, {}))
    issuing = station.authority.issue_service if change == "kind" else station.authority.issue_device
    with pytest.raises(AuthorityError, match="not recorded"):
        issuing(row, now=station.clock())


def test_a_broker_is_certified_under_the_name_on_record(station: Station) -> None:
    authority = station.authority
    with station.registry.transaction() as transaction:
        row = transaction.insert(
            kind=Kind.BROKER,
            name="gateway-1",
            state=State.KEYED,
            public_key_der=public_key_der(),
            cert_serial=authority.new_cert_serial(),
            issuer=authority.key_id,
        )
    with pytest.raises(AuthorityError, match="broker gateway-2: its serial number is not recorded"):
        authority.issue_broker(row, ["gateway-2", "gateway-1"], now=station.clock())
    assert authority.issue_broker(row, ["gateway-1", "gateway-2"], now=station.clock())


@pytest.mark.parametrize("state", [State.ISSUED, State.ATTESTED, State.VOID])
def test_a_row_beyond_keyed_gets_no_second_certificate(station: Station, state: State) -> None:
    row = keyed_row(station, "sensor-1")
    with station.registry.transaction() as transaction:
        transaction.update(
            row.changed(
                state=state,
                certificate_der=b"certificate",
                void_reason="test" if state is State.VOID else "",
            )
        )
    with pytest.raises(AuthorityError, match=f"is {state}, not KEYED"):
        issue(station, row)


def test_a_revoked_row_gets_no_certificate(station: Station) -> None:
    row = keyed_row(station, "sensor-1")
    with station.registry.transaction() as transaction:
        transaction.update(row.changed(revoked_at=station.clock(), revocation_reason="superseded"))
    with pytest.raises(AuthorityError, match="revoked"):
        issue(station, row)


def test_a_clock_before_the_ca_begins_issues_nothing(station: Station, clock: Clock) -> None:
    row = keyed_row(station, "sensor-1")
    clock.advance(days=-2)
    with pytest.raises(AuthorityError, match="the CA begins on") as caught:
        issue(station, row)
    assert "clock" in caught.value.hint


def test_a_clock_before_the_last_issuance_issues_nothing(station: Station, clock: Clock) -> None:
    clock.advance(hours=5)
    enrolled_row(station, "sensor-1")
    row = keyed_row(station, "sensor-2")
    clock.advance(minutes=-1)
    with pytest.raises(AuthorityError, match="before the last issuance"):
        issue(station, row)
    clock.advance(seconds=59)  # within what time synchronisation may step back
    assert issue(station, row)


def test_an_ended_ca_issues_nothing(station: Station, clock: Clock) -> None:
    clock.advance(days=3660)
    row = keyed_row(station, "sensor-1")
    with pytest.raises(AuthorityError, match="the CA that issues ended on 20"):
        issue(station, row)


def test_serial_numbers_are_not_repeated(station: Station) -> None:
    drawn = {station.authority.new_cert_serial() for _ in range(500)}
    assert len(drawn) == 500


def test_an_unlock_is_signed_by_the_issuing_ca(station: Station) -> None:
    signature = station.authority.sign_transcript(b"transcript")
    public_key = station.issuing.public_key()
    assert isinstance(public_key, ec.EllipticCurvePublicKey)
    public_key.verify(signature, b"transcript", ec.ECDSA(SHA256()))


def test_a_station_asks_for_the_passphrase_only_when_it_is_needed(station: Station) -> None:
    opened = Station.open(station.folder, passphrase=b"wrong", clock=station.clock)
    with opened.registry.view() as view:
        assert view.rows() == []
    assert opened.root == station.root
    with pytest.raises(AuthorityError, match="passphrase is wrong"):
        _ = opened.authority
    assert Station.open(station.folder, passphrase=PASSPHRASE).authority.key_id == station.authority.key_id


def test_many_get_what_one_would(station: Station) -> None:
    rows = [keyed_row(station, f"sensor-{number}", role="camera") for number in range(3)]
    for row, der in zip(rows, station.authority.issue_devices(rows, now=station.clock()), strict=True):
        certificate = x509.load_der_x509_certificate(der)
        assert certificate.subject.rfc4514_string() == f"CN={row.name},OU=camera,O=Acme"
        assert certificate.serial_number == row.cert_serial
        key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        assert key == row.public_key_der
        certificate.verify_directly_issued_by(x509.load_der_x509_certificate(station.authority.issuing_der))


@pytest.mark.parametrize("wrong", ["number", "name", "role", "key", "serial", "state", "foreign CA"])
def test_one_of_many_that_is_not_recorded_so_stops_all(
    station: Station, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed: list[object] = []
    authority = station.authority
    monkeypatch.setattr("birthmark.provisioning.profile.ClientSigner.sign", lambda *a, **_: signed.append(a))
    good, bad = keyed_row(station, "sensor-1"), keyed_row(station, "sensor-2")
    if wrong == "state":
        with station.registry.transaction() as transaction:
            bad = transaction.update(bad.changed(state=State.VOID, void_reason="test"))
    elif wrong == "foreign CA":
        monkeypatch.setattr(authority, "key_id", "00" * 20)
    else:
        changes: dict[str, dict[str, Any]] = {
            "number": {"number": bad.number + 7},
            "name": {"name": "sensor-3"},
            "role": {"role": "camera"},
            "key": {"public_key_der": public_key_der()},
            "serial": {"cert_serial": station.authority.new_cert_serial()},
        }
        bad = bad.changed(**changes[wrong])
    with pytest.raises(AuthorityError, match="could not issue"):
        authority.issue_devices([good, bad], now=station.clock())
    assert not signed
