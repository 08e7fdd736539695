"""The broker's TLS: what is asked of a client, and why a handshake failed, in plain words.

Rules (draft-ietf-uta-tls13-iot-profile, RFC 9325):

- A client certificate is required, by a chain that ends in one of the trusted *issuing* CAs: they are the only
  anchors (`VERIFY_X509_PARTIAL_CHAIN`), since trusting the root would admit every CA below it.
- TLS 1.2 or newer; for 1.2, ECDHE with ECDSA and AEAD suites only. No compression, no renegotiation.
- The broker's key is in a file of its owner alone; one that group or others may read is not used.
- One session ticket, so that a device resumes cheaply. OpenSSL does not look at the certificate of a resumed
  session again, and has no CRL here: the broker itself judges the leaf after every handshake (`peer.py`).
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from birthmark.device.errors import ConfigurationError
from birthmark.device.escape import escaped

if TYPE_CHECKING:
    from pathlib import Path

TLS12_SUITES = "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-ECDSA-CHACHA20-POLY1305"
X509_V_FLAG_NO_CHECK_TIME = 0x200000
"""OpenSSL's x509_vfy.h; for the renewal listener's context, and never for the other."""
_OTHERS = 0o077
_CREDENTIALS_HINT = "it holds the broker's key, certificate and chain: birthmark issue-broker HOST"


def renewal_context(credentials_path: Path, clients_ca_path: Path) -> ssl.SSLContext:
    """Make the renewal listener's context: as `server_context`, but OpenSSL looks at no validity.

    The broker itself does, after every handshake (`peer.py`): of the issuing CA as ever, of the leaf with a grace.
    """
    context = server_context(credentials_path, clients_ca_path)
    context.verify_flags |= X509_V_FLAG_NO_CHECK_TIME
    return context


def server_context(credentials_path: Path, clients_ca_path: Path) -> ssl.SSLContext:
    """Make the listener's context from the broker's own PEM file (key, leaf, chain) and the issuing CAs' PEM.

    Raises:
        ConfigurationError: one of the files is missing, unreadable or not what it should be.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(TLS12_SUITES)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VERIFY_X509_STRICT
    context.num_tickets = 1
    try:
        # No passphrase is ever asked for: a broker that starts at boot has nobody to ask.
        context.load_cert_chain(credentials_path, password=_no_passphrase)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"could not use {credentials_path} as the broker's credentials: {_cause(error)}",
            hint=_CREDENTIALS_HINT,
        ) from error
    _check_mode(credentials_path)
    _check_purpose(credentials_path)
    try:
        context.load_verify_locations(cafile=clients_ca_path)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"could not use {clients_ca_path} as the clients' issuing CAs: {_cause(error)}",
            hint="it holds the issuing CAs' certificates in PEM; `birthmark issue-broker` writes it",
        ) from error
    return context


def _check_mode(credentials_path: Path) -> None:
    """Refuse a private key that others than the broker's user may read: whoever has it can stand in its place."""
    try:
        mode = credentials_path.stat().st_mode
    except OSError as error:  # it was there a moment ago
        raise ConfigurationError(
            f"could not use {credentials_path} as the broker's credentials: {_cause(error)}",
            hint=_CREDENTIALS_HINT,
        ) from error
    if mode & _OTHERS:
        raise ConfigurationError(
            f"could not use the key in {credentials_path}: others than its owner may read it",
            hint=f"chmod 600 {credentials_path}",
        )


def _check_purpose(credentials_path: Path) -> None:
    """Refuse a certificate that no client would accept as a server's: it would listen, and let nobody in."""
    try:
        leaf = x509.load_pem_x509_certificates(credentials_path.read_bytes())[0]
        found = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    except (x509.ExtensionNotFound, OSError, ValueError):
        return  # OpenSSL has taken it; what it says about purposes, if anything, the clients will judge
    if ExtendedKeyUsageOID.SERVER_AUTH not in found.value:
        raise ConfigurationError(
            f"could not use {credentials_path} as the broker's credentials: its certificate is not a server's"
            " (extended key usage serverAuth)",
            hint=_CREDENTIALS_HINT,
        )


