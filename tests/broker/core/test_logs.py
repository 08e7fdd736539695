"""The lines of the gateway's log."""

from __future__ import annotations

import json
import logging
from datetime import datetime

import pytest

from birthmark.broker.logs import JsonFormatter, PlainFormatter

BEFORE, AFTER = "2026-01-31T23:59:59.999Z", "2026-02-01T00:00:00.000Z"


def _record(moment: str) -> logging.LogRecord:
    record = logging.makeLogRecord({"msg": "%s is here", "args": ("sensor-1",), "levelname": "INFO"})
    record.created = datetime.fromisoformat(moment).timestamp()
    return record


@pytest.mark.parametrize("moments", [(BEFORE, AFTER), (AFTER, BEFORE), (AFTER, "2026-02-01T00:00:00.007Z")])
def test_every_line_has_its_own_time_to_the_millisecond(moments: tuple[str, str]) -> None:
    for moment in moments:
        assert PlainFormatter().format(_record(moment)) == f"{moment} info    sensor-1 is here"
        assert json.loads(JsonFormatter().format(_record(moment)))["time"] == moment
