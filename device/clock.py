"""What a device knows of the time, and whether certificates can be valid by it (RFC 5280 §4.1.2.5, docs/clock.md).

A small board starts in 1970, or where a dead battery left it. What it does know is a *floor*: a moment that has
passed for certain.

Rules:

- The floor is the latest of: when the identity was issued, the last good connection, and, where the owner wants
  it, what the gateway told. It moves on with the time that passes (CLOCK_BOOTTIME), and never back.
- At or above the floor the system's clock counts, and OpenSSL checks certificates by it; as it does while it is
  less than `SET_BACK` below: a clock that was ahead when it moved the floor, and was put right since, is right.
- Further below the floor it is certainly wrong: now is some moment from the floor on. Certificates pass if there
  is one at which all of them are valid. What ended before the floor has ended for certain; what begins after it
  may have begun since, and a device that was in a drawer while its gateway's certificate was renewed connects.
- Only the system's clock at a handshake moves the floor, and only if every certificate of the gateway's chain was
  valid at that moment. So a clock that once said 2099 moves it nowhere, and one that is wrong by less moves it no
  further than the gateway's certificate reaches.
- On disk the floor is one small file, written when it has moved on by an hour, at a new connection by a minute.
  One that is missing or damaged costs no more than what it held: the identity has its own floor.
"""

from __future__ import annotations

import logging
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from birthmark.device.certificate_facts import certificate_facts
from birthmark.device.durable import write_durably
from birthmark.device.errors import BirthmarkError
from birthmark.device.frozen import Frozen
from birthmark.device.json_fields import Fields, dump

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from birthmark.device.certificate_facts import CertificateFacts
    from birthmark.device.credentials import Credentials

FLOOR_FILE: Final = "clock"
SET_BACK: Final = timedelta(minutes=5)
KEPT_EVERY: Final = timedelta(hours=1)
KEPT_AFTER_CONNECTING: Final = timedelta(minutes=1)
_MAX_FILE_BYTES: Final = 1024

_log = logging.getLogger(__name__)


class Moment(Frozen):
    """The time, as far as it is known."""

    at: datetime
    or_later: bool = False
    """Whether it is only the floor: now is `at`, or any moment after it."""


def out_of_time(certificates: Sequence[CertificateFacts], moment: Moment) -> CertificateFacts | None:
    """Return the first certificate that is not valid, with all the others, at the moment; None if all are.

    Both ends of a validity belong to it (RFC 5280 §4.1.2.5). With `or_later` it is enough that there is a
    moment, `moment.at` or a later one, at which all of them are valid.
    """
    at = moment.at
    if moment.or_later:
        at = max(at, *(certificate.not_before for certificate in certificates))
    return next((certificate for certificate in certificates if certificate.out_of_time_at(at)), None)


def _system() -> datetime:
    return datetime.now(UTC)


