"""A device on the bench: an agent with a clock that the test turns, and stations that reach it directly."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from support.reference_station import DirectLine, ReferenceCa, ReferenceEnrollment, ReferenceStation

from birthmark.device.agent import keys
from birthmark.device.agent.enrollment import Board, Step, Surroundings
from birthmark.device.agent.machine import Agent
from birthmark.device.agent.slots import Slots
from birthmark.device.link.messages import KeyMode

if TYPE_CHECKING:
    from pathlib import Path

HWID = bytes.fromhex("a1b2c3d4e5f60718293a4b5c")


@cache
def reference_ca(name: str = "Reference") -> ReferenceCa:
    """One CA for the whole test run."""
    return ReferenceCa(name)


class Clock:
    """Monotonic seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_s(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


@dataclass
class Bench:
    """One device; `reboot` starts its agent anew on the same records."""

    folder: Path
    hwid: bytes = HWID
    key_modes: KeyMode = KeyMode.BOTH
    max_bundle_bytes: int = 16384
    clock: Clock = field(default_factory=Clock)
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reboot()

    def reboot(self) -> None:
        """Lose what is in RAM."""
        self.slots = Slots(self.folder)
        board = Board(self.hwid, "bench", "1.0.0", self.key_modes, self.max_bundle_bytes)
        outside = Surroundings(self.clock, secrets.token_bytes, keys.make_key, self.steps.append)
        self.agent = Agent(self.slots, board, outside)

    def station(self, **options: Any) -> ReferenceStation:
        """A station on a freshly opened port."""
        line = DirectLine(lambda data: self.agent.receive(data))  # noqa: PLW0108 - of the boot that is running
        return ReferenceStation(line, **options)

    def send(self, data: bytes) -> bytes:
        """Everything that the device says to these bytes."""
        return b"".join(self.agent.receive(data))

    def enrol(self, device_id: str = "unit-1", **options: Any) -> ReferenceEnrollment:
        """Enrol it, all the way."""
        enrollment = ReferenceEnrollment(reference_ca(), device_id, **options)
        enrollment.run(self.station())
        return enrollment

    def files(self) -> dict[str, bytes]:
        """Every file of the state folder, by name."""
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}
