"""What is wrong with a simulated board, as an operator writes it: KIND or KIND=VALUE.

One table says what there is (`KINDS`); `birthmark-sim faults` and the reader follow it. Numbers are
plain (`loss=1e-4`); a moment on the line stands after an `@` (`unplug=1@500`: for one second, after 500 bytes).
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from birthmark.device.agent import keys
from birthmark.device.errors import ConfigurationError
from birthmark.device.escape import quoted
from birthmark.device.link.messages import MessageType
from birthmark.firmware_sim.impostors import IMPOSTORS, Impostor
from birthmark.firmware_sim.lies import LIES
from birthmark.firmware_sim.line import Chatter, Interruption, LineFaults, log_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from birthmark.firmware_sim.hostile import Lie

KEY_BYTES: Final = 32
REQUESTS: Final = {kind.name.lower(): kind for kind in MessageType if kind < MessageType.BUSY}


@dataclass(frozen=True, slots=True)
class Faults:
    """Everything that is wrong with one board and its line; by default nothing.

    Attributes:
        line: what is wrong with the line.
        reboot_at: the board reboots once, when it has done what this request asks and before it answers.
        cut_at: the power is cut once, at this moment of its storage.
        full_for: writes that find the disk full.
        copy_of: the state folder that it starts with a copy of.
        copies_hwid: whether the copy has the hardware id of the original.
        is_foreign: whether another station has locked it.
        key_scalar: the key that it makes every time.
        lie: what it lies about.
        lie_at: at which request.
        impostor: what is on the port instead of a board.
    """

    line: LineFaults = field(default_factory=LineFaults)
    reboot_at: MessageType | None = None
    cut_at: int | None = None
    full_for: int = 0
    copy_of: Path | None = None
    copies_hwid: bool = False
    is_foreign: bool = False
    key_scalar: bytes | None = field(default=None, repr=False)
    lie: Lie | None = None
    lie_at: MessageType | None = None
    impostor: Impostor | None = None

    @property
    def on_the_line(self) -> LineFaults:
        """What the line does, with what the impostor says by itself."""
        if self.impostor is None or self.impostor.chatter is None:
            return self.line
        return dataclasses.replace(self.line, chatter=self.impostor.chatter)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of fault.

    Attributes:
        value: how its value is written; empty if it takes none.
        meaning: what it does.
        apply: adds it to what is wrong already; raises `ValueError` for a value that is none.
    """

    value: str
    meaning: str
    apply: Callable[[Faults, str], Faults]


def _on_line(make: Callable[[str], dict[str, Any]]) -> Callable[[Faults, str], Faults]:
    def apply(faults: Faults, value: str) -> Faults:
        return dataclasses.replace(faults, line=dataclasses.replace(faults.line, **make(value)))

    return apply


def _on_board(make: Callable[[str], dict[str, Any]]) -> Callable[[Faults, str], Faults]:
    return lambda faults, value: dataclasses.replace(faults, **make(value))


def _interruption(value: str) -> Interruption:
    seconds, _, count = value.partition("@")
    return Interruption(float(seconds), int(count or 0))


def _log(value: str) -> dict[str, Any]:
    rate = float(value)
    if not 0 < rate <= 10_000:
        raise ValueError(value)
    return {"chatter": Chatter(1 / rate, log_line, is_regular=False)}


def _lie(value: str) -> dict[str, Any]:
    name, _, at = value.partition("@")
    if name not in LIES or (at and at not in REQUESTS):
        raise ValueError(value)
    return {"lie": LIES[name], "lie_at": REQUESTS[at] if at else LIES[name].at}


def _key(value: str) -> dict[str, Any]:
    scalar = bytes.fromhex(value).rjust(KEY_BYTES, b"\0")
    if len(scalar) != KEY_BYTES or keys.key_of_scalar(scalar) is None:
        raise ValueError(value)
    return {"key_scalar": scalar}


def _whole(value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,8}", value) or int(value) < 1:
        raise ValueError(value)
    return int(value)


def _of(table: dict[str, Any], value: str) -> Any:
    if value not in table:
        raise ValueError(value)
    return table[value]


KINDS: Final = {
    "baud": Kind("N", "bytes take their time at this rate, 8N1", _on_line(lambda v: {"baud": _whole(v)})),
    "latency": Kind(
        "MS", "the adapter's latency timer (16 for FTDI)", _on_line(lambda v: {"latency_s": float(v) / 1000})
    ),
    "loss": Kind("P", "each byte is lost with this probability", _on_line(lambda v: {"loss": float(v)})),
    "flips": Kind("P", "each bit is flipped with this probability", _on_line(lambda v: {"flips": float(v)})),
    "log": Kind("N", "N lines of log a second, between frames and inside them", _on_line(_log)),
    "stall": Kind("S[@BYTES]", "nothing moves for S seconds", _on_line(lambda v: {"stall": _interruption(v)})),
    "unplug": Kind(
        "S[@BYTES]", "the port goes away for S seconds", _on_line(lambda v: {"unplug": _interruption(v)})
    ),
    "reboot": Kind(
        "REQUEST",
        "it reboots before it answers this request",
        _on_board(lambda v: {"reboot_at": _of(REQUESTS, v)}),
    ),
    "power-cut": Kind(
        "N", "the power is cut at the Nth moment of its storage", _on_board(lambda v: {"cut_at": _whole(v)})
    ),
    "disk-full": Kind("N", "its first N writes find the disk full", _on_board(lambda v: {"full_for": _whole(v)})),
    "clone": Kind(
        "DIR", "a copy of that board's storage, on hardware of its own", _on_board(lambda v: {"copy_of": Path(v)})
    ),
    "twin": Kind(
        "DIR",
        "a copy of that board's storage, with the same hardware id",
        _on_board(lambda v: {"copy_of": Path(v), "copies_hwid": True}),
    ),
    "foreign": Kind("", "another station has locked it", _on_board(lambda _: {"is_foreign": True})),
    "key": Kind("HEX", "it always makes this key, as a board without randomness does", _on_board(_key)),
    "hostile": Kind("LIE[@REQUEST]", "it lies, see the list of lies", _on_board(_lie)),
    "instead": Kind(
        "WHAT",
        "no board is on the port, but: " + ", ".join(IMPOSTORS),
        _on_board(lambda v: {"impostor": _of(IMPOSTORS, v)}),
    ),
}


def parse(texts: Iterable[str]) -> Faults:
    """Read faults as an operator wrote them; a later one of the same kind counts.

    Raises:
        ConfigurationError: there is no such kind, or its value is none.
    """
    faults = Faults()
    for text in texts:
        name, equals, value = text.partition("=")
        kind = KINDS.get(name)
        if kind is None:
            raise ConfigurationError(
                f"could not simulate {quoted(text)}: there is no such fault",
                hint="there are: " + ", ".join(KINDS),
            )
        try:
            faults = kind.apply(faults, value if bool(kind.value) == bool(equals) else _none(text))
        except (ValueError, OverflowError):
            raise ConfigurationError(
                f"could not simulate {quoted(text)}: that is no value for it",
                hint=f"write {name}={kind.value}: {kind.meaning}" if kind.value else f"write {name} alone",
            ) from None
    return faults


def _none(text: str) -> str:
    raise ValueError(text)
