"""The renewal of a device's certificate, as its client drives it (docs/renewal.md).

    current --due--> key made --asked--> granted --tried--> connected --confirmed--> current
                                             '---refused by the gateways: rolled back

Rules:

- One thread of its own: making a key, signing and writing to the disk cost the connection nothing.
- What was granted is tried in the place of the current certificate, by connecting anew; it becomes the current one
  when the station has confirmed it. Until then the current one stays on disk, and is gone back to after a failure.
- After a restart what was granted is tried first: the station may have confirmed it, and retired the old one.
- Whichever of the two is refused (or leads nowhere, `UNREACHED` times in a row), the other is tried next, with
  growing pauses. After `TRIALS` refusals of what was granted the station is asked about it, with the current one.
- What was granted is given up only when the station says so, signed (`making.is_from_station`): it may have had
  the confirmation, whatever a gateway says, and retired the current one. Nor is it counted on before that.
- Once the current certificate has expired, the gateways' renewal listener is asked, over a connection of its own.
- Nothing here ends the client: a full disk, a refusal, a station that does not answer are reported, and tried
  again later (`schedule`).
"""

from __future__ import annotations

import contextlib
import queue
import random
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

from birthmark.device.certificate_facts import certificate_facts
from birthmark.device.connection_checks import Check
from birthmark.device.errors import BirthmarkError, RefusedError
from birthmark.device.events import RenewalChanged, RenewalState
from birthmark.device.renewal.messages import RenewalAnswer, RenewalRequest
from birthmark.device.renewal.schedule import Pace, due_at

if TYPE_CHECKING:
    from collections.abc import Callable

    from birthmark.device.clock import Clock
    from birthmark.device.credentials import Credentials
    from birthmark.device.errors import ConnectionFailedError
    from birthmark.device.renewal.store import AskedKey, RenewalStore

TRIALS: Final = 3
"""How often a new certificate may be refused by the gateways before the station is asked what has become of it."""
UNREACHED: Final = 2
"""How often nobody is reached with one of two certificates before the other is tried."""
MAX_KEPT: Final = 100
"""Words of other threads that wait while the record cannot be locked."""
LONGEST_NAP_S: Final = 3600.0
"""The wall clock may jump: when a renewal is due is looked at this often."""


class Connection(Protocol):
    """What a renewal needs of the client."""

    def use(self, credentials: Credentials) -> None:
        """Connect anew, with these."""

    def keep(self, credentials: Credentials) -> None:
        """Know the credentials in use by this name from now on; nothing is done with the connection."""

    def publish_request(self, payload: bytes) -> None:
        """Publish on the device's `renewal/request`."""

    def ask_apart(self, credentials: Credentials, payload: bytes, timeout_s: float) -> RenewalAnswer | None:
        """Ask a gateway's renewal listener, over a connection of its own; None if no answer came in time."""

    def tell(self, event: RenewalChanged) -> None:
        """Give an event to the observer."""


