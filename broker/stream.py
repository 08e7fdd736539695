"""One TLS connection, driven by hand: a non-blocking `ssl.SSLSocket` on the event loop's readiness callbacks.

Why not asyncio's transports: their handshake cannot be timed and explained, a session that does not read
cannot be cut off at once, each connection buffers 256 KiB, and every message costs a send of its own.

Rules:

- TLS may want to read while we write, and to write while we read (key updates): both are served.
- What is written during one turn of the loop leaves in one `send` at its end, so that a burst of small
  packets shares a TLS record.
- After `max_events_reads` records other connections have their turn; a whole record is always taken, so the
  loop's level-triggered readiness brings us back (and `pending()` is looked at all the same).
- What waits to be sent is counted in `waiting_bytes`; bounding it is the owner's business.
- Output keeps its order. What may not leave before something else has happened is held, and all that is written
  after it waits behind it (`hold`, `release`); a `close` waits for it as well, within `LINGER_S`.
- `pause` stops reading, and so, by TCP, the peer's sending; `resume` goes on.
- `abort` closes at once. `close` sends what waits and a close_notify, then reads and drops what the peer still
  says for `LINGER_S`, since closing with unread data would destroy what we said last (TCP reset).
- `closed` is told to the owner exactly once, from a callback of the loop, never from inside its own call.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
from collections import deque
from enum import Enum, auto
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio

RECORD_BYTES = 16_384
"""The plaintext of one TLS record (RFC 8446 §5.1)."""
MAX_READS_PER_EVENT = 4
MAX_SEND_BYTES = 262_144
LINGER_S = 1.0
MAX_LINGER_BYTES = 262_144
_RESET = struct.pack("ii", 1, 0)
_SPARE = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
"""Of no connection; see `_forget_errors`."""


class StreamOwner(Protocol):
    """Who is told what happens on a stream."""

    def on_secured(self, stream: TlsStream) -> None:
        """The handshake is done; the peer's leaf is `stream.peer_leaf_der()`."""

    def on_handshake_failed(self, error: Exception) -> None:
        """The handshake failed; the stream is closing by itself."""

    def on_data(self, data: bytes) -> None:
        """Bytes have come."""

    def on_drained(self) -> None:
        """Everything that waited has been handed to the kernel."""

    def on_closed(self, error: Exception | None) -> None:
        """The connection is gone, by whichever side."""


class Flusher:
    """Sends, once a turn of the loop, what was written during it."""

    __slots__ = ("_loop", "_streams")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._streams: list[TlsStream] = []

    def add(self, stream: TlsStream) -> None:
        """Have a stream flushed at the end of this turn."""
        if not self._streams:
            self._loop.call_soon(self._flush)
        self._streams.append(stream)

    def _flush(self) -> None:
        streams, self._streams = self._streams, []
        for stream in streams:
            stream.flush()


class _State(Enum):
    HANDSHAKE = auto()
    OPEN = auto()
    FINISHING = auto()  # close() was called: what waits is being sent
    LINGERING = auto()
    CLOSED = auto()


# To look a member up in its class is a call of its own on Python 3.11, and these are asked for with every message.
_HANDSHAKE, _OPEN, _FINISHING, _LINGERING, _CLOSED = _State
_FLOWING = (_OPEN, _FINISHING)


