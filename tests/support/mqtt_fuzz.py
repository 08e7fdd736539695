"""A structure-aware fuzzer of MQTT 3.1.1: packets that are right but for one thing, or for nothing.

Most are whole and mean something, so that a session lives long enough to be led astray; some are changed in a bit,
cut short, spliced, or claim a length that is not theirs. The same seed makes the same packets.
"""

from __future__ import annotations

import select
import ssl
import time
from typing import TYPE_CHECKING

from support import mqtt_client as mqtt
from support.mqtt_client import packet, text
from support.patience import PATIENCE_S

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

ANSWER_S = 0.05
_BROKEN_TEXT = (b"a\0b", b"\xc0\x80", b"\xed\xa0\x80", b"\xff", b"a/\xe2\x82", b"\xf8\x88\x80\x80\x80")


class PacketFuzzer:
    """Makes packets for an authenticated client.

    Args:
        chance: seeded.
        name: of the client; most of its topics are its own.
    """

    def __init__(self, chance: random.Random, name: str) -> None:
        self._chance = chance
        self._name = name
        self._kinds: tuple[tuple[Callable[[], bytes], int], ...] = (
            (self._publish, 40),
            (self._subscribe, 14),
            (self._unsubscribe, 8),
            (self._acknowledgement, 20),
            (lambda: mqtt.PINGREQ, 6),
            (lambda: mqtt.DISCONNECT, 1),
            (self.connect, 1),
            (self._reserved, 1),
        )

    def packet(self) -> bytes:
        """The next one."""
        kinds, weights = zip(*self._kinds, strict=True)
        made: bytes = self._chance.choices(kinds, weights)[0]()
        return made if self._chance.random() < 0.97 else self._spoiled(made)

    def connect(self) -> bytes:
        """A CONNECT that is its own, with or without a session to keep and a will."""
        chance = self._chance
        will = (self._topic().decode(errors="replace"), self._payload()[:65_000], chance.randrange(3), True)
        return mqtt.connect(
            self._name,
            clean=chance.random() < 0.5,
            keepalive=chance.choice((0, 1, 60, 65_535)),
            will=will if chance.random() < 0.2 else None,
        )

    def _topic(self, *, wild: bool = False) -> bytes:
        """A topic name, or a filter; one in fifty is neither."""
        own = f"devices/{self._name}".encode()
        chance = self._chance
        kind = chance.random()
        if kind < 0.02:
            spoiled = (b"", own + b"/#/x", own + b"/a+b", chance.randbytes(chance.randrange(40)))
            return chance.choice((*spoiled, own + b"/" + chance.choice(_BROKEN_TEXT)))
        if kind < 0.05:
            deep, long = b"/" * chance.randrange(200), b"/" + b"x" * chance.randrange(65_000)
            return own + chance.choice((deep, long))
        if kind < 0.25:
            others = (
                b"devices/other/commands/%d",
                b"fleet/announcements/%d",
                b"$SYS/%d",
                b"gateway/localhost/crl%d",
            )
            return chance.choice(others) % chance.randrange(1_000)
        if wild and kind < 0.6:
            names = (
                own + b"/#",
                own + b"/+/x",
                own + b"/telemetry/+",
                b"#",
                b"+/+",
                b"devices/+/#",
                b"$share/g/x",
            )
            return chance.choice(names)
        return own + b"/telemetry/%d" % chance.randrange(50)

    def _id(self) -> int:
        return self._chance.choice((1, 2, 3, self._chance.randrange(1, 20), 65_535)) * (
            self._chance.random() > 0.01
        )

    def _payload(self) -> bytes:
        size = self._chance.choice((0, 1, 10, 100, self._chance.randrange(3_000), 3_000))
        return self._chance.randbytes(size if self._chance.random() < 0.995 else 200_000)

    def _publish(self) -> bytes:
        chance = self._chance
        qos = chance.choice((0, 1, 2)) if chance.random() < 0.99 else 3
        pid = self._id().to_bytes(2) if qos else b""
        first = 0x30 | (chance.random() < 0.1) << 3 | qos << 1 | (chance.random() < 0.2)
        return packet(first, text(self._topic()) + pid + self._payload())

    def _subscribe(self) -> bytes:
        chance = self._chance
        count = chance.choice((1, 1, 1, 2, 10)) if chance.random() < 0.98 else 0
        levels = (0, 1, 2) if chance.random() < 0.98 else (3, 0x80)
        filters = (text(self._topic(wild=True)) + bytes([chance.choice(levels)]) for _ in range(count))
        return packet(0x82, self._id().to_bytes(2) + b"".join(filters))

    def _unsubscribe(self) -> bytes:
        count = self._chance.choice((1, 1, 1, 5)) if self._chance.random() < 0.98 else 0
        filters = (text(self._topic(wild=True)) for _ in range(count))
        return packet(0xA2, self._id().to_bytes(2) + b"".join(filters))

    def _acknowledgement(self) -> bytes:
        return packet(self._chance.choice((0x40, 0x50, 0x62, 0x62, 0x70)), self._id().to_bytes(2))

    def _reserved(self) -> bytes:
        return packet(self._chance.choice((0x00, 0xF0, 0x20, 0x90, 0xB0, 0xD0, 0x60)), self._chance.randbytes(4))

    def _spoiled(self, made: bytes) -> bytes:
        chance = self._chance
        data = bytearray(made)
        kind = chance.randrange(7)
        if kind == 0:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[chance.randrange(len(data)) :]
        elif kind == 2:
            data += chance.randbytes(chance.randrange(1, 9))
        elif kind == 3:
            data[1:2] = chance.choice((b"\xff\xff\xff\x7f", b"\x80\x80\x80\x80\x01", b"\x80\x00", b"\xff\x0f"))
        elif kind == 4:
            data[0] = (data[0] & 0xF0) | chance.randrange(16)
        elif kind == 5:
            cut = chance.randrange(len(data))
            data[cut:] = self._publish()[chance.randrange(4) :]
        else:
            data[2:4] = chance.randbytes(2)
        return bytes(data)


def say(sock: ssl.SSLSocket, data: bytes) -> bool:
    """Say all of it, reading (and dropping) what comes; return whether the broker still listens.

    A PINGREQ goes after it, and its answer is waited for a little: what a broker that has closed the connection
    never read was not said to it. (There is no answer if it stands where the rest of a packet should.)
    """
    view = memoryview(data + mqtt.PINGREQ)
    sock.setblocking(False)  # noqa: FBT003
    deadline = time.monotonic() + PATIENCE_S
    while view:
        try:
            view = view[sock.send(view) :]
            continue
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLWantWriteError:
            select.select([sock], [sock], [], 1.0)
        except OSError:
            return False
        if _drop_what_came(sock) is None:
            return False
        assert time.monotonic() < deadline, "the broker neither reads nor closes"
    until = time.monotonic() + ANSWER_S
    while (left_s := until - time.monotonic()) > 0 and select.select([sock], [], [], left_s)[0]:
        tail = _drop_what_came(sock)
        if tail is None:
            return False
        if tail.endswith(b"\xd0\0"):
            break
    return True


def _drop_what_came(sock: ssl.SSLSocket) -> bytes | None:
    """Return the end of it; None if the connection has ended."""
    tail = b""
    while True:
        try:
            data = sock.recv(65_536)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return tail
        except OSError:
            return None
        if not data:
            return None
        tail = (tail + data)[-2:]
