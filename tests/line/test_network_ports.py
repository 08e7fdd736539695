"""A port of another machine, by its URL: on-device keys only, and the same enrollment."""

from __future__ import annotations

import os
import select
import socket
import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
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
        self._thread.join(timeout=30)
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
        while True:
            ready, _, _ = select.select([client.fileno(), descriptor, self._stop_read], [], [], 30)
            if self._stop_read in ready or not ready:
                return
            if client.fileno() in ready:
                data = client.recv(4096)
                if not data:
                    return
                os.write(descriptor, data)
            if descriptor in ready:
                client.sendall(os.read(descriptor, 4096))


def test_a_board_behind_a_terminal_server(birthmark: Command, board: LineBoard) -> None:
    with PortServer(board.port) as server:
        refused = birthmark("flash", "--port", server.url, "--id", "far-1", "--keys", "station", *WHERE)
        assert refused.exit_code == 3
        assert not board.is_made
        done = birthmark("run", "--port", server.url, "--template", "far-{n}", *WHERE)
        assert done.exit_code == 0, done.stdout
        assert board.bundle.config.device_id.text == "far-1"
        again = birthmark("flash", "--port", server.url, "--id", "far-1", *WHERE)
        assert "DUPLICATE" in again.stderr
