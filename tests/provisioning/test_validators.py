"""What the station issues before other people's linters and validators: every verdict, and why.

A validator that refuses for a reason of its own (an option misspelt, a file missing) would pass for one that is
right. So each refusal here is held to the error that the validator names, and each row differs from one that the
same validator takes with the same options.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.x509 import verification
from support.patience import PATIENCE_S
from support.pki import Pki
from support.programs import program
from support.station import Command
from support.validated import KINDS, make_files

from birthmark.device.pem import CRL, read_blocks
from birthmark.provisioning.inspection.model import Claim

if TYPE_CHECKING:
    from collections.abc import Sequence

LINT = Path(__file__).parents[1] / "support" / "lint.py"
GOOD_CRLS = ("crl", "root-crl")
IN_2100 = "4102444800"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stations and the folder `files`: see `make_files`."""
    folder = tmp_path_factory.mktemp("validated")
    make_files(folder)
    return folder


@pytest.fixture
def files(world: Path) -> Path:
    return world / "files"


def own_purpose(kind: str) -> str:
    return "server" if kind == "broker" else "client"


def other_purpose(kind: str) -> str:
    return "client" if kind == "broker" else "server"


# pkilint


def lint(paths: Sequence[Path]) -> list[dict[str, object]]:
    command = [sys.executable, str(LINT), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    *found, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert last == {"linted": len(paths)}
    return found


def test_pkilint_finds_nothing_in_what_is_issued_and_something_in_what_is_wrong(
    files: Path, tmp_path: Path
) -> None:
    issued = [f"{kind}-{state}" for kind in KINDS for state in ("good", "expired", "early", "revoked")]
    issued += ["issuing", "root", "ended-issuing", "ended-root"]
    issued += ["crl", "root-crl", "crl-expired", "root-crl-expired", "root-crl-retired"]
    paths = []
    for name in issued:
        ((label, der),) = read_blocks((files / f"{name}.pem").read_bytes())
        paths.append(tmp_path / f"{name}.{'crl' if label == CRL else 'crt'}")
        paths[-1].write_bytes(der)
    wrong = tmp_path / "wrong.crt"
    wrong.write_bytes(Pki.create().issuing.issue(cert_serial_der=b"\x02\x01\x00", authority_key_id=None).der)

    found = lint([*paths, wrong])

    assert {finding["file"] for finding in found} == {"wrong.crt"}, found


# OpenSSL: the errors are those of openssl-verification-options(1), as `number at depth`.

OPENSSL_LEAVES = {
    **{(f"{kind}-good", own_purpose(kind)): set[str]() for kind in KINDS},
    **{(f"{kind}-expired", own_purpose(kind)): {"10 at 0"} for kind in KINDS},
    **{(f"{kind}-early", own_purpose(kind)): {"9 at 0"} for kind in KINDS},
    **{(f"{kind}-revoked", own_purpose(kind)): {"23 at 0"} for kind in KINDS},
    **{(f"{kind}-good", other_purpose(kind)): {"26 at 0"} for kind in KINDS},
    ("issuing", "client"): {"26 at 0"},
    ("issuing", "server"): {"26 at 0"},
}


def openssl(
    files: Path,
    name: str,
    purpose: str,
    crls: Sequence[str] = GOOD_CRLS,
    *options: str,
    root: str = "root",
) -> set[str]:
    """Return the errors that `openssl verify` names; it says OK exactly where it names none."""
    command = [program("openssl"), "verify", "-x509_strict", "-crl_check_all", "-purpose", purpose]
    command += ["-CAfile", f"{root}.pem", "-untrusted", "issuing.pem", *options]
    command += [word for crl in crls for word in ("-CRLfile", f"{crl}.pem")]
    done = subprocess.run(
        [*command, f"{name}.pem"], cwd=files, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    errors = set(re.findall(r"^error (\d+ at \d+) depth lookup", done.stderr, re.MULTILINE))
    assert (done.stdout == f"{name}.pem: OK\n") is (done.returncode == 0) is (not errors), done
    return errors


@pytest.mark.parametrize(("name", "purpose"), OPENSSL_LEAVES)
def test_openssl_gives_the_right_reason_for_a_certificate(files: Path, name: str, purpose: str) -> None:
    assert openssl(files, name, f"ssl{purpose}") == OPENSSL_LEAVES[name, purpose]


def test_openssl_takes_the_issuing_ca_and_refuses_it_expired_retired_or_beyond_its_path(files: Path) -> None:
    assert openssl(files, "issuing", "crlsign") == set()
    assert openssl(files, "issuing", "crlsign", GOOD_CRLS, "-attime", IN_2100) >= {"10 at 0"}
    assert openssl(files, "ended-issuing", "crlsign", ["ended-root-crl"], root="ended-root") == {"10 at 0"}
    assert openssl(files, "issuing", "crlsign", ["root-crl-retired"]) == {"23 at 0"}
    assert openssl(files, "device-good", "sslclient", ["crl", "root-crl-retired"]) == {"23 at 1"}
    # A CA that the issuing CA has signed, and a device as a CA: invalid CA, path length.
    assert openssl(files, "climbed", "sslclient", GOOD_CRLS, "-untrusted", "climber-ca.pem") >= {"25 at 2"}
    assert openssl(files, "beneath", "sslclient", GOOD_CRLS, "-untrusted", "climber-device.pem") >= {"79 at 1"}


def test_openssl_refuses_a_crl_that_is_expired_foreign_or_forged(files: Path) -> None:
    for crls, errors in (
        (GOOD_CRLS, set[str]()),
        (("crl-expired", "root-crl"), {"12 at 0"}),
        (("crl", "root-crl-expired"), {"12 at 1", "12 at 2"}),
        (("crl-foreign", "root-crl"), {"3 at 0"}),
        (("crl-forged", "root-crl"), {"8 at 0"}),
    ):
        assert openssl(files, "device-good", "sslclient", crls) == errors, crls


# GnuTLS: the sentences of gnutls_certificate_verification_status_print(3). It needs no CRL of a chain, and goes by
# one that has ended as far as it goes; so CRLs are put to `certtool --verify-crl`.

TRUSTED = "The certificate is trusted."
PURPOSES = {"client": "1.3.6.1.5.5.7.3.2", "server": "1.3.6.1.5.5.7.3.1"}
GNUTLS_LEAVES = {
    **{(f"{kind}-good", own_purpose(kind)): TRUSTED for kind in KINDS},
    **{(f"{kind}-expired", own_purpose(kind)): "chain uses expired certificate." for kind in KINDS},
    **{(f"{kind}-early", own_purpose(kind)): "chain uses not yet valid certificate." for kind in KINDS},
    **{(f"{kind}-revoked", own_purpose(kind)): "chain is revoked." for kind in KINDS},
    **{(f"{kind}-good", other_purpose(kind)): "chain does not match the intended purpose." for kind in KINDS},
}


def certtool(files: Path, command: list[str], content: str) -> str:
    """Return GnuTLS's last sentence; it calls verified exactly what it trusts."""
    done = subprocess.run(
        [program("certtool", "gnutls-bin"), *command],
        cwd=files,
        input=content,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    said = [line for line in (done.stdout + done.stderr).splitlines() if "erification output: " in line]
    assert len(said) == 1, done
    is_trusted = said[0].strip().endswith(f" Verified. {TRUSTED}")
    assert (done.returncode == 0) is is_trusted, done
    return said[0].strip()


def gnutls(
    files: Path,
    names: Sequence[str],
    purpose: str | None = None,
    crls: Sequence[str] = GOOD_CRLS,
    *,
    root: str = "root",
    scratch: Path,
) -> str:
    kept = scratch / "crls.pem"
    kept.write_bytes(b"".join((files / f"{crl}.pem").read_bytes() for crl in crls))
    command = ["--verify", "--verify-profile", "high", "--load-ca-certificate", f"{root}.pem"]
    command += ["--load-crl", str(kept)]
    command += ["--verify-purpose", PURPOSES[purpose]] if purpose else []
    return certtool(files, command, "".join((files / f"{name}.pem").read_text() for name in names))


@pytest.mark.parametrize(("name", "purpose"), GNUTLS_LEAVES)
def test_gnutls_gives_the_right_reason_for_a_certificate(
    files: Path, tmp_path: Path, name: str, purpose: str
) -> None:
    said = gnutls(files, [name, "issuing"], purpose, scratch=tmp_path)

    assert said.endswith(GNUTLS_LEAVES[name, purpose]), said


def test_gnutls_takes_the_issuing_ca_and_refuses_it_expired_retired_or_beyond_its_path(
    files: Path, tmp_path: Path
) -> None:
    retired = ["root-crl-retired"]
    for said, reason in (
        (gnutls(files, ["issuing"], scratch=tmp_path), TRUSTED),
        (
            gnutls(files, ["ended-issuing"], None, ["ended-root-crl"], root="ended-root", scratch=tmp_path),
            "chain uses expired certificate.",
        ),
        (gnutls(files, ["issuing"], None, retired, scratch=tmp_path), "chain is revoked."),
        (gnutls(files, ["device-good", "issuing"], "client", retired, scratch=tmp_path), "chain is revoked."),
        (
            gnutls(files, ["climbed", "climber-ca", "issuing"], "client", scratch=tmp_path),
            "violates the signer's constraints.",
        ),
        (
            gnutls(files, ["beneath", "climber-device", "issuing"], "client", scratch=tmp_path),
            "violates the signer's constraints.",
        ),
    ):
        assert said.endswith(reason), (said, reason)


def test_gnutls_refuses_a_crl_that_is_expired_foreign_or_forged(files: Path) -> None:
    for name, issuer, reason in (
        ("crl", "issuing", TRUSTED),
        ("root-crl", "root", TRUSTED),
        ("root-crl-retired", "root", TRUSTED),
        ("crl-expired", "issuing", "The revocation or OCSP data are old and have been superseded."),
        ("root-crl-expired", "root", "The revocation or OCSP data are old and have been superseded."),
        ("crl-foreign", "issuing", "The certificate issuer is unknown."),
        ("crl-forged", "issuing", "The signature in the certificate is invalid."),
    ):
        command = ["--verify-crl", "--load-ca-certificate", f"{issuer}.pem"]
        said = certtool(files, command, (files / f"{name}.pem").read_text())
        assert said.endswith(reason), (name, said)


# pyca's verifier: it knows chains, times and purposes; CRLs are looked up by who uses it.

NO_TIME = "cert is not valid at validation time"
CLIENTS = ("device", "service")
PYCA: list[tuple[list[str], str, str | None]] = [
    *(([f"{kind}-good", "issuing"], "", None) for kind in CLIENTS),
    *(([f"{kind}-{state}", "issuing"], "", NO_TIME) for kind in CLIENTS for state in ("expired", "early")),
    # A client's name is a directory name, and no host's.
    *(([f"{kind}-good", "issuing"], f"good-{kind}", "no matching subjectAltName") for kind in CLIENTS),
    (["broker-good", "issuing"], "good-broker.example.com", None),
    (["broker-expired", "issuing"], "expired-broker.example.com", NO_TIME),
    (["broker-early", "issuing"], "early-broker.example.com", NO_TIME),
    (["broker-good", "issuing"], "", "required EKU not found"),
    (["broker-good", "issuing"], "other.example.com", "no matching subjectAltName"),
    (["issuing"], "", "basicConstraints.cA must not be asserted"),
    (["climbed", "climber-ca", "issuing"], "", "path length constraint violated"),
    (["beneath", "climber-device", "issuing"], "", "basicConstraints.cA must be asserted in a CA"),
]  # fmt: skip


def load(files: Path, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((files / f"{name}.pem").read_bytes())


@pytest.mark.parametrize(("names", "host", "reason"), PYCA)
def test_pycas_verifier_gives_the_right_reason(
    files: Path, names: list[str], host: str, reason: str | None
) -> None:
    builder = verification.PolicyBuilder().store(verification.Store([load(files, "root")]))
    leaf, *chain = [load(files, name) for name in names]

    def verify() -> None:
        if host:
            builder.build_server_verifier(x509.DNSName(host)).verify(leaf, chain)
        else:
            builder.build_client_verifier().verify(leaf, chain)

    if reason is None:
        verify()
    else:
        with pytest.raises(verification.VerificationError, match=re.escape(reason)):
            verify()


def test_pyca_finds_what_is_revoked_on_the_crls_and_knows_whose_they_are(files: Path) -> None:
    def crl(name: str) -> x509.CertificateRevocationList:
        return x509.load_pem_x509_crl((files / f"{name}.pem").read_bytes())

    serials = {entry.serial_number for entry in crl("crl")}
    assert serials == {load(files, f"{kind}-revoked").serial_number for kind in KINDS}
    assert [entry.serial_number for entry in crl("root-crl-retired")] == [load(files, "issuing").serial_number]
    assert list(crl("root-crl")) == []
    for name, issuer, is_its in (
        ("crl", "issuing", True),
        ("crl-expired", "issuing", True),
        ("crl-foreign", "issuing", False),
        ("crl-forged", "issuing", False),
        ("root-crl", "root", True),
        ("root-crl-retired", "root", True),
    ):
        key = load(files, issuer).public_key()
        assert crl(name).is_signature_valid(key) is is_its, name  # type: ignore[arg-type]


# birthmark inspect agrees with all of them.

INSPECTED: list[tuple[str, str, str]] = [
    *((f"{kind}-good", kind, "") for kind in KINDS),
    *((f"{kind}-expired", kind, "validity") for kind in KINDS),
    *((f"{kind}-early", kind, "validity") for kind in KINDS),
    *((f"{kind}-revoked", kind, "revoked") for kind in KINDS),
    ("issuing", Claim.ISSUING, ""),
    ("root", Claim.ROOT, ""),
    ("climber-ca", Claim.ISSUING, "path-length"),
    ("unrecorded-ca", Claim.ISSUING, "recorded"),
    ("climbed", Claim.DEVICE, "issuer"),
    ("beneath", Claim.DEVICE, "issuer"),
    ("crl", Claim.CRL, ""),
    ("root-crl", Claim.CRL, ""),
    ("root-crl-retired", Claim.CRL, ""),
    ("crl-expired", Claim.CRL, "next-update"),
    ("crl-foreign", Claim.CRL, "issuer"),
    ("crl-forged", Claim.CRL, "signature"),
]


def test_inspect_agrees_with_the_validators(world: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    birthmark = Command(world / "station", capsys)

    answer = birthmark("inspect", *(files / f"{name}.pem" for name, _, _ in INSPECTED), "--json")

    found = [
        (record["profile"], " ".join(sorted(finding["rule"] for finding in record["findings"])))
        for record in answer.records
    ]
    assert found == [(str(claim), rules) for _, claim, rules in INSPECTED]
    assert answer.exit_code == 1


def test_inspect_knows_a_ca_that_has_ended_a_ca_beyond_its_path_and_a_device_as_a_ca(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    birthmark = Command(files, capsys)

    for name, issuer, rules in (
        ("ended-issuing", "ended-root", ["validity"]),
        ("climber-ca", "issuing", ["path-length"]),
        ("climbed", "climber-ca", []),
        ("beneath", "climber-device", ["issuer"]),
    ):
        answer = birthmark("inspect", files / f"{name}.pem", "--issuer", files / f"{issuer}.pem", "--json")
        assert [finding["rule"] for finding in answer.records[0]["findings"]] == rules, name
