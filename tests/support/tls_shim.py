"""Plain MQTT on loopback in, mutual TLS out: for suites that know no certificates.

The gateway has no plain listener, and binds a client id to a certificate. The shim reads the client id out of the
CONNECT, takes the certificate of that name, and passes everything on as it is. It is no part of the product.

    with tls_shim(broker_port, identities) as port:
        ...  # any MQTT 3.1.1 client, without TLS, at 127.0.0.1:port
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from support.mqtt_client import client_context, packet, text
from support.patience import PATIENCE_S

from birthmark.device.errors import IdentityError
from birthmark.device.identity import DeviceId

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator
    from pathlib import Path

    from support.pki import Pki

MAX_CONNECT_BYTES = 1_048_576
NOBODY = "shim-nobody"
"""The device of clients that give no client id."""
SERVICE = "shim-service"
"""The service in whose name clients come whose ids no device can have: as `shim-service:the id`."""


@dataclass
class Identities:
    """Certificates by client id, issued when first asked for."""

    folder: Path
    pki: Pki
    _contexts: dict[str, ssl.SSLContext] = field(default_factory=dict)

    def for_client(self, client_id: str) -> tuple[ssl.SSLContext, str]:
        """Return the TLS context for a client, and the client id that it has at the gateway."""
        try:
            name = str(DeviceId(client_id)) if client_id else NOBODY
        except IdentityError:
            return self._context(SERVICE, "operator"), f"{SERVICE}:{client_id}"
        return self._context(name, "device"), client_id

    def _context(self, name: str, role: str) -> ssl.SSLContext:
        if name not in self._contexts:
            path = self.pki.issuing.device(name, role).write(self.folder / f"shim-{name}.pem")
            self._contexts[name] = client_context(path, self.folder / "root.pem")
        return self._contexts[name]


def split_connect(data: bytes) -> tuple[bytes, bytes] | None:
    """Part a CONNECT from what follows it; None as long as it is not whole. Raises `ValueError`: it is none."""
    length = shift = 0
    for position in range(1, 5):
        if position >= len(data):
            return None
        length |= (data[position] & 0x7F) << shift
        shift += 7
        if not data[position] & 0x80:
            end = position + 1 + length
            if data[0] != 0x10 or length > MAX_CONNECT_BYTES:
                raise ValueError("no CONNECT")
            return (data[position + 1 : end], data[end:]) if len(data) >= end else None
    raise ValueError("a remaining length of more than four bytes")


def client_id_of(body: bytes) -> tuple[int, str, int]:
    """Return where the client id of a CONNECT begins, what it is, and where it ends (MQTT 3.1.1 §3.1.3.1)."""
    begin = 2 + int.from_bytes(body[:2]) + 4
    end = begin + 2 + int.from_bytes(body[begin : begin + 2])
    return begin, body[begin + 2 : end].decode(), end


async def _serve(
    broker_port: int, identities: Identities, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    data, parts = b"", None
    while parts is None:
        data += await reader.read(65_536)
        if reader.at_eof():
            return
        parts = split_connect(data)
    body, rest = parts
    begin, asked, end = client_id_of(body)
    context, client_id = identities.for_client(asked)
    out = await asyncio.open_connection("127.0.0.1", broker_port, ssl=context, server_hostname="127.0.0.1")
    try:
        out[1].write(packet(0x10, body[:begin] + text(client_id) + body[end:]) + rest)
        ways = [asyncio.create_task(_pass_on(reader, out[1])), asyncio.create_task(_pass_on(out[0], writer))]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
    finally:
        # Without a goodbye from the client there is none from us: the gateway publishes its will.
        out[1].close()
        with contextlib.suppress(OSError):
            await out[1].wait_closed()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()


async def run_shim(broker_port: int, identities: Identities, port: int = 0) -> asyncio.Server:
    """Listen on loopback; return the server."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError, ValueError):
                await _serve(broker_port, identities, reader, writer)
        finally:  # when it is cancelled too
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    return await asyncio.start_server(accept, "127.0.0.1", port)


@contextmanager
def tls_shim(broker_port: int, identities: Identities, port: int = 0) -> Iterator[int]:
    """Run a shim in a thread; yields its port."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        server = asyncio.run_coroutine_threadsafe(run_shim(broker_port, identities, port), loop).result(PATIENCE_S)
        yield server.sockets[0].getsockname()[1]
        asyncio.run_coroutine_threadsafe(_stop(server), loop).result(PATIENCE_S)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE_S)
        loop.close()


async def _stop(server: asyncio.Server) -> None:
    server.close()
    connections = asyncio.all_tasks() - {asyncio.current_task()}
    for connection in connections:
        connection.cancel()
    await asyncio.gather(*connections, return_exceptions=True)