class TlsStream:
    """A connection from its TCP accept to its end.

    Args:
        loop: the running loop.
        sock: the accepted socket, wrapped, non-blocking.
        flusher: shared by the streams of a broker.
        address: the peer's, for people.
        owner: told what happens.
    """

    __slots__ = (
        "_fileno",
        "_flusher",
        "_held",
        "_is_reader_armed",
        "_is_writer_armed",
        "_linger_bytes",
        "_linger_timer",
        "_loop",
        "_out",
        "_owner",
        "_pauses",
        "_pending",
        "_sock",
        "_state",
        "_waits_to_read",
        "_waits_to_write",
        "address",
        "progressed",
        "waiting_bytes",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: ssl.SSLSocket,
        flusher: Flusher,
        address: str,
        owner: StreamOwner,
    ) -> None:
        self._loop = loop
        self._sock = sock
        # The loop is given the number: of a socket that it does not know it would first write a description.
        self._fileno = sock.fileno()
        self._flusher = flusher
        self._owner = owner
        self._state = _HANDSHAKE
        self._out: list[bytes] = []
        self._pending: bytes | memoryview | None = None
        self._held: deque[tuple[int, bytes]] = deque()
        self._is_reader_armed = False
        self._pauses = 0
        self._is_writer_armed = False
        self._waits_to_read = False  # a send goes on once TLS has read something
        self._waits_to_write = False  # a receive goes on once TLS has written something
        self._linger_bytes = 0
        self._linger_timer: asyncio.TimerHandle | None = None
        self.address = address
        self.waiting_bytes = 0
        """Written by the owner and not yet taken by the kernel."""
        self.progressed = False
        """Set whenever the kernel took something; for a watch on slow readers, who clears it."""

    @property
    def is_open(self) -> bool:
        """Whether data flows: after the handshake, before any close."""
        return self._state is _OPEN

    @property
    def is_closed(self) -> bool:
        """Whether it is over."""
        return self._state is _CLOSED

    def start(self) -> None:
        """Begin the handshake once the peer has said something: before, it would only raise that it waits."""
        self._arm_reader()
        if not self._sock.server_side:
            self._on_readable()  # towards an upstream it is for us to speak first

    def peer_leaf_der(self) -> bytes | None:
        """The certificate that the peer showed, in this handshake or in the one that is resumed."""
        return self._sock.getpeercert(binary_form=True)

    def describe(self) -> dict[str, object]:
        """The TLS version and suite, and whether the session was resumed; for the log."""
        suite = self._sock.cipher()
        return {
            "tls": self._sock.version() or "",
            "suite": suite[0] if suite else "",
            "resumed": bool(self._sock.session_reused),
        }

    def write(self, data: bytes) -> None:
        """Send data at the end of this turn of the loop; nothing once the stream is closing."""
        if self._state is not _OPEN:
            return
        self.waiting_bytes += len(data)
        if self._held:
            self._held.append((0, data))
            return
        if not self._out:
            self._flusher.add(self)
        self._out.append(data)

    @property
    def is_holding(self) -> bool:
        """Whether something is held."""
        return bool(self._held)

    def hold(self, number: int, data: bytes) -> None:
        """Write data that must not leave before `release` is called with this number, or a higher one."""
        if self._state is _OPEN:
            self.waiting_bytes += len(data)
            self._held.append((number, data))

    def release(self, number: int) -> bool:
        """Let go of what is held up to a number; return whether nothing is held any more."""
        held = self._held
        if held and held[0][0] <= number:
            if not self._out:
                self._flusher.add(self)
            while held and held[0][0] <= number:
                self._out.append(held.popleft()[1])
        return not held

    @property
    def is_paused(self) -> bool:
        """Whether nothing is read."""
        return self._pauses > 0

    def pause(self) -> None:
        """Read nothing more from the peer, whose sending then stops by itself, until as many `resume`s."""
        if self._state is _OPEN:
            self._pauses += 1
            self._disarm_reader()

    def resume(self) -> None:
        """Read again, if nobody else has paused it."""
        if self._pauses:
            self._pauses -= 1
            if not self._pauses and self._state in (_OPEN, _FINISHING, _LINGERING):
                self._arm_reader()
                # What TLS has decrypted already makes no socket readable.
                self._loop.call_soon(self._on_readable)

    def close(self) -> None:
        """End the connection in good order; what was written still goes out."""
        if self._state is _HANDSHAKE:
            self.abort()
        elif self._state is _OPEN:
            self._state = _FINISHING
            self._pauses = min(self._pauses, 1)
            self.resume()
            self._linger_timer = self._loop.call_later(LINGER_S, self._end, None)
            self.flush()

    def abort(self, error: Exception | None = None) -> None:
        """End the connection now, by a TCP reset: nothing more is sent, not even what waits in the kernel."""
        if self._state is not _CLOSED:
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self._end(error)

    def flush(self) -> None:
        """Hand to the kernel what waits, as far as it takes it."""
        if self._state not in _FLOWING or self._is_writer_armed or self._waits_to_read:
            return
        sent_bytes = 0
        out = self._out
        while (out or self._pending) and sent_bytes < MAX_SEND_BYTES:
            pending = self._pending
            if pending is None:
                pending = self._pending = out[0] if len(out) == 1 else b"".join(out)
                out.clear()
            try:
                count = self._sock.send(pending)
            except ssl.SSLWantWriteError:
                self._arm_writer()
                return
            except ssl.SSLWantReadError:
                # OpenSSL wants the very same bytes again once it has read.
                self._waits_to_read = True
                self._arm_reader()
                return
            except (OSError, ValueError) as error:
                self._end(error)
                return
            sent_bytes += count
            self.waiting_bytes -= count
            self.progressed = True
            self._pending = memoryview(pending)[count:] if count < len(pending) else None
        if out or self._pending:
            self._arm_writer()
        elif self._state is _FINISHING:
            self._finish()
        elif sent_bytes:
            self._owner.on_drained()

    # --- readiness ---------------------------------------------------------------------------------------

    def _on_readable(self) -> None:
        if self._waits_to_read:
            self._waits_to_read = False
            self.flush()
        if self._state in _FLOWING:
            if not self._pauses:
                self._receive()
            elif not self._waits_to_read:
                self._disarm_reader()
        elif self._state is _HANDSHAKE:
            self._shake()
        elif self._state is _LINGERING:
            self._drop_input()

    def _on_writable(self) -> None:
        self._disarm_writer()
        if self._state is _HANDSHAKE:
            self._shake()
        elif self._state in _FLOWING:
            self.flush()
            if self._waits_to_write and not self.is_closed:
                self._waits_to_write = False
                if not self.is_paused:
                    self._receive()

    def _shake(self) -> None:
        try:
            self._sock.do_handshake()
        except ssl.SSLWantReadError:
            return
        except ssl.SSLWantWriteError:
            self._arm_writer()
            return
        except (OSError, ValueError) as error:
            # The alert that says why is on its way out: give the client the time to read it.
            self._state = _LINGERING
            self._linger_timer = self._loop.call_later(LINGER_S, self._end, None)
            self._owner.on_handshake_failed(error)
            self._half_close()
            return
        self._state = _OPEN
        self._owner.on_secured(self)
        if self.is_open:
            self._receive()

    def _receive(self) -> None:
        sock, owner = self._sock, self._owner
        for _ in range(MAX_READS_PER_EVENT):
            try:
                data = sock.recv(RECORD_BYTES)
            except ssl.SSLWantReadError:
                return
            except ssl.SSLWantWriteError:
                self._waits_to_write = True
                self._arm_writer()
                return
            except (OSError, ValueError) as error:
                self._end(error)
                return
            if not data:
                self._end(None)
                return
            if self._state is _OPEN:
                owner.on_data(data)
            if len(data) < RECORD_BYTES:
                return  # the record has been taken: asking for more costs an exception, being told costs nothing
            if self._pauses or self._state not in _FLOWING:
                return
        if sock.pending():
            self._loop.call_soon(self._on_readable)

    # --- the end -----------------------------------------------------------------------------------------

    def _finish(self) -> None:
        if self._held:
            return
        self._state = _LINGERING
        # unwrap() sends our close_notify and then waits for the peer's, which we do not.
        with contextlib.suppress(OSError, ValueError):
            self._sock.unwrap()
        _forget_errors()
        self._half_close()

    def _half_close(self) -> None:
        try:
            # The plain socket's shutdown: SSLSocket.shutdown would drop the TLS state first.
            socket.socket.shutdown(self._sock, socket.SHUT_WR)
        except OSError:
            self._end(None)

    def _drop_input(self) -> None:
        """Read raw bytes and drop them, until the peer has closed or said too much."""
        try:
            data = socket.socket.recv(self._sock, RECORD_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._linger_bytes += len(data)
        if not data or self._linger_bytes > MAX_LINGER_BYTES:
            self._end(None)

    def _end(self, error: Exception | None) -> None:
        if self._state is _CLOSED:
            return
        self._state = _CLOSED
        self._disarm_reader()
        self._disarm_writer()
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None
        self._out.clear()
        self._held.clear()
        self._pending = None
        self.waiting_bytes = 0
        self._sock.close()
        self._loop.call_soon(self._owner.on_closed, error)

    def _arm_reader(self) -> None:
        if not self._is_reader_armed:
            self._is_reader_armed = True
            self._loop.add_reader(self._fileno, self._on_readable)

    def _disarm_reader(self) -> None:
        if self._is_reader_armed:
            self._is_reader_armed = False
            self._loop.remove_reader(self._fileno)

    def _arm_writer(self) -> None:
        if not self._is_writer_armed:
            self._is_writer_armed = True
            self._loop.add_writer(self._fileno, self._on_writable)

    def _disarm_writer(self) -> None:
        if self._is_writer_armed:
            self._is_writer_armed = False
            self._loop.remove_writer(self._fileno)


def _forget_errors() -> None:
    """Empty OpenSSL's queue of this thread's errors.

    `unwrap` leaves an alert in it that came from the peer meanwhile, and OpenSSL would then take the next wait for
    a record, of whichever connection, for a failure (SSL_get_error(3)). Python empties it after a list of suites
    that has none.
    """
    with contextlib.suppress(ssl.SSLError):
        _SPARE.set_ciphers("none that there is")
