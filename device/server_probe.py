"""Look at a broker's certificate without believing it, to explain why it was not believed.

OpenSSL tells that a certificate is expired or not yet valid, and then keeps its dates to itself. Asked again with
no verification, and without showing our own certificate, a TLS 1.3 server still sends its own: what a person needs
is the two times side by side. Nothing but a message is ever made of it.
"""

from __future__ import annotations

import socket
import ssl
from typing import TYPE_CHECKING

from birthmark.device.certificate_facts import CertificateFacts, certificate_facts
from birthmark.device.errors import CredentialError

if TYPE_CHECKING:
    from birthmark.device.credentials import BrokerAddress


def seen_at(broker: BrokerAddress, *, timeout_s: float) -> CertificateFacts | None:
    """Return what the certificate of `broker` says of itself, or None if it cannot be had."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with (
            socket.create_connection((broker.host, broker.port), timeout=timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=broker.host) as connection,
        ):
            certificate_der = connection.getpeercert(binary_form=True)
        return certificate_facts(certificate_der) if certificate_der else None
    except (OSError, ValueError, CredentialError):
        return None
