"""`birthmark inspect` on what the station really makes, with a station, with an issuer, with neither."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from support.pki import ECDSA_SHA1_DER, Pki, pem_of
from support.station import enrolled_row

from birthmark.device.console import run
from birthmark.provisioning.cli import parser

if TYPE_CHECKING:
    from pathlib import Path

    from support.station import Command

    from birthmark.provisioning.station import Station


def device_file(station: Station, tmp_path: Path) -> Path:
    row = enrolled_row(station, "sensor-1")
    assert row.certificate_der is not None
    path = tmp_path / "sensor-1.pem"
    path.write_bytes(pem_of(row.certificate_der))
    return path


def test_everything_that_a_station_makes_is_clean(birthmark: Command, living: Station, tmp_path: Path) -> None:
    assert birthmark("issue-broker", "localhost", "127.0.0.1", "--out", tmp_path / "gw").exit_code == 0
    assert birthmark("issue-operator", "alice", "--out", tmp_path / "alice").exit_code == 0
    files = [
        device_file(living, tmp_path),
        tmp_path / "gw" / "server.pem",
        tmp_path / "alice" / "alice.pem",
        *(living.folder / name for name in ("root.pem", "issuing.pem", "crl.pem", "root-crl.pem")),
    ]

    answer = birthmark("inspect", *files, "--json")

    assert answer.exit_code == 0
    assert [record["findings"] for record in answer.records] == [[]] * len(answer.records)
    profiles = {record["profile"] for record in answer.records}
    assert profiles == {"device", "service", "broker", "issuing CA", "root CA", "CRL"}


def test_a_revoked_one_is_found(birthmark: Command, living: Station, tmp_path: Path) -> None:
    path = device_file(living, tmp_path)
    birthmark("revoke", "sensor-1", "--reason", "lost")

    answer = birthmark("inspect", path, "--json")

    assert answer.exit_code == 1
    (finding,) = answer.records[0]["findings"]
    assert (finding["rule"], finding["severity"]) == ("revoked", "ERROR")
    assert "ERROR revoked: it was revoked" in birthmark("inspect", path).stdout
    assert finding["remedy"] == "make the unit again, if it is to go on"


@pytest.mark.parametrize(
    ("issued", "file"),
    [(("issue-broker", "gw.example.com"), "server.pem"), (("issue-operator", "alice"), "alice.pem")],
)
def test_who_is_no_device_is_told_the_command_that_replaces_what_was_revoked(
    birthmark: Command, living: Station, issued: tuple[str, str], file: str
) -> None:
    command, name = issued
    birthmark(command, name, "--out", "out")
    birthmark("revoke", name, "--reason", "lost")

    answer = birthmark("inspect", f"out/{file}", "--json")

    (finding,) = answer.records[0]["findings"]
    assert finding["remedy"] == f"birthmark {command} NAME --renew, if it is to go on"


def test_a_strangers_certificate_is_found(birthmark: Command, living: Station, tmp_path: Path) -> None:
    path = tmp_path / "stranger.pem"
    path.write_bytes(pem_of(Pki.create().device().der))

    answer = birthmark("inspect", path, "--json")

    assert [finding["rule"] for finding in answer.records[0]["findings"]] == ["issuer"]
    assert answer.exit_code == 1


def test_a_certificate_that_the_registry_does_not_know_is_found(
    birthmark: Command, station: Station, living: Station, tmp_path: Path
) -> None:
    # Signed with the station's key, behind the registry's back.
    from birthmark.device.identity import DeviceId, Role
    from birthmark.provisioning import profile

    issuer = profile.Issuer(living.issuing, living._key_of(living.cas.for_clients))
    certificate = profile.device_certificate(
        issuer,
        organization="Acme",
        device_id=DeviceId("ghost"),
        role=Role("sensor"),
        public_key=issuer.private_key.public_key(),
        cert_serial=1 << 158,
        lifetime=profile.ISSUING_LIFETIME / 5,
        now=living.clock(),
    )
    path = tmp_path / "ghost.der"
    path.write_bytes(certificate.public_bytes(Encoding.DER))

    (record,) = birthmark("inspect", path, "--json").records

    assert [finding["rule"] for finding in record["findings"]] == ["recorded"]


def test_without_a_station_an_issuer_may_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BIRTHMARK_STATION", str(tmp_path / "none"))
    monkeypatch.delenv("BIRTHMARK_PASSPHRASE", raising=False)
    pki = Pki.create()
    leaf, issuer, stranger = tmp_path / "leaf.pem", tmp_path / "issuer.pem", tmp_path / "stranger.pem"
    leaf.write_bytes(pem_of(pki.device().der))
    issuer.write_bytes(pki.issuing.pem)
    stranger.write_bytes(pki.stranger.pem)

    assert run(parser(), ["inspect", str(leaf)]) == 0
    assert run(parser(), ["inspect", "--issuer", str(issuer), str(leaf)]) == 0
    assert run(parser(), ["inspect", "--issuer", str(stranger), str(leaf)]) == 1
    assert "issued by none of the CAs in" in capsys.readouterr().out


def test_a_forged_signature_under_the_cas_name_and_key_id_is_found(
    birthmark: Command, living: Station, tmp_path: Path
) -> None:
    good = x509.load_pem_x509_certificate(device_file(living, tmp_path).read_bytes()).public_bytes(Encoding.DER)
    path = tmp_path / "forged.der"
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))

    (record,) = birthmark("inspect", path, "--json").records

    assert [finding["rule"] for finding in record["findings"]] == ["signature"]


def test_a_weak_signature_is_no_forgery(birthmark: Command, tmp_path: Path) -> None:
    pki = Pki.create()
    issuer, leaf = tmp_path / "issuer.pem", tmp_path / "leaf.der"
    issuer.write_bytes(pki.issuing.pem)
    for flipped, rules in ((0, ["signature-algorithm"]), (1, ["signature-algorithm", "signature"])):
        der = pki.issuing.issue(algorithm_der=ECDSA_SHA1_DER).der
        leaf.write_bytes(der[:-1] + bytes([der[-1] ^ flipped]))

        (record,) = birthmark("inspect", "--issuer", issuer, leaf, "--json").records

        assert [finding["rule"] for finding in record["findings"]] == rules
        assert "ecdsa-with-sha1" in record["findings"][0]["what"]


def test_a_file_that_cannot_be_read_keeps_no_other_from_being_looked_at(
    birthmark: Command, living: Station, tmp_path: Path
) -> None:
    noise = tmp_path / "noise"
    noise.write_bytes(b"noise")

    answer = birthmark("inspect", noise, device_file(living, tmp_path), tmp_path / "none", living.root_path)

    assert answer.exit_code == 5
    assert [line.split()[2] for line in answer.stdout.splitlines() if not line.startswith(" ")] == [
        "device",
        "root",
    ]
    assert answer.stderr.count("error:") == 2


def test_it_reads_from_stdin(
    birthmark: Command, living: Station, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = device_file(living, tmp_path).read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    assert birthmark("inspect", "-", "--json").records[0]["subject"] == "CN=sensor-1,OU=sensor,O=Acme"


def test_what_is_none_is_named(birthmark: Command, tmp_path: Path) -> None:
    path = tmp_path / "noise"
    path.write_bytes(b"noise")

    answer = birthmark("inspect", path)

    assert answer.exit_code == 1
    assert answer.stderr.startswith("error: could not inspect")
    assert str(path) in answer.stderr
