"""What becomes revoked while a line runs, on a CRL and at the gateways while it still runs.

Rules:

- A line may run for days, and what a unit replaces is to be refused now. So a CRL is signed and brought when a
  unit that revoked something has ended; by a thread of its own, for a gateway that is away holds up no board.
- What cannot be signed or brought is told, and tried again with the next unit, and at the line's end.
- Killed, nothing is lost: the revocation is in the registry, and on the next CRL of whatever command.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Self

from birthmark.device.errors import BirthmarkError
from birthmark.provisioning.crl_delivery import bring_unlisted
from birthmark.provisioning.line.slot import Announced, Ended

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from birthmark.provisioning.delivery import Delivery
    from birthmark.provisioning.line.slot import Report
    from birthmark.provisioning.station import Station


class LineRevocations:
    """Brings CRLs for as long as its block lasts.

    Args:
        station: whose line it is.
        revoked: the serial numbers of what was revoked so far; grows in other threads.
    """

    def __init__(self, station: Station, revoked: Mapping[int, str]) -> None:
        self.deliveries: tuple[Delivery, ...] = ()
        """What became of the last CRL that was brought."""
        self._station = station
        self._revoked = revoked
        self._seen = frozenset[int]()
        self._tell: Callable[[Report], None] = lambda _report: None
        self._wake = threading.Event()
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="crl")

    def watching(self, tell: Callable[[Report], None]) -> Callable[[Report], None]:
        """Return what takes a line's reports: it passes them on to `tell`, and goes by them."""
        self._tell = tell

        def told(report: Report) -> None:
            tell(report)
            if isinstance(report, Ended):  # what it has revoked is durable by now
                self._wake.set()

        return told

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over:
            self._wake.wait()
            self._wake.clear()
            revoked = frozenset(self._revoked)
            if self._is_over or revoked <= self._seen:
                continue
            try:
                brought = bring_unlisted(self._station, revoked)
            except (BirthmarkError, OSError) as error:
                cause = error.message if isinstance(error, BirthmarkError) else str(error.strerror or error)
                text = f"revoked certificates are on no CRL yet: {cause}"
                self._tell(Announced({"event": "crl-trouble", "error": cause}, text))
                continue
            if brought is None:
                continue
            self.deliveries = brought.deliveries
            self._seen |= revoked & brought.crls.cert_serials
            self._tell(Announced(brought.record(), brought.described()))
