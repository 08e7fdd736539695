"""One board that does not exist: the device's own agent on a pty and, once enrolled, the device's own client.

Rules:

- Nothing of the device is imitated: `birthmark.device.agent` answers on the port, `birthmark.device.client` talks
  to the broker, and the state folder is what `birthmark-device` would use.
- The hardware id is random, made once and kept: every board on this machine is a board of its own.
- The client starts when the agent says that it committed, not when somebody looks; a new enrollment ends the
  client of the old identity.
- What happens is told as records, `{"event": ..., "board": N, ...}`, from several threads: `report` bears that.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from dataclasses import dataclass
from enum import Enum
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final

from birthmark.device.agent.enrollment import Board, Step, Surroundings
from birthmark.device.agent.machine import Agent
from birthmark.device.agent.slots import Slots
from birthmark.device.agent.tty import serve
from birthmark.device.client import Client
from birthmark.device.errors import BirthmarkError, ConfigurationError
from birthmark.device.events import AttemptFailed, Connected, Disconnected, Event, SubscriptionDenied
from birthmark.device.link.messages import KeyMode
from birthmark.firmware_sim.terminal import Terminal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from birthmark.device.agent.stop import Stop

    Report = Callable[[dict[str, Any]], None]

MODEL: Final = "birthmark-sim"
FIRMWARE: Final = "1.0"
HWID_BYTES: Final = 16
LINK_NAME: Final = "tty"


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How a simulated board behaves.

    Args:
        online: whether it connects to its broker once it is enrolled.
        interval_s: between two readings.
        key_modes: which it offers in HELLO.
    """

    online: bool = False
    interval_s: float = 1.0
    key_modes: KeyMode = KeyMode.BOTH

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
    """A board with a state folder of its own; `run` is its power-on time.

    Args:
        number: what it is called in reports.
        folder: the agent's state folder, with a link `tty` to the pty in it.
        behaviour: how it behaves.
        report: is told what happens, from the board's own threads.
    """

    def __init__(self, number: int, folder: Path, behaviour: Behaviour, report: Report) -> None:
        self._number = number
        self._behaviour = behaviour
        self._report = report
        self._slots = Slots(folder)
        self._wishes: SimpleQueue[_Wish] = SimpleQueue()

    def run(self, stop: Stop) -> None:
        """Serve the port until `stop`.

        Raises:
            SystemFailureError: another agent uses the folder, or it cannot be written.
            CredentialError: the active slot is damaged.
            OSError: there is no pty to be had.
        """
        with self._slots.exclusive():
            board = Board(
                hwid=self._slots.kept_hwid(secrets.token_bytes, HWID_BYTES),
                model=MODEL,
                firmware=FIRMWARE,
                key_modes=self._behaviour.key_modes,
            )
            surroundings = Surroundings(
                clock=time.monotonic, random_bytes=secrets.token_bytes, watch=self._stepped
            )
            agent = Agent(self._slots, board, surroundings)
            active = self._slots.active()
            with Terminal(self._slots.folder / LINK_NAME) as terminal:
                self._tell(
                    "ready",
                    path=str(terminal.path),
                    link=str(terminal.link_path),
                    hwid=board.hwid.hex(),
                    id=None if active is None else str(active.bundle.config.device_id),
                )
                client = threading.Thread(target=self._live, name=f"board-{self._number}")
                client.start()
                try:
                    if active is not None:
                        self._wishes.put(_Wish.CONNECT)
                    serve(terminal.board_fd, agent, stop)
                finally:
                    self._wishes.put(_Wish.STOP)
                    client.join()

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