class Renewer:
    """Renews one device's certificate for as long as its client lives.

    Args:
        store: the device's record of it.
        connection: the client.
        clock: what is known of the time.
        pace: how long to wait for what.
        uniform: draws a number between two others.
    """

    def __init__(
        self,
        store: RenewalStore,
        connection: Connection,
        *,
        clock: Clock,
        pace: Pace | None = None,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._store = store
        self._connection = connection
        self._clock = clock
        self._uniform = uniform
        self._pace = pace or Pace()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        # The thread's own from here on.
        self._current: Credentials | None = None
        self._candidate: Credentials | None = None
        self._request: RenewalRequest | None = None
        self._answer_by = 0.0
        """When the request counts as lost."""
        self._not_before = 0.0
        """The next attempt, at the earliest (time.monotonic)."""
        self._failures = 0
        self._refused_trials = 0
        self._unreached = 0
        """Attempts in a row that reached nobody with the credentials in use."""
        self._forced = False
        self._is_online_with: bytes = b""
        """The leaf of the connection that is up; empty if none is."""
        self._using: bytes = b""
        """The leaf that the client was last told to connect with; a word about another one comes late."""
        self._current_is_refused = False
        self._is_called_expired = False

    def prepare(self, current: Credentials) -> Credentials:
        """Return the credentials to begin with: what was granted and not confirmed comes before the current ones.

        Raises:
            CredentialError: the slot from the enrollment cannot be read.
        """
        self._current = current
        with contextlib.suppress(BirthmarkError):  # said, and looked at again, before another one takes its place
            self._candidate = self._store.candidate()
        chosen = self._candidate or self._current
        self._using = chosen.leaf_der
        return chosen

    def start(self) -> None:
        """Begin."""
        self._thread = threading.Thread(target=self._run, name="birthmark-renewal", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End; a step that takes longer than `timeout_s` is left alone: each may be cut off anywhere."""
        self._inbox.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    # Told by other threads.

    def settled(self, credentials: Credentials, error: ConnectionFailedError | None) -> None:
        """Take what became of an attempt to connect: connected if there is no error."""
        self._inbox.put(lambda: self._settled(credentials, error))

    def answered(self, payload: bytes) -> None:
        """Take a message from the device's `renewal/answer`."""
        self._inbox.put(lambda: self._read(payload))

    def renew_now(self) -> None:
        """Renew as soon as there is a connection, whenever it is due."""
        self._inbox.put(lambda: self._renew_within(0.0))

    def asks_apart_after(self, error: ConnectionFailedError) -> bool:
        """Whether an attempt that ended like this has the gateways' renewal listener asked, for it has expired."""
        current = self._current
        if current is None or self._candidate is not None or not isinstance(error, RefusedError):
            return False
        return error.check == Check.EXPIRED or self._clock.now() > current.facts.not_after

    # What follows runs on the renewal's thread.

    def _run(self) -> None:
        while True:
            try:
                with self._store.exclusive():
                    while self._take_one():
                        self._guarded(self._step)
                    return
            except BirthmarkError as error:
                self._fail(f"{error.message} ({error.hint})")
            if self._is_over_before(self._not_before):
                return

    def _is_over_before(self, deadline: float) -> bool:
        """Keep what is told meanwhile, the latest of it, until it is time to try again; True at the end."""
        kept: deque[Callable[[], None]] = deque(maxlen=MAX_KEPT)
        while (left_s := deadline - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                job = self._inbox.get(timeout=left_s)
                if job is None:
                    return True
                kept.append(job)
        for job in kept:
            self._inbox.put(job)
        return False

    def _take_one(self) -> bool:
        """Wait for a word from another thread, or for the time of the next step; False at the end."""
        try:
            job = self._inbox.get(timeout=self._nap_s())
        except queue.Empty:
            return True
        if job is None:
            return False
        self._guarded(job)
        return True

    def _guarded(self, step: Callable[[], None]) -> None:
        try:
            step()
        except BirthmarkError as error:
            self._fail(f"{error.message} ({error.hint})" if error.hint else error.message)
        except Exception as error:  # noqa: BLE001 - a defect here must not cost the device its renewals
            self._fail(f"a defect: {type(error).__name__}")

    def _nap_s(self) -> float:
        """Return how long there is nothing to do, if nobody says anything."""
        now_s, current = time.monotonic(), self._current
        nap_s = LONGEST_NAP_S  # what waits for a connection waits for a word about one
        if self._request is not None:
            nap_s = self._answer_by - now_s
        elif self._candidate is not None:
            if self._is_online_with or self._current_is_refused or self._unreached >= UNREACHED:
                nap_s = self._not_before - now_s
        elif self._forced or self._is_due() or self._has_expired():
            if self._is_online_with or self._has_expired():
                nap_s = self._not_before - now_s
        elif current is not None:
            left_s = (due_at(current.facts, current.leaf_der) - self._clock.now()).total_seconds()
            nap_s = left_s + 1 if left_s > 0 else LONGEST_NAP_S
        return min(max(0.0, nap_s), LONGEST_NAP_S)

    def _is_due(self) -> bool:
        current, now = self._current, self._clock.now()
        if current is None or (self._is_online_with and now > current.facts.not_after):
            return False  # the gateway lets us in: it is the clock that is wrong
        return now >= due_at(current.facts, current.leaf_der)

    def _step(self) -> None:
        """Do what it is time for."""
        now_s = time.monotonic()
        if self._request is not None and now_s >= self._answer_by:
            self._request = None
            self._fail("the station did not answer")
        if self._request is not None or now_s < self._not_before:
            return
        candidate = self._candidate
        if candidate is not None:
            if self._is_online_with == candidate.leaf_der:
                self._confirm()
            elif self._is_online_with and self._refused_trials >= TRIALS:
                self._ask()
            elif self._is_online_with or self._current_is_refused or self._unreached >= UNREACHED:
                self._tell("trying", "connecting with the new certificate")
                self._unreached = 0
                self._wait(self._pace.answered_within_s)
                self._use(candidate)
        elif self._forced or self._is_due() or self._has_expired():
            if self._is_online_with:
                self._ask()
            elif self._has_expired():
                self._ask_apart()

    def _has_expired(self) -> bool:
        """Whether the gateway refuses the current certificate because it has expired, by its clock or by ours."""
        current = self._current
        if current is None or not self._current_is_refused:
            return False
        return self._is_called_expired or self._clock.now() > current.facts.not_after

    # --- asking -------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        request = self._new_request()
        self._request, self._answer_by = request, time.monotonic() + self._pace.answered_within_s
        self._connection.publish_request(request.to_bytes())
        self._tell("asked", "asking for a new certificate")

    def _ask_apart(self) -> None:
        if self._current is None:
            return
        request = self._new_request()
        self._tell("asked", "the certificate has expired: asking the gateway's renewal listener")
        answer = self._connection.ask_apart(self._current, request.to_bytes(), self._pace.answered_within_s)
        if answer is None:
            self._fail("the station did not answer")
            return
        self._request = request
        self._take(answer)

    def _new_request(self) -> RenewalRequest:
        # Imported here: a device that does not renew never loads the cryptography library.
        from birthmark.device.renewal import making  # noqa: PLC0415

        current = self._store.current_slot()
        asked = self._asked()
        if asked is None:
            asked = making.new_key(current.bundle.config.device_id)
            self._store.keep_asked(asked)
        return making.renewal_request(current, asked)

    def _asked(self) -> AskedKey | None:
        """Return the key that a certificate is asked for: that of what was granted, if it is asked about."""
        from birthmark.device.renewal import making  # noqa: PLC0415

        if self._candidate is None:
            self._candidate = self._store.candidate()  # there is one if it could not be read at the start
        return self._store.asked() if self._candidate is None else making.key_of(self._store.candidate_slot())

    # --- what comes back ----------------------------------------------------------------------------------

    def _read(self, payload: bytes) -> None:
        self._take(RenewalAnswer.from_bytes(payload))

    def _take(self, answer: RenewalAnswer) -> None:
        if answer.outcome == "renew-now":
            if not self._forced and self._is_from_station(answer):
                self._renew_within(float(answer.retry_after_s))
            return
        request = self._request
        if request is None or answer.nonce != request.nonce:
            return  # of an attempt before, or of somebody else's session of this identity
        if answer.outcome == "refused":
            self._request = None
            self._refused(request, answer)
        elif answer.outcome == "issued" and request.kind == "renew":
            self._request = None
            self._granted(answer, request)
        elif answer.outcome == "confirmed" and request.kind == "confirm":
            self._request = None
            self._confirmed(answer)

    def _is_from_station(self, answer: RenewalAnswer, *, about_new: bool = False) -> bool:
        """Whether an answer about the current certificate, or about what was granted, is the station's."""
        from birthmark.device.renewal import making  # noqa: PLC0415

        slot = self._store.candidate_slot() if about_new else self._store.current_slot()
        return making.is_from_station(answer, slot)

    def _renew_within(self, spread_s: float) -> None:
        if self._candidate is None and self._request is None:
            self._forced = True
            self._failures = 0
            self._not_before = time.monotonic() + self._uniform(0.0, spread_s)

    def _granted(self, answer: RenewalAnswer, request: RenewalRequest) -> None:
        from birthmark.device.renewal import making  # noqa: PLC0415

        asked, current = self._asked(), self._store.current_slot()
        if asked is None:
            raise BirthmarkError("could not take a renewed certificate: its key is gone")
        # What cannot be taken may be the gateway's doing: the same key asks again.
        slot = making.granted(answer, request, current=current, asked=asked, moment=self._clock.moment())
        if self._candidate is None or self._candidate.leaf_der != slot.bundle.leaf_der:
            self._failures = 0
        self._candidate = self._store.keep_candidate(slot)
        self._refused_trials = 0
        self._not_before = 0.0
        facts = certificate_facts(slot.bundle.leaf_der)
        anchors = ", and new trust anchors" if answer.anchors is not None else ""
        self._tell("granted", f"a certificate until {facts.not_after:%Y-%m-%d}{anchors}")

    def _refused(self, request: RenewalRequest, answer: RenewalAnswer) -> None:
        reason = answer.reason or "no reason was given"
        if not self._is_from_station(answer, about_new=request.kind == "confirm"):
            # The gateway's own, or of a station that does not know us: it costs this attempt, and no key.
            self._fail(f"refused, without the station's signature: {reason}", at_least_s=answer.retry_after_s)
            return
        if self._candidate is not None:
            self._roll_back(f"the station gives it up: {reason}")
            return
        # It ends this attempt: its key is not used again.
        self._store.drop()
        wait_s = float(answer.retry_after_s) if answer.retry else self._pace.refused_wait_s
        self._forced = self._forced and answer.retry
        self._fail(f"the station refused: {reason}", state="refused", at_least_s=wait_s)

    # --- trying and confirming ----------------------------------------------------------------------------

    def _settled(self, credentials: Credentials, error: ConnectionFailedError | None) -> None:
        candidate, current = self._candidate, self._current
        is_candidate = candidate is not None and credentials.leaf_der == candidate.leaf_der
        was_online, self._is_online_with = self._is_online_with, credentials.leaf_der if error is None else b""
        is_refused = isinstance(error, RefusedError)
        is_late = credentials.leaf_der != self._using  # the other one is being connected with already
        self._unreached = 0 if error is None or is_refused or was_online else self._unreached + 1
        if not is_candidate:
            self._current_is_refused = is_refused
            self._is_called_expired = error is not None and error.check == Check.EXPIRED
            if is_refused and self._refused_trials == 0 and not is_late:
                self._not_before = 0.0
        elif error is None:
            self._refused_trials = 0
            self._not_before = 0.0
        elif not is_late and (is_refused or self._unreached >= UNREACHED):
            self._refused_trials += is_refused
            if current is not None:
                self._unreached = 0
                self._fail(f"could not connect with it: {error.message}")
                self._use(current)

    def _use(self, credentials: Credentials) -> None:
        self._using = credentials.leaf_der
        self._connection.use(credentials)

    def _confirm(self) -> None:
        from birthmark.device.renewal import making  # noqa: PLC0415

        request = making.confirmation(self._store.candidate_slot())
        self._request, self._answer_by = request, time.monotonic() + self._pace.answered_within_s
        self._connection.publish_request(request.to_bytes())
        self._tell("confirming", "connected with the new certificate")

    def _confirmed(self, answer: RenewalAnswer) -> None:
        if not self._is_from_station(answer, about_new=True):
            self._fail("a confirmation without the station's signature")
            return
        self._current, self._candidate = self._store.confirm(), None
        self._failures = 0
        self._forced = self._current_is_refused = False
        self._connection.keep(self._current)
        if self._using != self._current.leaf_der:
            # The gateway fell over meanwhile, and what was asked went out by the old one, which is to be retired.
            self._use(self._current)
        facts = self._current.facts
        self._tell("renewed", f"renewed until {facts.not_after:%Y-%m-%d}")

    def _roll_back(self, why: str) -> None:
        self._store.drop()
        self._candidate, self._request, self._refused_trials = None, None, 0
        self._fail(why, state="rolled-back")
        if self._current is not None and self._using != self._current.leaf_der:
            self._use(self._current)

    # --- what is said -------------------------------------------------------------------------------------

    def _fail(self, why: str, *, state: RenewalState = "failed", at_least_s: float = 0.0) -> None:
        wait_s = max(at_least_s, self._pace.repeat.wait_s(self._failures, self._uniform))
        self._failures += 1
        self._wait(wait_s)
        self._tell(state, why, retry_in_s=wait_s)

    def _wait(self, wait_s: float) -> None:
        self._not_before = time.monotonic() + wait_s

    def _tell(self, state: RenewalState, detail: str, *, retry_in_s: float | None = None) -> None:
        self._connection.tell(RenewalChanged(state, detail, retry_in_s))