def _elapsed_s() -> float:
    """Seconds since some moment, the time in a suspend among them."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Clock:
    """The system's clock and the floor of one identity. May be used from any thread.

    Args:
        floor: a moment that has passed for certain; None: nothing is known, and the system's clock counts.
        path: the file that the floor is kept in; None: it is not kept.
        kept: what that file holds.
        system: the system's clock.
        elapsed_s: seconds that have passed since some moment.
    """

    def __init__(
        self,
        floor: datetime | None = None,
        *,
        path: Path | None = None,
        kept: datetime | None = None,
        system: Callable[[], datetime] = _system,
        elapsed_s: Callable[[], float] = _elapsed_s,
    ) -> None:
        self.system = system
        self._elapsed_s = elapsed_s
        self._path = path
        self._lock = threading.Lock()
        self._floor = max((each for each in (floor, kept) if each is not None), default=None)
        self._floor_at_s = elapsed_s()
        self._kept = kept
        self._look_at_s = self._floor_at_s
        self._has_failed = False
        self._chain: tuple[CertificateFacts, ...] = ()
        """The gateway's, of the last good connection."""

    @classmethod
    def of(
        cls, credentials: Credentials, *, system: Callable[[], datetime] = _system, writes: bool = True
    ) -> Clock:
        """Return the clock of an identity: a device's has a floor, kept in its state folder.

        Args:
            credentials: whose.
            system: the system's clock.
            writes: whether it writes the floor down when it moves; otherwise it only goes by what is kept.
        """
        if credentials.issued_at is None:
            return cls(system=system)
        path = credentials.pem_path.parent / FLOOR_FILE
        kept = kept_floor(path, credentials)
        return cls(credentials.issued_at, path=path if writes else None, kept=kept, system=system)

    @property
    def floor(self) -> datetime | None:
        """The moment that has passed for certain."""
        with self._lock:
            return self._moved()

    def moment(self) -> Moment:
        """Return the time as far as it is known."""
        system, floor = self.system(), self.floor
        return Moment(system) if floor is None or system >= floor - SET_BACK else Moment(floor, or_later=True)

    def now(self) -> datetime:
        """Return the best guess at the time: the system's clock, or the floor if that clock is wrong."""
        return self.moment().at

    def connected(self, moment: Moment, chain: Sequence[CertificateFacts] = ()) -> None:
        """Take note of a good connection, at a moment when all of the gateway's certificates were valid.

        The file is written if that is news; that it cannot be written is logged, and stops nothing.
        """
        self._chain = tuple(chain)
        self._move_to(moment.at)
        self._keep(KEPT_AFTER_CONNECTING)

    def told(self, at: datetime, own: CertificateFacts) -> bool:
        """Move the floor forward to the gateway's time, if its certificates and ours are valid then.

        Args:
            at: the time, from the gateway of the last good connection.
            own: our certificate; the gateway let us in, so by its clock it is valid.

        Returns:
            Whether it could be true; if not, nothing is changed.
        """
        if out_of_time([*self._chain, own], Moment(at)) is not None:
            return False
        self._move_to(at)
        self._keep(KEPT_AFTER_CONNECTING)
        return True

    def keep(self) -> None:
        """Write the floor down if it has moved on for long enough; costs next to nothing if it has not."""
        if self._elapsed_s() >= self._look_at_s:
            self._keep(KEPT_EVERY)

    def _move_to(self, at: datetime) -> None:
        with self._lock:
            floor = self._moved()
            if floor is None and self._path is None:
                return
            if floor is None or at > floor:
                self._floor, self._floor_at_s = at, self._elapsed_s()

    def _moved(self) -> datetime | None:
        if self._floor is None:
            return None
        return self._floor + timedelta(seconds=max(0.0, self._elapsed_s() - self._floor_at_s))

    def _keep(self, step: timedelta) -> None:
        with self._lock:
            floor, self._look_at_s = self._moved(), self._elapsed_s() + KEPT_EVERY.total_seconds()
            if self._path is None or floor is None or (self._kept is not None and floor - self._kept < step):
                return
            try:
                write_durably(self._path, dump({"floor": int(floor.timestamp())}) + b"\n")
            except OSError as error:
                if not self._has_failed:
                    _log.warning("could not keep the time in %s: %s", self._path, error.strerror or error)
                self._has_failed = True
            else:
                self._kept, self._has_failed = floor, False


def kept_floor(path: Path, credentials: Credentials) -> datetime | None:
    """Return the floor that was kept, or None if there is none that can be true.

    No good connection can have been after the end of every trust anchor: such a floor is damage.
    """
    try:
        with path.open("rb") as file:
            fields = Fields("record of the time", file.read(_MAX_FILE_BYTES))
        floor = datetime.fromtimestamp(fields.whole("floor"), UTC)
        end = max(certificate_facts(anchor_der).not_after for anchor_der in credentials.anchors_der)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, OverflowError, BirthmarkError) as error:
        cause = error.message if isinstance(error, BirthmarkError) else str(error)
        _log.warning("going by the time of enrollment: could not use %s: %s", path, cause)
        return None
    if floor > end:
        _log.warning("going by the time of enrollment: %s is from after the end of every trust anchor", path)
        return None
    return floor
