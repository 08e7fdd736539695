"""A network between a client and a broker, on loopback: it cuts, stalls, and drops what a test wants."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from typing import TYPE_CHECKING, Self

from support.patience import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Callable


class LoopbackProxy:
    """Passes bytes on, TCP to TCP.

    Args:
        target_port: where to, on 127.0.0.1.
        lets_through: is asked about each connection, by its number from 0: how many bytes from the client pass
            before it is cut; None: all.
    """

    def __init__(self, target_port: int, lets_through: Callable[[int], int | None] = lambda _number: None) -> None:
        self.target_port = target_port
        self.lets_through = lets_through
        self.stalls = False
        """Nothing passes, and nothing is closed: a network that forgot its connections."""
        self.connections = 0
        self.cut = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._wake, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._is_stopping = False
        self._wants_cut = False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_stopping = True
        self._waker.send(b"\0")
        self._thread.join(PATIENCE_S)
        for end in (self._listener, self._wake, self._waker):
            end.close()

    def cut_all(self) -> None:
        """Cut every connection."""
        self._wants_cut = True
        self._waker.send(b"\0")

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as left:
            others: dict[socket.socket, socket.socket] = {}
            budgets: dict[socket.socket, int | None] = {}

            def close(one: socket.socket) -> None:
                for end in (one, others.pop(one)):
                    others.pop(end, None)
                    budgets.pop(end, None)
                    selector.unregister(end)
                    end.close()

            def close_all() -> None:
                for end in list(others):
                    if end in others:
                        close(end)

            left.callback(close_all)
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    one = key.fileobj
                    assert isinstance(one, socket.socket)
                    if one is self._wake:
                        self._wake.recv(64)
                        if self._is_stopping:
                            return
                        if self._wants_cut:
                            self._wants_cut = False
                            close_all()
                    elif one is self._listener:
                        client, _ = self._listener.accept()
                        try:
                            server = socket.create_connection(("127.0.0.1", self.target_port), timeout=PATIENCE_S)
                        except OSError:
                            client.close()
                            continue
                        others[client], others[server] = server, client
                        budgets[client] = self.lets_through(self.connections)
                        self.connections += 1
                        for end in (client, server):
                            selector.register(end, selectors.EVENT_READ)
                    elif one in others:
                        self._pass_on(one, others[one], budgets, close)

    def _pass_on(
        self,
        one: socket.socket,
        other: socket.socket,
        budgets: dict[socket.socket, int | None],
        close: Callable[[socket.socket], None],
    ) -> None:
        try:
            data = one.recv(65536)
            if self.stalls and data:
                return
            budget = budgets.get(one)
            if budget is not None:
                budgets[one] = budget - len(data)
                if budget < len(data):
                    other.sendall(data[:budget])
                    self.cut += 1
                    data = b""
            if data:
                other.sendall(data)
        except OSError:
            data = b""
        if not data:
            close(one)