def _no_passphrase() -> str:
    raise ValueError("its key is encrypted")


def _cause(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        if error.reason is None:  # the file ended before all that is needed was found
            return "it holds no PEM of a key and its certificate"
        return {
            "KEY_VALUES_MISMATCH": "the key is not the certificate's",
            "NO_START_LINE": "it holds no PEM of the kind expected",
            "NO_CERTIFICATE_OR_CRL_FOUND": "it holds no certificate",
        }.get(error.reason or "", escaped(error.reason or str(error)))
    if isinstance(error, OSError):
        return error.strerror or escaped(str(error))
    return escaped(str(error))


# X.509 verification results (OpenSSL's x509_vfy.h) that a field engineer meets, and what to do about each.
_VERIFICATION: dict[int, tuple[str, str]] = {
    2: ("issuer unknown", "its issuing CA is not among clients_ca"),
    7: ("signature invalid", "the certificate was changed, or forged in the name of a trusted CA"),
    9: ("certificate not yet valid", "compare the broker's clock with the certificate's notBefore"),
    10: ("certificate expired", "renew it, or compare the broker's clock with its notAfter"),
    18: ("self-signed certificate", "the client must show a certificate issued by birthmark"),
    19: ("self-signed certificate in the chain", "its root is not trusted; add the issuing CA to clients_ca"),
    20: ("issuer unknown", "its issuing CA is not among clients_ca"),
    21: ("issuer unknown", "its issuing CA is not among clients_ca"),
    26: ("wrong purpose", "the certificate is not for TLS clients (extended key usage clientAuth)"),
}

# Reasons of OpenSSL's own errors.
_HANDSHAKE: dict[str, tuple[str, str]] = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": ("no client certificate", "the client must show its certificate"),
    "UNSUPPORTED_PROTOCOL": ("TLS version too old", "the client must speak TLS 1.2 or newer"),
    "UNKNOWN_PROTOCOL": ("TLS version too old", "the client must speak TLS 1.2 or newer"),
    "VERSION_TOO_LOW": ("TLS version too old", "the client must speak TLS 1.2 or newer"),
    "NO_SHARED_CIPHER": ("no cipher suite in common", "TLS 1.2 clients need ECDHE-ECDSA with AES-GCM or ChaCha20"),
    "WRONG_VERSION_NUMBER": ("not TLS", "the client speaks without TLS; this port takes MQTT over TLS only"),
    "HTTP_REQUEST": ("not TLS but HTTP", "this port takes MQTT over TLS only"),
    "PACKET_LENGTH_TOO_LONG": ("not TLS", "the client speaks without TLS; this port takes MQTT over TLS only"),
    "RECORD_LAYER_FAILURE": ("not TLS", "the client speaks without TLS; this port takes MQTT over TLS only"),
    "TLSV1_ALERT_UNKNOWN_CA": ("refused by the client", "the client does not trust this broker's CA"),
    "SSLV3_ALERT_BAD_CERTIFICATE": ("refused by the client", "the client found this broker's certificate bad"),
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": (
        "refused by the client",
        "the client refused this broker's certificate: host name, clock, or CA",
    ),
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": (
        "refused by the client",
        "this broker's certificate has expired by the client's clock",
    ),
}


def handshake_failure(error: Exception) -> tuple[str, str]:
    """Return which check failed, and a hint, for an error that a handshake ended with."""
    if isinstance(error, ssl.SSLCertVerificationError):
        known = _VERIFICATION.get(error.verify_code)
        return known or (f"certificate refused: {escaped(error.verify_message)}", "see the certificate profile")
    if isinstance(error, ssl.SSLEOFError | ConnectionError | ssl.SSLZeroReturnError):
        return "closed by the client", "it gave up during the handshake: a port scan, or it refuses this broker"
    if isinstance(error, ssl.SSLError):
        reason = error.reason or "unknown"
        return _HANDSHAKE.get(reason, (f"TLS error {escaped(reason)}", ""))
    return escaped(str(error)), ""
