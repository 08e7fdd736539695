"""From any bytes to what is in them: certificates, requests and CRLs, PEM with several blocks or DER.

Rules:

- Whatever the bytes are, the answer is a list of objects or a `CredentialError`. No error quotes them.
- Private keys in a file are passed over, and never decoded.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography import x509

from birthmark.device.errors import CredentialError
from birthmark.device.pem import CERTIFICATE, CERTIFICATE_REQUEST, CRL, read_blocks
from birthmark.provisioning.inspection.certificate_rules import (
    InspectedCertificate,
    claim_of,
    common_name,
    rules_for,
)
from birthmark.provisioning.inspection.crl_rules import CRL_RULES, REQUEST_RULES, InspectedCrl, InspectedRequest
from birthmark.provisioning.inspection.model import UNREADABLE, Claim, Finding, findings_of, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

Readable = x509.Certificate | x509.CertificateRevocationList | x509.CertificateSigningRequest
_READERS: Final[dict[str, Callable[[bytes], Readable]]] = {
    CERTIFICATE: x509.load_der_x509_certificate,
    "X509 CERTIFICATE": x509.load_der_x509_certificate,
    "TRUSTED CERTIFICATE": x509.load_der_x509_certificate,
    CERTIFICATE_REQUEST: x509.load_der_x509_csr,
    "NEW CERTIFICATE REQUEST": x509.load_der_x509_csr,
    CRL: x509.load_der_x509_crl,
}
_WORDS: Final = {
    x509.Certificate: "certificate",
    x509.CertificateRevocationList: "CRL",
    x509.CertificateSigningRequest: "request",
}


@dataclass(frozen=True, slots=True)
class Inspected:
    """One object of a file, and what the profile says of it."""

    number: int
    """Which one of the file's, counted from 1."""
    what: Readable
    claim: Claim
    name: str
    """What it is about, fit to be shown: a CN, or a CRL's issuer."""
    findings: tuple[Finding, ...]

    @property
    def is_clean(self) -> bool:
        """Whether there is nothing at WARNING or above."""
        return not any(finding.severity.is_trouble for finding in self.findings)


def read_objects(content: bytes) -> list[Readable]:
    """Return every certificate, request and CRL in `content`, in their order.

    Raises:
        CredentialError: it is neither PEM nor DER of such, or holds none.
    """
    if b"-----BEGIN " not in content:
        return [_der(content)]
    found = [
        _loaded(_READERS[label], der, label.lower()) for label, der in read_blocks(content) if label in _READERS
    ]
    if not found:
        raise CredentialError(
            "could not inspect this: there is no certificate, request or CRL in it",
            hint="keys and bundles are not inspected; give the certificate",
        )
    return found


def inspect(number: int, what: Readable, now: datetime) -> Inspected:
    """Hold one object against the profile that it claims to be of."""
    with _quiet():
        return _inspected(number, what, now)


def _inspected(number: int, what: Readable, now: datetime) -> Inspected:
    if isinstance(what, x509.Certificate):
        claim, name = claim_of(what), common_name(what)
        findings = findings_of(rules_for(claim), InspectedCertificate(what, claim, now))
    elif isinstance(what, x509.CertificateRevocationList):
        claim, name = Claim.CRL, _name(lambda: what.issuer)
        findings = findings_of(CRL_RULES, InspectedCrl(what, now))
    else:
        claim, name = Claim.REQUEST, _name(lambda: what.subject)
        findings = findings_of(REQUEST_RULES, InspectedRequest(what))
    return Inspected(number, what, claim, name, tuple(findings))


def _der(content: bytes) -> Readable:
    for reader in (x509.load_der_x509_certificate, x509.load_der_x509_crl, x509.load_der_x509_csr):
        try:
            return _quietly(reader, content)
        except UNREADABLE:
            continue
    raise CredentialError(
        "could not inspect this: it is neither PEM nor the DER of a certificate, request or CRL",
        hint="is it the right file, and whole?",
    )


def _loaded(reader: Callable[[bytes], Readable], der: bytes, label: str) -> Readable:
    try:
        return _quietly(reader, der)
    except UNREADABLE as cause:
        raise CredentialError(
            f"could not inspect this: a block says {label}, and is none", hint="is the file whole?"
        ) from cause


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What the library will refuse some day, and warns of when it is read, is for the rules to find."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _quietly(reader: Callable[[bytes], Readable], der: bytes) -> Readable:
    with _quiet():
        return reader(der)


def _text(read: Callable[[], str]) -> str:
    try:
        return shown(read())
    except (x509.ExtensionNotFound, *UNREADABLE):
        return ""


def _name(read: Callable[[], x509.Name]) -> str:
    return _text(lambda: read().rfc4514_string())


def facts_of(inspected: Inspected) -> dict[str, object]:
    """Return what there is to say of an object beside what is wrong with it; every text fit to be shown."""
    with _quiet():
        return _facts_of(inspected)


def _facts_of(inspected: Inspected) -> dict[str, object]:
    what = inspected.what
    kind = next(word for kind, word in _WORDS.items() if isinstance(what, kind))
    facts: dict[str, object] = {"kind": kind, "profile": inspected.claim.value}
    if isinstance(what, x509.CertificateSigningRequest):
        facts["subject"] = inspected.name
        return facts
    facts["issuer"] = _name(lambda: what.issuer)
    if isinstance(what, x509.Certificate):
        facts["subject"] = _name(lambda: what.subject)
        facts["cert_serial"] = _text(lambda: f"{what.serial_number:x}")
        facts["not_before"] = _text(lambda: f"{what.not_valid_before_utc:%Y-%m-%dT%H:%M:%SZ}")
        facts["not_after"] = _text(lambda: f"{what.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}")
    else:
        facts["number"] = _text(
            lambda: str(what.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number)
        )
        facts["entries"] = len(what)
        facts["this_update"] = _text(lambda: f"{what.last_update_utc:%Y-%m-%dT%H:%M:%SZ}")
        facts["next_update"] = _text(
            lambda: f"{what.next_update_utc:%Y-%m-%dT%H:%M:%SZ}" if what.next_update_utc else ""
        )
    return facts
