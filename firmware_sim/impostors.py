"""What else may hang on a serial port: everything but a board that takes identities.

None of them holds a frame of the link, but for the echo, which gives the station's own back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from birthmark.firmware_sim.line import Chatter

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from random import Random

_LOGIN = b"\r\n\x1b[2J\x1b[HDebian GNU/Linux 12 gateway ttyS0\r\n\r\ngateway login: "
_SHELL = b"\r\nsh: 1: not found\r\nuser@gateway:~$ "
_BOOT = b"\r\nrst:0x10 (RTCWDT_RTC_RESET),boot:0x3 (DOWNLOAD_BOOT)\r\nwaiting for download\r\n"
_OTHER_SPEED = b"\x80\x98\xe0\xf8\xfe\x06\x1c"
_TEXT = b"".join(b"%08d the quick brown fox jumps over the lazy dog 0123456789\r\n" % n for n in range(30))


@dataclass(frozen=True, slots=True)
class Impostor:
    """One kind of thing on a port.

    Attributes:
        meaning: in a few words, for the help.
        answer: what it says when it is sent something.
        chatter: what it says by itself.
    """

    meaning: str
    answer: Callable[[bytes, Random], bytes] = lambda _heard, _random: b""
    chatter: Chatter | None = None


IMPOSTORS: Final = {
    "silence": Impostor("nothing: no power, or TX and RX swapped"),
    "echo": Impostor("a loopback plug", lambda heard, _random: heard),
    "login": Impostor("a getty, with escape sequences", lambda _heard, _random: _LOGIN),
    "shell": Impostor("a root shell", lambda _heard, _random: _SHELL),
    "bootloader": Impostor("a board in its boot loader", chatter=Chatter(0.2, lambda _random: _BOOT)),
    "wrong-baud": Impostor(
        "a board at another speed",
        lambda heard, random: bytes(random.choice(_OTHER_SPEED) for _ in range(len(heard) + 40)),
    ),
    "text-flood": Impostor("firmware that prints without end", chatter=Chatter(0.005, lambda _random: _TEXT)),
    "random-flood": Impostor(
        "random bytes without end", chatter=Chatter(0.005, lambda random: random.randbytes(2048))
    ),
    "zero-flood": Impostor("a line held low", chatter=Chatter(0.005, lambda _random: bytes(2048))),
}


class ImpostorOnPort:
    """An impostor in an agent's place; see `tty.Answering`."""

    def __init__(self, impostor: Impostor, random: Random) -> None:
        self._impostor = impostor
        self._random = random

    def receive(self, data: bytes) -> Generator[bytes, None, None]:
        """Yield what it answers."""
        if data:
            answer = self._impostor.answer(data, self._random)
            if answer:
                yield answer

    def busy(self) -> bytes:
        """Nothing: it does no work."""
        return b""
