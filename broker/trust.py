"""The trusted issuing CAs of the clients: the broker's anchors, for certificates and for CRLs alike.

Rules (RFC 5280 §4.2.1, §6.1; docs/certificate-profile.md):

- An anchor is an *issuing* CA. Trusting a root would admit every issuing CA below it, so nothing is ever
  accepted through one: a leaf and a CRL are signed by an anchor itself.
- Each is a CA with keyCertSign and cRLSign, a P-256 key and a subject key identifier; that identifier, in
  lower-case hex, is its name from then on. During a CA rollover there are two.
- Names are compared as the bytes they are encoded in.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec

from birthmark.device.errors import ConfigurationError, CredentialError
from birthmark.device.escape import escaped, quoted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime
    from pathlib import Path

# Whatever `cryptography` raises over an encoding it does not like (its warnings, where those are errors).
MALFORMED = (
    ValueError,
    TypeError,
    OverflowError,
    UserWarning,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
MAX_ISSUERS = 16
"""A rollover needs two; a gateway that serves several organisations a few more."""


@dataclass(frozen=True, slots=True)
class Issuer:
    """One trusted issuing CA."""

    key_id: str
    """Its subject key identifier in lower-case hex."""
    name: str
    """Its subject, fit for a log."""
    subject_der: bytes
    certificate: x509.Certificate
    public_key: ec.EllipticCurvePublicKey
    not_before: datetime
    not_after: datetime


class Trust:
    """The set of trusted issuing CAs."""

    def __init__(self, issuers: tuple[Issuer, ...]) -> None:
        self._by_key_id = {issuer.key_id: issuer for issuer in issuers}

    @classmethod
    def from_pem(cls, pem: bytes) -> Trust:
        """Read one or more PEM certificates.

        Raises:
            CredentialError: there is none, or one cannot be an issuing CA.
        """
        try:
            certificates = x509.load_pem_x509_certificates(pem)
        except MALFORMED as error:
            raise CredentialError(
                "could not read the clients' issuing CAs: no PEM certificates in the file",
                hint="`birthmark issue-broker` writes clients-ca.pem beside server.pem",
            ) from error
        if len(certificates) > MAX_ISSUERS:
            raise CredentialError(f"could not use the clients' issuing CAs: more than {MAX_ISSUERS} certificates")
        issuers: dict[str, Issuer] = {}
        for certificate in certificates:
            issuer = _issuer(certificate)
            known = issuers.setdefault(issuer.key_id, issuer)
            if known.certificate != certificate:
                raise _unfit(issuer.name, "another certificate in the file has the same key")
        return cls(tuple(issuers.values()))

    def __iter__(self) -> Iterator[Issuer]:
        return iter(self._by_key_id.values())

    def __len__(self) -> int:
        return len(self._by_key_id)

    def has(self, key_id: str) -> bool:
        """Whether the issuing CA with this key identifier, in hex, is trusted."""
        return key_id in self._by_key_id

    def __getitem__(self, key_id: str) -> Issuer:
        """Return the issuing CA with this key identifier, in hex; it is one of them."""
        return self._by_key_id[key_id]

    def get(self, key_id: bytes) -> Issuer | None:
        """Return the issuing CA with this key identifier."""
        return self._by_key_id.get(key_id.hex())


def read_trust(path: Path) -> Trust:
    """Read the trusted issuing CAs from a PEM file.

    Raises:
        ConfigurationError: the file is not there, or not readable.
        CredentialError: it holds no issuing CAs.
    """
    try:
        return Trust.from_pem(path.read_bytes())
    except CredentialError as error:
        raise CredentialError(f"{error.message} ({path})", error.hint) from error
    except OSError as error:
        raise ConfigurationError(
            f"could not read the clients' issuing CAs in {path}: {error.strerror or error}",
            hint="`birthmark issue-broker` writes clients-ca.pem beside server.pem",
        ) from error


def name_text(name: x509.Name) -> str:
    """Return a distinguished name in printable ASCII."""
    return escaped(name.rfc4514_string())


def quoted_name(name: x509.Name) -> str:
    """Return a distinguished name in printable ASCII, between quotes."""
    return quoted(name.rfc4514_string())


def _issuer(certificate: x509.Certificate) -> Issuer:
    try:
        with warnings.catch_warnings():
            # A name of an odd length is no reason to write to stderr: what counts is compared as bytes.
            warnings.simplefilter("ignore")
            name = name_text(certificate.subject)
            subject_der = certificate.subject.public_bytes()
            public_key = certificate.public_key()
            constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
            usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
            key_id = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    except x509.ExtensionNotFound as error:
        raise _unfit(name, f"it has no {error.oid._name}") from error
    except MALFORMED as error:
        raise CredentialError("could not use an issuing CA of the clients: it is malformed") from error
    if not constraints.ca:
        raise _unfit(name, "it is no CA")
    if not (usage.key_cert_sign and usage.crl_sign):
        raise _unfit(name, "its keyUsage lacks keyCertSign or cRLSign")
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or not isinstance(public_key.curve, ec.SECP256R1):
        raise _unfit(name, "its key is not on P-256")
    return Issuer(
        key_id=key_id.hex(),
        name=name,
        subject_der=subject_der,
        certificate=certificate,
        public_key=public_key,
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
    )


def _unfit(name: str, cause: str) -> CredentialError:
    return CredentialError(
        f"could not trust '{name}' as an issuing CA of the clients: {cause}",
        hint="clients-ca.pem holds issuing CAs only; `birthmark issue-broker` writes it",
    )
