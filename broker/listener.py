"""The listening sockets: accepts, and hands over sockets that TLS is wrapped around, its handshake still to come.

Rules:

- An occupied port or an unknown host is a `SystemFailureError` with a hint, before anything listens.
- Out of file descriptors (EMFILE and its kin), accepting pauses for `ACCEPT_PAUSE_S`; nothing spins or dies.
- At most `MAX_ACCEPTS_PER_EVENT` connections are taken before the sessions have their turn.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import socket
import sys
from typing import TYPE_CHECKING

from birthmark.device.errors import SystemFailureError
from birthmark.device.escape import escaped

if TYPE_CHECKING:
    import asyncio
    import ssl
    from collections.abc import Callable

BACKLOG = 1_024
MAX_ACCEPTS_PER_EVENT = 32
ACCEPT_PAUSE_S = 0.5
IDLE_PROBE_S = 120
"""TCP's own keepalive: a peer that vanished is noticed even where MQTT's keepalive is long."""
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

_log = logging.getLogger(__name__)


def bind(host: str, port: int) -> list[socket.socket]:
    """Listen on every address of a host, all on one port (0: any free one).

    Raises:
        SystemFailureError: it could not be done on one of them; none is left open.
    """
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else "it is no host name"
        raise SystemFailureError(
            f"could not listen on {escaped(host)}: {cause or error}",
            hint="`listen` takes an address of this machine, such as 0.0.0.0:8883 or [::]:8883",
        ) from error
    try:
        for family, address in dict.fromkeys((item[0], item[4]) for item in found):
            sock = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(sock)
            sock.settimeout(0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                # `::` means every address, IPv4 ones as well; any other is itself alone.
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != "::"))
            # These three go on to every connection that it accepts.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if sys.platform == "linux":
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_PROBE_S)
            sock.bind((address[0], port, *address[2:]))
            sock.listen(BACKLOG)
            port = sock.getsockname()[1]
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise SystemFailureError(
            f"could not listen on {escaped(host)}, port {port}: {error.strerror or error}",
            hint=_bind_hint(error, port),
        ) from error
    return sockets


def _bind_hint(error: OSError, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"another process has the port: ss -ltnp 'sport = :{port}'"
    if error.errno == errno.EACCES:
        return "ports below 1024 need CAP_NET_BIND_SERVICE"
    return "`listen` takes an address of this machine, such as 0.0.0.0:8883 or [::]:8883"


def shown_address(address: tuple[str, int] | tuple[str, int, int, int]) -> str:
    """A peer's address for people: `192.0.2.7:50112`, `[2001:db8::7]:50112`."""
    host = address[0].removeprefix("::ffff:")
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"


def place_of(address: str) -> str:
    """Where connections are counted together: an IPv4 address, or the 64 bits of an IPv6 network.

    `address` is one as `shown_address` gives it, with its port.
    """
    host = address.rpartition(":")[0]
    if not host.startswith("["):
        return host
    network = ipaddress.IPv6Network((host[1:-1].partition("%")[0], 64), strict=False)
    return str(network)


class Listener:
    """Accepts on bound sockets.

    Args:
        loop: the running loop.
        sockets: bound and listening.
        context: for the server's side of TLS; replaced by `set_context` when credentials change.
        on_accept: takes the wrapped socket and the peer's address.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sockets: list[socket.socket],
        context: ssl.SSLContext,
        on_accept: Callable[[ssl.SSLSocket, str], None],
    ) -> None:
        self._loop = loop
        self._sockets = sockets
        self._context = context
        self._on_accept = on_accept
        self._pauses: dict[socket.socket, asyncio.TimerHandle] = {}

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Where it listens."""
        return [sock.getsockname()[:2] for sock in self._sockets]

    def set_context(self, context: ssl.SSLContext) -> None:
        """Use other credentials or anchors from the next connection on."""
        self._context = context

    def start(self) -> None:
        """Accept from now on."""
        for sock in self._sockets:
            self._loop.add_reader(sock, self._accept, sock)

    def close(self) -> None:
        """Stop accepting, and free the port."""
        for timer in self._pauses.values():
            timer.cancel()
        self._pauses.clear()
        for sock in self._sockets:
            self._loop.remove_reader(sock)
            sock.close()
        self._sockets = []

    def _accept(self, sock: socket.socket) -> None:
        for _ in range(MAX_ACCEPTS_PER_EVENT):
            try:
                connection, address = sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionError):
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    # accept() reports errors of the connection that waited (accept(2)); the next may be fine.
                    _log.warning("could not accept a connection: %s", error.strerror)
                    return
                _log.error(
                    "could not accept connections: %s; pausing %.1f s (raise the limit of open files)",
                    error.strerror,
                    ACCEPT_PAUSE_S,
                )
                self._loop.remove_reader(sock)
                self._pauses[sock] = self._loop.call_later(ACCEPT_PAUSE_S, self._resume, sock)
                return
            self._take(connection, shown_address(address))

    def _resume(self, sock: socket.socket) -> None:
        del self._pauses[sock]
        self._loop.add_reader(sock, self._accept, sock)

    def _take(self, connection: socket.socket, address: str) -> None:
        try:
            connection.settimeout(0)
            wrapped = self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        except (OSError, ValueError):
            # It was gone before we turned to it.
            with contextlib.suppress(OSError):
                connection.close()
            return
        self._on_accept(wrapped, address)
