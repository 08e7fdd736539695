"""One unit on one real port, from HELLO to ATTESTED, cables that fall out included.

A port that goes away ends the attempt. The same physical port is waited for, up to REPLUG_S; then everything
begins again with a new session and HELLO, and the journal decides how to go on: another board that comes back
on the port is another unit.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from birthmark.device.console import INTERRUPTED
from birthmark.device.errors import BirthmarkError, PortError
from birthmark.device.link import timers
from birthmark.provisioning.enrollment.enrol import Effect, Enrolment
from birthmark.provisioning.enrollment.exchange import Line, Read, Send
from birthmark.provisioning.enrollment.port import SerialPort, held

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from birthmark.provisioning.enrollment.enrol import Choice, Confirm
    from birthmark.provisioning.enrollment.journal import Journal, Wish
    from birthmark.provisioning.enrollment.port import PortName
    from birthmark.provisioning.registry.model import Row

MAX_REPLUGS: Final = 8
"""How often a cable may fall out before it is called broken."""
_LOOK_EVERY_S: Final = 0.1
_SID_BITS: Final = 32
_STOP_WITHIN_S: Final = 0.25


class StoppedError(BirthmarkError):
    """A person stopped it; nothing is lost."""

    exit_code = INTERRUPTED

    def __init__(self) -> None:
        super().__init__("stopped; nothing is lost", hint="`birthmark resume` goes on")


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Unplugged:
    """For whoever watches: the port has gone, and is waited for."""

    error: PortError


@dataclass(frozen=True, slots=True)
class Replugged:
    """For whoever watches: the port is back."""


Event = Effect | Unplugged | Replugged


@dataclass(frozen=True, slots=True)
class Session:
    """What it takes to enrol the unit on a port.

    Args:
        name: the port.
        baud: its speed.
        journal: the registry and the CA.
        wish: what the operator asked for, or what says so once the unit is known (`enrol.Enrolment`).
        watch: told of every step, every durable state, and of the port.
        confirm: asked before COMMIT (`enrol.Enrolment`).
        stopped: whether to stop; asked before every action, and a few times a second while nothing happens.
    """

    name: PortName
    baud: int
    journal: Journal
    wish: Wish | Choice
    watch: Callable[[Event], None]
    confirm: Confirm | None = None
    stopped: Callable[[], bool] = _never

    def run(self) -> Row:
        """Enrol the unit and return its row in ATTESTED.

        Raises:
            PortError: the port cannot be opened, is another station's, or went away and stayed away.
            LinkError: nothing on it answers.
            EnrollmentRefusedError: the unit is refused.
            RegistryError, AuthorityError: the station could not do its part.
            StoppedError: `stopped` said so; the journal knows how far the unit got.
        """
        with held(self.name):
            port = SerialPort(self.name, self.baud)
            for _ in range(MAX_REPLUGS):
                try:
                    return self._attempt(port)
                except PortError as error:
                    port.close()
                    self.watch(Unplugged(error))
                    port = self._replugged(error)
                    self.watch(Replugged())
            return self._attempt(port)

    def _attempt(self, port: SerialPort) -> Row:
        line = Line(clock=time.monotonic, sid=secrets.randbits(_SID_BITS), baud=self.baud)
        machine = Enrolment(
            line,
            self.journal,
            self.wish,
            random_bytes=secrets.token_bytes,
            is_local=self.name.is_local,
            confirm=self.confirm,
        )
        with port:
            return drive(machine.run(), port, self.watch, self.stopped)

    def _replugged(self, error: PortError) -> SerialPort:
        deadline_s = time.monotonic() + timers.REPLUG_S
        while True:
            try:
                return SerialPort(self.name, self.baud)
            except PortError:
                # Also while udev is still at work on the new node's owner and mode.
                if time.monotonic() >= deadline_s:
                    raise error from None
            if self.stopped():
                raise StoppedError
            time.sleep(_LOOK_EVERY_S)


def drive(
    machine: Generator[Effect, bytes, Row],
    port: SerialPort,
    watch: Callable[[Effect], None],
    stopped: Callable[[], bool] = _never,
) -> Row:
    """Do what the machine asks for, on a port and by the real clock, until it ends or is to stop.

    Raises:
        StoppedError: `stopped` said so, between two actions.
    """
    reply = b""
    try:
        effect = next(machine)
        while True:
            if stopped():
                raise StoppedError
            match effect:
                case Send(data):
                    port.write(data)
                    reply = b""
                case Read(until_s):
                    # An empty read before its time is up only lets the machine look at the clock again.
                    reply = port.read(min(until_s - time.monotonic(), _STOP_WITHIN_S))
                case _:
                    watch(effect)
                    reply = b""
            effect = machine.send(reply)
    except StopIteration as end:
        row: Row = end.value
        return row
