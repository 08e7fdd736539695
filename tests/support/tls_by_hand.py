"""A TLS client whose records a test holds in its hand: to send half of one, or an alert when it likes."""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import TYPE_CHECKING, Self, TypeVar

from support.patience import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class TlsByHand:
    """A client after its handshake."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="127.0.0.1")
        self._until_it_has_come(self.tls.do_handshake)
        self.sock.sendall(self._outgoing.read())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def record(self, data: bytes) -> bytes:
        """Return what is to be sent to say this."""
        self.tls.write(data)
        return self._outgoing.read()

    def alert(self) -> bytes:
        """Return a fatal alert, as to a record that it could not decrypt; it can say nothing after that."""
        self._incoming.write(b"\x17\x03\x03\x00\x20" + bytes(32))
        with contextlib.suppress(ssl.SSLError):
            self.tls.read(1)
        return self._outgoing.read()

    def read(self, count: int) -> bytes:
        """Return what has been said to it, once so much has come; fewer octets at the end of the connection."""
        said = bytearray()
        while len(said) < count and (came := self._until_it_has_come(lambda: self.tls.read(count))):
            said += came
        return bytes(said)

    def _until_it_has_come(self, attempt: Callable[[], T]) -> T:
        while True:
            try:
                return attempt()
            except ssl.SSLWantReadError:
                if said := self._outgoing.read():
                    self.sock.sendall(said)
                if came := self.sock.recv(65_536):
                    self._incoming.write(came)
                else:
                    self._incoming.write_eof()
