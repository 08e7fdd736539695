"""A port of another machine, by its URL: on-device keys only, and the same enrollment."""

from __future__ import annotations

import os
import select
import socket
import threading
from typing import TYPE_CHECKING, Any, Self

import pytest
import serial
from serial import rfc2217
from support.patience import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.line_board import LineBoard
    from support.station import Command

WHERE = ("--broker", "gateway-1.example.com:8883")


class PortServer:
    """Hands a board's pty to one client after the other, as a terminal server does."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._stop_read, self._stop_write = os.pipe()
        self._thread = threading.Thread(target=self._serve)
        self.url = f"socket://127.0.0.1:{self._listening.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._stop_write, b"x")
        self._thread.join(timeout=PATIENCE_S)
        self._listening.close()
        os.close(self._stop_read)
        os.close(self._stop_write)

    def _serve(self) -> None:
        while True:
            ready, _, _ = select.select([self._listening.fileno(), self._stop_read], [], [], 30)
            if self._listening.fileno() not in ready:
                return
            client, _ = self._listening.accept()
            descriptor = os.open(self._path, os.O_RDWR | os.O_NOCTTY)
            with client:
                self._carry(client, descriptor)
            os.close(descriptor)

    def _carry(self, client: socket.socket, descriptor: int) -> None:
        self._pump(client, descriptor, lambda data: os.write(descriptor, data), lambda: os.read(descriptor, 4096))

    def _pump(
        self, client: socket.socket, line: int, write: Callable[[bytes], object], read: Callable[[], bytes]
    ) -> None:
        """Carry between a client and a line until one of the two ends, or the server."""
        while True:
            ready, _, _ = select.select([client.fileno(), line, self._stop_read], [], [], 30)
            if self._stop_read in ready or not ready:
                return
            if client.fileno() in ready:
                data = client.recv(4096)
                if not data:
                    return
                write(data)
            if line in ready:
                client.sendall(read())


class PtyPort(serial.Serial):  # type: ignore[misc, name-defined]
    """pyserial's port on a pty, which has no modem lines."""

    cts = dsr = ri = cd = False

    def _update_dtr_state(self) -> None:
        """Nothing to set."""

    _update_rts_state = _update_break_state = _update_dtr_state


class Rfc2217Server(PortServer):
    """The same with pyserial's own server of RFC 2217, which escapes, and takes speed and modem lines."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.url = self.url.replace("socket://", "rfc2217://")

    def _carry(self, client: socket.socket, descriptor: int) -> None:  # noqa: ARG002 - it opens the port itself
        class Connection:
            write = staticmethod(client.sendall)

        with PtyPort(self._path, timeout=0) as port:
            manager: Any = rfc2217.PortManager(port, Connection())  # type: ignore[no-untyped-call]
            self._pump(
                client,
                port.fileno(),
                lambda data: port.write(b"".join(manager.filter(data))),
                lambda: b"".join(manager.escape(port.read(4096))),
            )


@pytest.mark.filterwarnings("ignore:set(Daemon|Name):DeprecationWarning")  # pyserial's own
@pytest.mark.parametrize("kind", [PortServer, Rfc2217Server])
def test_a_board_behind_a_terminal_server(birthmark: Command, board: LineBoard, kind: type[PortServer]) -> None:
    with kind(board.port) as server:
        refused = birthmark("flash", "--port", server.url, "--id", "far-1", "--keys", "station", *WHERE)
        assert refused.exit_code == 3
        assert not board.is_made
        done = birthmark("run", "--port", server.url, "--template", "far-{n}", *WHERE)
        assert done.exit_code == 0, done.stdout
        assert board.bundle.config.device_id.text == "far-1"
        again = birthmark("flash", "--port", server.url, "--id", "far-1", *WHERE)
        assert "DUPLICATE" in again.stderr


@pytest.mark.parametrize("url", ["hwgrep://.", "spy:///dev/ttyS0?file=/dev/null", "loop://", "x:///dev/ttyS0"])
def test_no_other_url_is_a_port(birthmark: Command, url: str) -> None:
    refused = birthmark("flash", "--port", url, "--id", "far-1", *WHERE)
    assert refused.exit_code == 5
    assert "it is no URL of a port on a network" in refused.stderr
