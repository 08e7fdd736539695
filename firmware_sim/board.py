"""One board that does not exist: the device's own agent on a pty and, once enrolled, the device's own client.

Rules:

- Nothing of the device is imitated: `birthmark.device.agent` answers on the port, `birthmark.device.client` talks
  to the broker, and the state folder is what `birthmark-device` would use.
- The hardware id is random, made once and kept: every board on this machine is a board of its own.
- The client starts when the agent says that it committed, not when somebody looks; a new enrollment ends the
  client of the old identity.
- What is wrong with it, and with its line, is `faults.Faults`; a power cut or a reboot loses what is in RAM, and
  after `BOOT_S` the agent starts anew on the same records.
- What happens is told as records, `{"event": ..., "board": N, ...}`, from several threads: `report` bears that.
"""

from __future__ import annotations

import math
import random
import secrets
import select
import shutil
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field
from enum import Enum
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final

from birthmark.device.agent import keys
from birthmark.device.agent.enrollment import Board, Step, Surroundings
from birthmark.device.agent.machine import Agent
from birthmark.device.agent.slots import Slots
from birthmark.device.agent.tty import serve
from birthmark.device.client import Client
from birthmark.device.errors import BirthmarkError, ConfigurationError
from birthmark.device.events import AttemptFailed, Connected, Disconnected, Event, SubscriptionDenied
from birthmark.device.link.frame import FROM_DEVICE, Frame
from birthmark.device.link.messages import KeyMode
from birthmark.firmware_sim.cable import Cable
from birthmark.firmware_sim.faults import Faults
from birthmark.firmware_sim.foreign import lock_elsewhere
from birthmark.firmware_sim.hostile import HostileBoard
from birthmark.firmware_sim.impostors import ImpostorOnPort
from birthmark.firmware_sim.storage import FailingStorage, PowerCutError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from birthmark.device.agent.stop import Stop
    from birthmark.device.agent.tty import Answering

    Report = Callable[[dict[str, Any]], None]

MODEL: Final = "birthmark-sim"
FIRMWARE: Final = "1.0"
HWID_BYTES: Final = 16
LINK_NAME: Final = "tty"
BOOT_S: Final = 0.3
"""How long it takes to boot after a power cut."""


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How a simulated board behaves.

    Args:
        online: whether it connects to its broker once it is enrolled.
        interval_s: between two readings.
        key_modes: which it offers in HELLO.
        faults: what is wrong with it.
        seed: of the randomness of the faults; each board's own number is added.
    """

    online: bool = False
    interval_s: float = 1.0
    key_modes: KeyMode = KeyMode.BOTH
    faults: Faults = field(default_factory=Faults)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.01 <= self.interval_s <= 86_400:
            raise ConfigurationError(
                f"could not send a reading every {self.interval_s} s: it is out of range",
                hint="--interval takes 0.01 to 86400 seconds",
            )


class _Wish(Enum):
    """What the board's online life is told."""

    CONNECT = "there is a new identity"
    REPORT = "there is a connection: send a reading at once"
    STOP = "the power goes off"


