"""What a mutual TLS 1.3 handshake costs both ends, and the wire: P-256, RSA-2048, and a resumed session.

In memory, without sockets, so that nothing else is counted: OpenSSL with the broker's own settings and a client's,
certificates by the profile, or of the same shape with RSA keys.
"""

from __future__ import annotations

import secrets
import ssl
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from bench.fleet_pki import client_context
from bench.report import Figure
from birthmark.broker.tls import server_context

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from bench.fleet_pki import FleetPki

SECTION: Final = "Handshakes"
P256, RSA, RESUMED = "P-256", "RSA-2048", "P-256, resumed"
HANDSHAKES: Final = 100
"""Of each kind in a round."""


def figures(pki: FleetPki, rounds: int, say: Callable[[str], None]) -> Iterator[Figure]:
    """Measure."""
    server = server_context(pki.folder / "server.pem", pki.folder / "clients-ca.pem")
    client = client_context(pki.folder, pki.client("con-00000"))
    rsa_server, rsa_client = _rsa_contexts(pki.folder)
    units = {"bytes on the wire": "bytes", "server's CPU": "us", "client's CPU": "us"}
    values: dict[str, dict[str, list[float]]] = {what: {P256: [], RSA: [], RESUMED: []} for what in units}
    for number in range(rounds):
        say(f"handshakes, round {number + 1} of {rounds}")
        for kind, at_server, at_client in ((P256, server, client), (RSA, rsa_server, rsa_client)):
            for what, value in zip(units, _mean(at_server, at_client, None), strict=True):
                values[what][kind].append(value)
        _, _, _, session = _shake(server, client, None)
        for what, value in zip(units, _mean(server, client, session), strict=True):
            values[what][RESUMED].append(value)
    for what, unit in units.items():
        for reference in (RSA, RESUMED):
            shown = {P256: values[what][P256], reference: values[what][reference]}
            ours, other = (P256, RSA) if reference == RSA else (RESUMED, P256)
            yield Figure(SECTION, f"{what}, {ours}", unit, shown, ours=ours, reference=other)


def _mean(
    server: ssl.SSLContext, client: ssl.SSLContext, session: ssl.SSLSession | None
) -> tuple[float, float, float]:
    wire_bytes = server_us = client_us = 0.0
    for _ in range(HANDSHAKES):
        crossed, at_server, at_client, _ = _shake(server, client, session)
        wire_bytes += crossed / HANDSHAKES
        server_us += at_server / 1000 / HANDSHAKES
        client_us += at_client / 1000 / HANDSHAKES
    return wire_bytes, server_us, client_us


def _shake(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext, session: ssl.SSLSession | None
) -> tuple[int, int, int, ssl.SSLSession | None]:
    """Shake hands once, with the ticket and an octet; bytes, the server's and the client's ns, the session."""
    to_server, from_server, to_client, from_client = (ssl.MemoryBIO() for _ in range(4))
    server = server_context.wrap_bio(to_server, from_server, server_side=True)
    client = client_context.wrap_bio(to_client, from_client, server_hostname="localhost", session=session)
    spent_ns, crossed, open_ends = [0, 0], 0, {0, 1}
    ends = ((server, from_server, to_client), (client, from_client, to_server))
    while open_ends:
        for number in (1, 0):
            end, says, heard_by = ends[number]
            if number in open_ends:
                begun_ns = time.thread_time_ns()
                try:
                    end.do_handshake()
                    open_ends.discard(number)
                except ssl.SSLWantReadError:
                    pass
                spent_ns[number] += time.thread_time_ns() - begun_ns
            crossed += heard_by.write(says.read())
    server.write(b"\0")
    crossed += to_client.write(from_server.read())
    client.read(1)
    if session is not None and not client.session_reused:
        raise RuntimeError("the session was not resumed")
    return crossed, spent_ns[0], spent_ns[1], client.session


def _rsa_contexts(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return a server's and a client's context, with the profile's shape on RSA-2048."""
    now = datetime.now(UTC)
    ca_key = generate_private_key(65_537, 2_048)
    ca_name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Bench"),
            x509.NameAttribute(NameOID.COMMON_NAME, "birthmark issuing CA 0123abcd"),
        ]
    )
    contexts = []
    ca_path = folder / "rsa-ca.pem"
    for protocol, name in ((ssl.PROTOCOL_TLS_SERVER, "localhost"), (ssl.PROTOCOL_TLS_CLIENT, "con-00000")):
        like = x509.load_pem_x509_certificates((folder / _like(protocol)).read_bytes())[0]
        key = generate_private_key(65_537, 2_048)
        extensions = [extension for extension in like.extensions if extension.oid not in _KEY_IDS]
        builder = x509.CertificateBuilder(
            ca_name, like.subject, key.public_key(), _cert_serial(), extensions=extensions
        )
        builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=30))
        builder = builder.add_extension(
            x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
        )
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        leaf = builder.sign(ca_key, SHA256())
        path = folder / f"rsa-{name}.pem"
        path.touch(mode=0o600)
        if not ca_path.exists():
            ca = x509.CertificateBuilder(ca_name, ca_name, ca_key.public_key(), _cert_serial())
            ca = ca.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=30))
            ca = ca.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            ca = ca.add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
            ca_path.write_bytes(ca.sign(ca_key, SHA256()).public_bytes(Encoding.PEM))
        key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        path.write_bytes(key_pem + leaf.public_bytes(Encoding.PEM) + ca_path.read_bytes())
        context = ssl.SSLContext(protocol)
        context.verify_mode = ssl.CERT_REQUIRED
        if protocol is ssl.PROTOCOL_TLS_SERVER:
            context.num_tickets = 1
        context.load_cert_chain(path)
        context.load_verify_locations(ca_path)
        contexts.append(context)
    return contexts[0], contexts[1]


_KEY_IDS: Final = (x509.SubjectKeyIdentifier.oid, x509.AuthorityKeyIdentifier.oid)


def _like(protocol: ssl._SSLMethod) -> str:
    return "server.pem" if protocol is ssl.PROTOCOL_TLS_SERVER else "con-00000.pem"


def _cert_serial() -> int:
    return int.from_bytes(b"\x40" + secrets.token_bytes(19), "big")
