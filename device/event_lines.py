"""What happens to a client, as lines: for people, and as JSON records."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from birthmark.device.backoff import OF_THE_IDENTITY
from birthmark.device.errors import ConnectionFailedError, RefusedError
from birthmark.device.escape import escaped
from birthmark.device.events import (
    AttemptFailed,
    Connected,
    Disconnected,
    Event,
    HandlerFailed,
    OutboxChanged,
    RenewalChanged,
    SubscriptionDenied,
)
from birthmark.device.systemd import is_journal

if TYPE_CHECKING:
    from birthmark.device.console import Console


LONGEST_WARNING = 1024


PRIORITIES = {
    "refused": 3,
    "no_identity": 3,
    "handler_failed": 3,
    "unreachable": 4,
    "disconnected": 4,
    "denied": 4,
    "warning": 4,
    "not_published": 4,
}
"""Of what is not merely said (syslog(3): 3 is an error, 4 a warning, 6 the rest)."""


def show(console: Console, event: Event, *, is_last: bool = False) -> None:
    """Print one event; `is_last`: a failure ends the command, and no other attempt follows."""
    match event:
        case Connected():
            resumed = ", resumed" if event.tls_resumed else ""
            floor = event.moment.at.isoformat(timespec="seconds") if event.moment.or_later else None
            wrong = f"\n          this machine's clock is wrong: {floor} has passed" if floor else ""
            say(
                console,
                "connected",
                f"connected to {event.broker} as {event.client_id} ({event.tls_version}{resumed}){wrong}",
                broker=str(event.broker),
                client_id=event.client_id,
                tls=event.tls_version,
                resumed=event.tls_resumed,
                session_present=event.session_present,
                clock_is_before=floor,
            )
        case Disconnected():
            _failed(console, "disconnected", event.error, None if is_last else event.retry_in_s)
        case AttemptFailed():
            kind = "refused" if isinstance(event.error, RefusedError) else "unreachable"
            _failed(console, kind, event.error, None if is_last else event.retry_in_s, renews=event.renews)
        case SubscriptionDenied():
            say(console, "denied", event.in_words(), filter=escaped(event.topic_filter))
        case RenewalChanged():
            shown = escaped(event.detail, LONGEST_WARNING)
            then = "" if event.retry_in_s is None else f"\n          next attempt within {event.retry_in_s:.0f} s"
            say(
                console,
                "renewal",
                f"certificate: {shown}{then}",
                state=event.state,
                detail=shown,
                retry_in_s=None if event.retry_in_s is None else round(event.retry_in_s, 3),
            )
        case OutboxChanged():
            shown = escaped(event.detail)
            say(console, "outbox", shown, state=event.state, detail=shown)
        case HandlerFailed():
            say(console, "handler_failed", event.in_words(), topic=escaped(event.topic))


def show_warnings(console: Console) -> None:
    """Print what the library logs from now on, as events; what it tells an observer of is not printed twice."""
    logging.getLogger("birthmark.device").addHandler(_Warnings(console))


class _Warnings(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info is None:  # a callback's exception is an event of its own
            shown = escaped(record.getMessage(), LONGEST_WARNING)
            say(self._console, "warning", f"warning: {shown}", text=shown)


def say(console: Console, name: str, text: str, /, **facts: Any) -> None:
    """Print one line: `{"event": name, "at": ..., **facts}`, or the text; in the journal with its priority."""
    now = datetime.now(UTC)
    if is_journal(sys.stdout):
        line = f"<{PRIORITIES.get(name, 6)}>{'; '.join(part.strip() for part in text.splitlines())}"
    else:
        line = f"{now:%H:%M:%S}  {text}"
    console.emit({"event": name, "at": now.isoformat(timespec="milliseconds"), **facts}, line)


def _failed(
    console: Console, name: str, error: ConnectionFailedError, retry_in_s: float | None, *, renews: bool = False
) -> None:
    first = f"renewing at the renewal listener now; {'else the ' if retry_in_s else ''}" if renews else ""
    then = "" if retry_in_s is None else f"\n          {first}{_next(error, retry_in_s)}"
    say(
        console,
        name,
        f"{error.message}\n          {error.hint}{then}",
        check=error.check,
        reason=error.message,
        hint=error.hint,
        retry_in_s=None if retry_in_s is None else round(retry_in_s, 3),
        **({"renews": True} if renews else {}),
    )


def _next(error: ConnectionFailedError, retry_in_s: float) -> str:
    if not retry_in_s:
        return "trying the next broker"
    unit_s, unit = next((unit_s, unit) for unit_s, unit in _UNITS if retry_in_s >= 1.5 * unit_s or unit_s == 1)
    shown = f"{retry_in_s / unit_s:.1f} {unit}"
    rarely = "; an identity that is refused is tried less and less often" if error.check in OF_THE_IDENTITY else ""
    return f"next attempt in {shown}{rarely}"


_UNITS = ((3600, "h"), (60, "min"), (1, "s"))
