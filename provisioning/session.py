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

from birthmark.device.errors import PortError
from birthmark.device.link import timers
from birthmark.provisioning.enrol import Effect, Enrolment
from birthmark.provisioning.exchange import Line, Read, Send
from birthmark.provisioning.port import SerialPort, held

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from birthmark.provisioning.journal import Journal, Wish
    from birthmark.provisioning.port import PortName
    from birthmark.provisioning.registry.model import Row

MAX_REPLUGS: Final = 8
"""How often a cable may fall out before it is called broken."""
_LOOK_EVERY_S: Final = 0.1
_SID_BITS: Final = 32


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
        wish: what the operator asked for.
        watch: told of every step, every durable state, and of the port.
    """

    name: PortName
    baud: int
    journal: Journal
    wish: Wish
    watch: Callable[[Event], None]

    def run(self) -> Row:
        """Enrol the unit and return its row in ATTESTED.

        Raises:
            PortError: the port cannot be opened, is another station's, or went away and stayed away.
            LinkError: nothing on it answers.
            EnrollmentRefusedError: the unit is refused.
            RegistryError, AuthorityError: the station could not do its part.
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
            line, self.journal, self.wish, random_bytes=secrets.token_bytes, is_local=self.name.is_local
        )
        with port:
            return drive(machine.run(), port, self.watch)

    def _replugged(self, error: PortError) -> SerialPort:
        deadline_s = time.monotonic() + timers.REPLUG_S
        while True:
            try:
                return SerialPort(self.name, self.baud)
            except PortError:
                # Also while udev is still at work on the new node's owner and mode.
                if time.monotonic() >= deadline_s:
                    raise error from None
            time.sleep(_LOOK_EVERY_S)


def drive(machine: Generator[Effect, bytes, Row], port: SerialPort, watch: Callable[[Effect], None]) -> Row:
    """Do what the machine asks for, on a port and by the real clock, until it ends."""
    reply = b""
    try:
        effect = next(machine)
        while True:
            match effect:
                case Send(data):
                    port.write(data)
                    reply = b""
                case Read(until_s):
                    reply = port.read(until_s - time.monotonic())
                case _:
                    watch(effect)
                    reply = b""
            effect = machine.send(reply)
    except StopIteration as end:
        row: Row = end.value
        return row
