"""A TLS server that goes by as little as OpenSSL can: the control beside every attack on the handshake.

It asks for a certificate and takes whatever comes, on TLS 1.0 and later, with every suite, and lets clients
renegotiate. What a client manages here it can do; that the gateway does not let it is the gateway's doing.

Each line that a client sends comes back reversed.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from support.patience import PATIENCE_S

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator, Sequence
    from pathlib import Path

EVERY_SUITE = "ALL:@SECLEVEL=0"


@dataclass
class LaxServer:
    """A running server, and what it prints."""

    port: int
    _lines: list[str] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def accepts(self, context: ssl.SSLContext) -> bool:
        """Whether a client gets through the handshake, and what it says is read."""
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)
        try:
            with context.wrap_socket(plain, server_hostname="127.0.0.1") as client:
                client.sendall(b"abc\n")
                return client.recv(16) == b"cba\n"
        except OSError:
            return False
        finally:
            plain.close()

    def was_shown_a_certificate(self, context: ssl.SSLContext) -> bool:
        """The same, and the server saw the client's certificate."""
        with self._changed:
            before = self._shown
        if not self.accepts(context):
            return False
        with self._changed:
            return self._changed.wait_for(lambda: self._shown > before, PATIENCE_S)

    @property
    def _shown(self) -> int:
        return sum(line.startswith("Peer certificate:") for line in self._lines)

    def read(self, lines: Iterator[str]) -> None:
        for line in lines:
            with self._changed:
                self._lines.append(line)
                self._changed.notify_all()


@contextmanager
def lax_server(folder: Path) -> Iterator[LaxServer]:
    """Run one with the `server.pem` and `root.pem` of a folder."""
    process = subprocess.Popen(
        [
            *("openssl", "s_server", "-rev", "-accept", "127.0.0.1:0"),
            *("-cert", folder / "server.pem", "-key", folder / "server.pem", "-cert_chain", folder / "server.pem"),
            *("-CAfile", folder / "root.pem", "-verify", "5"),
            *("-min_protocol", "TLSv1", "-cipher", EVERY_SUITE, "-groups", "P-256:P-384:X25519:P-192"),
            "-client_renegotiation",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("ACCEPT"):
                break
        else:
            raise AssertionError("openssl s_server did not start")
        server = LaxServer(int(line.rpartition(":")[2]))
        reader = threading.Thread(target=server.read, args=(process.stdout,))
        reader.start()
        try:
            yield server
        finally:
            process.kill()
            reader.join(PATIENCE_S)
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        process.stdout.close()


READY = b"Verify return code"


def openssl_client(port: int, *arguments: str | Path, steps: Sequence[tuple[bytes, bytes]], until: bytes) -> bytes:
    """Run `openssl s_client`, and return what it printed.

    Args:
        port: on loopback.
        arguments: more of its options.
        steps: what to wait for (`READY` first), and what to say then, one after the other.
        until: it is ended when this has come after all was said; or when the connection ends, or the time is up.
    """
    process = subprocess.Popen(
        ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    timer = threading.Timer(PATIENCE_S, process.kill)
    timer.start()
    printed, waiting = b"", list(steps)
    try:
        while data := os.read(process.stdout.fileno(), 65_536):
            printed += data
            while waiting and waiting[0][0] in printed:
                with contextlib.suppress(BrokenPipeError):  # a refused client ends as soon as it knows
                    process.stdin.write(waiting.pop(0)[1])
            if not waiting and until in printed:
                break
        return printed
    finally:
        timer.cancel()
        process.kill()
        process.wait(PATIENCE_S)
        process.stdin.close()
        process.stdout.close()
