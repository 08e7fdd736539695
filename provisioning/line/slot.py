"""One slot of a fixture: the units on its port, one after the other, each tried until it is made or refused.

Rules:

- Every attempt is a whole enrollment from HELLO: the journal decides how to go on, so a retry is a resume.
- A line that fails after HELLO is tried again; a refusal is not, and neither is a port on which nothing answers.
- A registry whose server went away is waited for, and no attempt is counted; then the unit goes on from HELLO.
- What happens is told as reports, from the slot's own thread; a person's Ctrl-C ends it between two actions, with
  word in the audit log of how far the unit got.
- With `again`, the slot waits for the next board: for a port that comes, a HELLO that is answered, another hwid.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from birthmark.device.errors import BirthmarkError, EnrollmentRefusedError, LinkError, PortError, RegistryError
from birthmark.provisioning.enrollment.enrol import Reached, Step, Stored
from birthmark.provisioning.enrollment.exchange import NoAnswerError
from birthmark.provisioning.enrollment.outcomes import Attempt, Outcome, code_of, failed_step
from birthmark.provisioning.enrollment.session import Replugged, Session, StoppedError, Unplugged
from birthmark.provisioning.enrollment.verdict import Verdict
from birthmark.provisioning.line.unit_ids import NoIdError
from birthmark.provisioning.registry.interface import DuplicateError, RegistryAwayError
from birthmark.provisioning.registry.model import State

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from birthmark.device.link.messages import HelloAnswer
    from birthmark.provisioning.enrollment.journal import Wish
    from birthmark.provisioning.enrollment.session import Event
    from birthmark.provisioning.enrollment.transitions import Transitions
    from birthmark.provisioning.line.port_choice import SlotPort
    from birthmark.provisioning.line.unit_ids import IdSource
    from birthmark.provisioning.registry.model import Row

DEFAULT_TRIES: Final = 4
"""A line that loses one byte in two hundred gets a board through within four attempts."""
LOOK_EVERY_S: Final = 0.3
REGISTRY_PATIENCE_S: Final = 600.0
"""How long the registry's server may be away: a restart, or a person who is called."""


@dataclass(frozen=True, slots=True)
class Stepped:
    """A step was answered well."""

    slot: str
    device_id: str
    hwid: bytes
    step: Step
    elapsed_s: float
    """Since the unit was begun."""


@dataclass(frozen=True, slots=True)
class Noted:
    """Something that is no step: a cable out, a slot that waits, a scan that is wanted."""

    slot: str
    kind: str
    """`waiting`, `unplugged`, `replugged`, `registry`, `idle`, `id` or `confirm`."""
    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """An attempt at a unit ended."""

    slot: str
    attempt: Attempt
    retries: int
    """Attempts at this unit before this one."""
    is_final: bool
    """Whether the unit is not tried again."""
    row: Row | None = None
    """As far as the unit got."""
    error: BirthmarkError | None = None


@dataclass(frozen=True, slots=True)
class Announced:
    """Something of no one slot: a CRL that was brought while the line runs."""

    record: dict[str, Any]
    """The JSON object that says it."""
    text: str


Report = Stepped | Noted | Ended | Announced


class _SameUnitError(Exception):
    """The board that was last on this slot is still there; never leaves this module."""


@dataclass(slots=True)
class _Progress:
    """How far one attempt is."""

    begun_s: float
    wish: Wish | None = None
    row: Row | None = None
    reached: Step | None = None
    hwid: bytes = b""

    @property
    def device_id(self) -> str:
        if self.row is not None:
            return self.row.name
        return self.wish.device_id.text if self.wish is not None else ""


