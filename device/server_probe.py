"""Look at a broker's certificate without believing it, to explain why it was not believed.

OpenSSL tells that a certificate is expired or not yet valid, and then keeps its dates to itself. Asked again with
no verification, and without showing our own certificate, a TLS 1.3 server still sends its own: what a person needs
is the two times side by side. Nothing but a message is ever made of it.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from birthmark.device.certificate_facts import CertificateFacts, certificate_facts
from birthmark.device.dialling import dial
from birthmark.device.errors import CredentialError
from birthmark.device.frozen import Frozen

if TYPE_CHECKING:
    from birthmark.device.credentials import BrokerAddress


class Seen(Frozen):
    """What a server shows to somebody without a certificate."""

    tls_version: str
    cipher: str
    facts: CertificateFacts | None
    """Of its certificate; None if it cannot be read."""


def probed(broker: BrokerAddress, *, timeout_s: float) -> Seen:
    """Return what `broker` shows of itself.

    Raises:
        OSError, UnicodeError: it cannot be reached, or ends the handshake.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with (
        dial(broker.host, broker.port, timeout_s=timeout_s) as plain,
        context.wrap_socket(plain, server_hostname=broker.host) as connection,
    ):
        certificate_der = connection.getpeercert(binary_form=True)
        cipher = connection.cipher()
        try:
            facts = certificate_facts(certificate_der) if certificate_der else None
        except CredentialError:
            facts = None
        return Seen(connection.version() or "", cipher[0] if cipher else "", facts)


def seen_at(broker: BrokerAddress, *, timeout_s: float) -> CertificateFacts | None:
    """Return what the certificate of `broker` says of itself, or None if it cannot be had."""
    try:
        return probed(broker, timeout_s=timeout_s).facts
    except (OSError, ValueError):
        return None
