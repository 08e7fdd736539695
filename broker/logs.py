"""The broker's log: one line an event on stderr, in plain words or as JSON.

Rules: what a client said is escaped where it is logged; a line never holds key material. With `--json` a record
has `time`, `level`, `message`, and the fields of its event (`event`, `id`, `address`, `reason`, ...).
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from functools import lru_cache


class PlainFormatter(logging.Formatter):
    """`2026-01-31T10:00:00.123Z warning denied: ...`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, or more if an exception comes with it."""
        line = f"{_time(record)} {record.levelname.lower():<7} {record.getMessage()}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        fields = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return _encode(fields)


_encode = json.JSONEncoder(default=str, separators=(",", ":")).encode


def log_to_stderr(*, as_json: bool, is_verbose: bool) -> None:
    """Send the broker's log to stderr; amqtt's own below a warning only where it is asked for."""
    # No line says where in the code, by which thread or task: then they need not be looked up for each.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else PlainFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("birthmark").setLevel(logging.DEBUG if is_verbose else logging.INFO)


def _time(record: logging.LogRecord) -> str:
    seconds, milliseconds = divmod(int(record.created * 1_000), 1_000)
    return f"{_date_and_time(seconds)}.{milliseconds:03}Z"


@lru_cache(maxsize=1)
def _date_and_time(seconds: int) -> str:
    """Up to the second, which the next line most likely shares."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