@dataclass(slots=True)
class Slot:
    """A slot at work; `run` is its thread.

    Args:
        port: where its boards are.
        journal: the station's, shared by all slots.
        ids: what new units are to be, shared by all slots.
        tell: takes the reports.
        stop: set when a person stops the line.
        tries: attempts at a unit, at most.
        again: whether to wait for another board when one is done.
    """

    port: SlotPort
    journal: Transitions
    ids: IdSource
    tell: Callable[[Report], None]
    stop: threading.Event
    tries: int = DEFAULT_TRIES
    again: bool = False
    _last: bytes | None = field(default=None, init=False)
    """The hwid of the board that is done, as long as it stays."""
    _waits: bool = field(default=False, init=False)
    _said: str = field(default="", init=False)
    """The code of what is on the port instead of a board, once that was reported."""

    def run(self) -> None:
        """Make the unit on the port, or one after the other; what becomes of them is in the reports."""
        goes_on = True
        while goes_on and not self.stop.is_set():
            goes_on = self._make() and self.again

    def _make(self) -> bool:
        """Try the unit that is on the port until it is made or refused; return whether there may be another."""
        begun_s, retries = time.monotonic(), 0
        while True:
            progress = _Progress(begun_s)
            try:
                progress.row = self._session(progress).run()
            except _SameUnitError:
                return self._wait("take the board out, and put in the next one")
            except StoppedError as error:
                self._end(progress, Outcome.STOPPED, retries, error=error)
                return False
            except BirthmarkError as error:
                if isinstance(error, NoIdError) and progress.reached is Step.HELLO:
                    self.tell(Noted(self.port.slot, "idle", error.message))
                    return False
                if self._is_empty(error, progress):
                    self._last = None
                    return self._wait("put in a board")
                if self._takes_another_id(error, progress) or self._waited_for_registry(error, progress):
                    continue
                is_final = not (isinstance(error, LinkError) and progress.reached) or retries + 1 >= self.tries
                self._end(progress, Outcome.FAIL, retries, error=error, is_final=is_final)
                if is_final:
                    return True
                retries += 1
            else:
                self._end(progress, Outcome.PASS, retries)
                return True

    def _session(self, progress: _Progress) -> Session:
        def choose(hello: HelloAnswer, row: Row | None) -> Wish:
            progress.hwid = hello.hwid
            if self.again and hello.hwid == self._last:
                raise _SameUnitError
            self._waits, self._said = False, ""
            progress.row = row
            progress.wish = self.ids.wish(self.port.slot, hello.hwid, row)
            self._step(progress, Step.HELLO)
            return progress.wish

        def watch(event: Event) -> None:
            match event:
                case Reached(step, hello):
                    progress.reached, progress.hwid = step, hello.hwid
                    if step is not Step.HELLO:  # told once it is known which unit this is
                        self._step(progress, step)
                case Stored(row):
                    progress.row = row
                case Unplugged(error):
                    self.tell(Noted(self.port.slot, "unplugged", error.message))
                case Replugged():
                    self.tell(Noted(self.port.slot, "replugged", "the port is back"))

        def confirm(hello: HelloAnswer, row: Row) -> None:
            self.ids.confirm(self.port.slot, hello.hwid, row)

        port = self.port
        return Session(port.name, port.baud, self.journal, choose, watch, confirm, self.stop.is_set)

    def _step(self, progress: _Progress, step: Step) -> None:
        elapsed_s = time.monotonic() - progress.begun_s
        self.tell(Stepped(self.port.slot, progress.device_id, progress.hwid, step, elapsed_s))

    def _end(
        self,
        progress: _Progress,
        outcome: Outcome,
        retries: int,
        *,
        error: BirthmarkError | None = None,
        is_final: bool = True,
    ) -> None:
        if progress.wish is not None and progress.row is None:
            self.ids.give_back(progress.wish, taken=False)
        attempt = Attempt(
            outcome,
            progress.device_id,
            progress.hwid,
            failed_step(error, progress.reached) if error is not None else "",
            code_of(error) if error is not None else "",
            (time.monotonic() - progress.begun_s) * 1000,
        )
        with suppress(BirthmarkError):  # what the registry does not take now was the attempt's own failure
            self._record(progress, attempt, error)
        if is_final:
            self._last = progress.hwid or None
            self._said = attempt.code if not progress.hwid else ""
        self.tell(Ended(self.port.slot, attempt, retries, is_final, progress.row, error))

    def _record(self, progress: _Progress, attempt: Attempt, error: BirthmarkError | None) -> None:
        """Leave word in the audit log."""
        row = progress.row
        if attempt.outcome is Outcome.STOPPED and row is not None and not row.state.reached(State.ATTESTED):
            self.journal.interrupted(row)
        if isinstance(error, EnrollmentRefusedError):
            self.journal.refused(attempt.device_id or f"slot {self.port.slot}", error.message)
        if attempt.outcome is not Outcome.STOPPED or attempt.hwid:
            self.journal.attempted(attempt)

    def _is_empty(self, error: BirthmarkError, progress: _Progress) -> bool:
        """Whether a slot that waits for boards has none at present."""
        if not self.again or progress.reached is not None:
            return False
        if isinstance(error, PortError) or (isinstance(error, NoAnswerError) and error.verdict is Verdict.SILENT):
            return True
        return isinstance(error, LinkError) and code_of(error) == self._said

    def _takes_another_id(self, error: BirthmarkError, progress: _Progress) -> bool:
        """Whether another process was faster with this id, and the source has others."""
        wish = progress.wish
        if (
            not isinstance(error, DuplicateError)
            or error.field != "name"
            or wish is None
            or progress.row is not None
        ):
            return False
        self.ids.give_back(wish, taken=True)
        progress.wish = None
        return True

    def _waited_for_registry(self, error: BirthmarkError, progress: _Progress) -> bool:
        """Whether it was the registry that was away, and is to be asked again: it is back, or the line stops."""
        if not isinstance(error, RegistryAwayError):
            return False
        if progress.wish is not None and progress.row is None:
            self.ids.give_back(progress.wish, taken=False)
            progress.wish = None
        self.tell(Noted(self.port.slot, "registry", f"waiting: {error.message}"))
        until_s = time.monotonic() + REGISTRY_PATIENCE_S
        while time.monotonic() < until_s:
            if self.stop.wait(LOOK_EVERY_S):
                return True
            try:
                self.journal.look()
            except RegistryAwayError:
                continue
            except RegistryError:  # another trouble: the next attempt meets it, and says so
                return True
            self.tell(Noted(self.port.slot, "registry", "it is back"))
            return True
        return False

    def _wait(self, text: str) -> bool:
        if not self._waits:
            self._waits = True
            self.tell(Noted(self.port.slot, "waiting", text))
        return not self.stop.wait(LOOK_EVERY_S)