class SimulatedBoard:
    """A board with a state folder of its own; `run` is its time on the bench.

    Args:
        number: what it is called in reports.
        folder: the agent's state folder.
        behaviour: how it behaves, and what is wrong with it.
        report: is told what happens, from the board's own threads.
        link_path: the stable name of its port; by default `tty` in the folder.
    """

    def __init__(
        self, number: int, folder: Path, behaviour: Behaviour, report: Report, link_path: Path | None = None
    ) -> None:
        self._number = number
        self._behaviour = behaviour
        self._faults = behaviour.faults
        self._report = report
        self._slots = Slots(folder, FailingStorage(cut_at=self._faults.cut_at, full_for=self._faults.full_for))
        self._link_path = link_path or folder / LINK_NAME
        self._reboot_at = self._faults.reboot_at
        self._wishes: SimpleQueue[_Wish] = SimpleQueue()

    def run(self, stop: Stop) -> None:
        """Be on the port until `stop`.

        Raises:
            SystemFailureError: another agent uses the folder, or it cannot be written.
            CredentialError: the active slot is damaged.
            OSError: there is no pty to be had.
        """
        with self._slots.exclusive():
            board = self._made()
            active = self._slots.active()
            chance = random.Random(f"{self._behaviour.seed}/{self._number}")
            with Cable(self._link_path, self._faults.on_the_line, chance, self._tell) as cable:
                self._tell(
                    "ready",
                    path=str(cable.path),
                    link=str(cable.link_path),
                    hwid=board.hwid.hex(),
                    id=None if active is None else str(active.bundle.config.device_id),
                    instead=None if self._faults.impostor is None else self._faults.impostor.meaning,
                )
                client = threading.Thread(target=self._live, name=f"board-{self._number}")
                client.start()
                try:
                    if active is not None:
                        self._wishes.put(_Wish.CONNECT)
                    self._serve(cable, board, chance, stop)
                finally:
                    self._wishes.put(_Wish.STOP)
                    client.join()

    def _made(self) -> Board:
        """Do what was done to the board before it came to the bench, and return who it is."""
        if self._faults.copy_of is not None and self._slots.active() is None:
            for record in self._faults.copy_of.iterdir():
                if record.is_file() and (self._faults.copies_hwid or record.name != "hwid"):
                    shutil.copy(record, self._slots.folder)
        # Not by the failing storage: hardware ids and foreign locks are older than what fails here.
        as_made = Slots(self._slots.folder)
        hwid = as_made.kept_hwid(secrets.token_bytes, HWID_BYTES)
        if self._faults.is_foreign:
            lock_elsewhere(as_made, hwid)
        return Board(hwid=hwid, model=MODEL, firmware=FIRMWARE, key_modes=self._behaviour.key_modes)

    def _serve(self, cable: Cable, board: Board, chance: random.Random, stop: Stop) -> None:
        """Answer on the port, boot after boot, until `stop`."""
        if self._faults.impostor is not None:
            serve(cable.board_fd, ImpostorOnPort(self._faults.impostor, chance), stop)
            return
        while not stop.is_set:
            try:
                serve(cable.board_fd, self._booted(board, stop), stop)
            except PowerCutError:
                self._tell("power_cut")
                if _waits(stop, BOOT_S):
                    cable.drain()

    def _booted(self, board: Board, stop: Stop) -> Answering:
        surroundings = Surroundings(
            clock=time.monotonic, random_bytes=secrets.token_bytes, make_key=self._make_key, watch=self._stepped
        )
        agent = Agent(self._slots, board, surroundings)
        lie, at = self._faults.lie, self._faults.lie_at
        if lie is not None and at is not None:
            return HostileBoard(agent, self._slots, lie, at, lambda seconds: _waits(stop, seconds))
        return agent if self._reboot_at is None else _Rebooting(agent, self._answer_or_reboot)

    def _answer_or_reboot(self, answer: bytes) -> bytes:
        """Return an answer of the agent's, or lose the power instead of sending it."""
        if self._reboot_at is not None and Frame.from_run(answer[1:-1]).type == self._reboot_at | FROM_DEVICE:
            self._reboot_at = None
            raise PowerCutError
        return answer

    def _make_key(self) -> keys.PrivateKey:
        scalar = self._faults.key_scalar
        always = None if scalar is None else keys.key_of_scalar(scalar)
        return always or keys.make_key()

    def _stepped(self, step: Step) -> None:
        if step.name == "enrolled":
            self._tell("flashed", id=step.device_id, txn=step.txn.hex() if step.txn else None)
            self._wishes.put(_Wish.CONNECT)
        elif step.name == "refused":
            self._tell("refused", reason=step.detail)

    def _live(self) -> None:
        """Be online with the identity there is, until told to stop."""
        wish = self._wishes.get()
        while wish is not _Wish.STOP:
            if wish is not _Wish.CONNECT or not self._behaviour.online:
                wish = self._wishes.get()
                continue
            try:
                client = Client.from_folder(self._slots.folder, observe=self._observed)
            except BirthmarkError as error:
                self._tell("failed", error=error.message, hint=error.hint)
                wish = self._wishes.get()
                continue
            client.start()
            try:
                wish = self._send_readings(client)
            finally:
                client.stop()
                self._tell("stopped", id=str(client.device_id))

    def _send_readings(self, client: Client) -> _Wish:
        """Publish readings until something is wished for; return the wish."""
        count = 0
        started_s = time.monotonic()
        while True:
            if client.is_connected:
                celsius = round(21 + 3 * math.sin((time.monotonic() - started_s) / 10 + self._number), 2)
                count += 1
                topic = client.telemetry("temperature")
                # A reading that nobody takes is worth nothing later: quality of service 0.
                client.publish(topic, {"celsius": celsius, "count": count}, qos=0)
                self._tell("telemetry", id=str(client.device_id), topic=topic, count=count, celsius=celsius)
            try:
                wish = self._wishes.get(timeout=self._behaviour.interval_s)
            except Empty:
                continue
            if wish is not _Wish.REPORT:
                return wish

    def _observed(self, event: Event) -> None:
        match event:
            case Connected():
                self._tell(
                    "online",
                    id=event.client_id,
                    broker=str(event.broker),
                    tls=event.tls_version,
                    resumed=event.tls_resumed,
                )
                self._wishes.put(_Wish.REPORT)
            case Disconnected():
                self._tell("offline", error=event.error.message, check=event.error.check)
            case AttemptFailed():
                self._tell(
                    "attempt_failed",
                    error=event.error.message,
                    check=event.error.check,
                    retry_in_s=round(event.retry_in_s, 2),
                )
            case SubscriptionDenied():
                self._tell("denied", topic=event.topic_filter)

    def _tell(self, event: str, **facts: object) -> None:
        self._report({"event": event, "board": self._number, **facts})


class _Rebooting:
    """An agent whose board reboots at one of its answers."""

    def __init__(self, agent: Agent, answer_or_reboot: Callable[[bytes], bytes]) -> None:
        self._agent = agent
        self._answer_or_reboot = answer_or_reboot

    def receive(self, data: bytes) -> Generator[bytes, None, None]:
        with closing(self._agent.receive(data)) as answers:
            for answer in answers:
                yield self._answer_or_reboot(answer)

    def busy(self) -> bytes:
        return self._agent.busy()


def _waits(stop: Stop, seconds: float) -> bool:
    """Wait for so long; return whether nobody wished to stop meanwhile."""
    poll = select.poll()
    poll.register(stop.fileno(), select.POLLIN)
    return not poll.poll(seconds * 1000)
