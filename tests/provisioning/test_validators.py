"""What the station really issues, through its commands, before other people's linters and validators."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.x509 import verification
from support.pki import Pki, pem_of
from support.station import enrolled_row

from birthmark.device.pem import CERTIFICATE, CRL, read_blocks

if TYPE_CHECKING:
    from support.station import Command

    from birthmark.provisioning.station import Station

LINT = Path(__file__).parents[1] / "support" / "lint.py"


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI has to have {name}")
        pytest.skip(f"{name} is not installed")
    return found


@pytest.fixture
def issued(birthmark: Command, living: Station, tmp_path: Path) -> Path:
    """A folder with one PEM file each: device, revoked, service, broker, issuing, root, crl, root-crl."""
    folder = tmp_path / "issued"
    folder.mkdir()
    assert birthmark("issue-broker", "gw.example.com", "127.0.0.1", "--out", tmp_path / "gw").exit_code == 0
    assert birthmark("issue-operator", "alice", "--out", tmp_path / "alice").exit_code == 0
    for name in ("device", "revoked"):
        certificate_der = enrolled_row(living, name).certificate_der
        assert certificate_der is not None
        (folder / f"{name}.pem").write_bytes(pem_of(certificate_der))
    assert birthmark("revoke", "revoked", "--reason", "lost").exit_code == 0
    for name, source in (
        ("broker", tmp_path / "gw" / "server.pem"),
        ("service", tmp_path / "alice" / "alice.pem"),
    ):
        leaf = next(der for label, der in read_blocks(source.read_bytes()) if label == CERTIFICATE)
        (folder / f"{name}.pem").write_bytes(pem_of(leaf))
    for name in ("issuing", "root", "crl", "root-crl"):
        shutil.copy(living.folder / f"{name}.pem", folder)
    return folder


def lint(paths: list[Path]) -> list[dict[str, object]]:
    command = [sys.executable, str(LINT), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    *found, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert last == {"linted": len(paths)}
    return found


def test_pkilint_finds_nothing_in_what_is_issued_and_something_in_what_is_wrong(issued: Path) -> None:
    paths = []
    for path in sorted(issued.glob("*.pem")):
        ((label, der),) = read_blocks(path.read_bytes())
        paths.append(path.with_suffix(".crl" if label == CRL else ".crt"))
        paths[-1].write_bytes(der)
    wrong = issued / "wrong.crt"
    wrong.write_bytes(Pki.create().issuing.issue(cert_serial_der=b"\x02\x01\x00", authority_key_id=None).der)

    found = lint([*paths, wrong])

    assert {finding["file"] for finding in found} == {"wrong.crt"}, found


VERDICTS = [
    ("device", "client", True),
    ("service", "client", True),
    ("broker", "server", True),
    ("device", "server", False),
    ("service", "server", False),
    ("broker", "client", False),
    ("revoked", "client", False),
]


def verdict(folder: Path, command: list[str]) -> tuple[bool, str]:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode == 0, done.stdout + done.stderr


def test_openssl_says_the_right_thing(issued: Path) -> None:
    for name, purpose, is_good in VERDICTS:
        command = [tool("openssl"), "verify", "-x509_strict", "-crl_check_all", "-purpose", f"ssl{purpose}"]
        command += ["-CAfile", "root.pem", "-untrusted", "issuing.pem"]
        command += ["-CRLfile", "crl.pem", "-CRLfile", "root-crl.pem"]
        said, text = verdict(issued, [*command, f"{name}.pem"])
        assert said is is_good, (name, purpose, text)
    late = ["-attime", "4102444800"]  # in 2100
    said, text = verdict(issued, ["openssl", "verify", *late, "-CAfile", "root.pem", "root.pem"])
    assert not said
    assert "expired" in text


def test_gnutls_says_the_right_thing(issued: Path) -> None:
    chain, crls = issued / "chain.pem", issued / "crls.pem"
    crls.write_bytes((issued / "crl.pem").read_bytes() + (issued / "root-crl.pem").read_bytes())
    for name, purpose, is_good in VERDICTS:
        chain.write_bytes((issued / f"{name}.pem").read_bytes() + (issued / "issuing.pem").read_bytes())
        oid = "1.3.6.1.5.5.7.3.2" if purpose == "client" else "1.3.6.1.5.5.7.3.1"
        command = [tool("certtool"), "--verify", "--verify-profile", "high", "--verify-purpose", oid]
        command += ["--load-ca-certificate", "root.pem", "--load-crl", "crls.pem", "--infile", "chain.pem"]
        said, text = verdict(issued, command)
        assert said is is_good, (name, purpose, text)


def test_pycas_own_verifier_takes_devices_as_clients_and_the_broker_as_a_server(issued: Path) -> None:
    def load(name: str) -> x509.Certificate:
        return x509.load_pem_x509_certificate((issued / f"{name}.pem").read_bytes())

    builder = verification.PolicyBuilder().store(verification.Store([load("root")]))
    for name in ("device", "service"):
        builder.build_client_verifier().verify(load(name), [load("issuing")])
        with pytest.raises(verification.VerificationError):
            builder.build_server_verifier(x509.DNSName(name)).verify(load(name), [load("issuing")])
    builder.build_server_verifier(x509.DNSName("gw.example.com")).verify(load("broker"), [load("issuing")])
    with pytest.raises(verification.VerificationError):
        builder.build_client_verifier().verify(load("broker"), [load("issuing")])
