from __future__ import annotations

import asyncio
import importlib.util
import sys
from typing import TYPE_CHECKING

from birthmark.broker.event_loop import VARIABLE, run_loop

if TYPE_CHECKING:
    import pytest
    from support.mqtt_gateway import RunningGateway


def loop_module() -> str:
    found = []

    async def main() -> None:
        found.append(type(asyncio.get_running_loop()).__module__)

    run_loop(main())
    return found[0].partition(".")[0]


def test_it_is_uvloop_where_that_is_installed() -> None:
    assert importlib.util.find_spec("uvloop"), "the extra `broker` brings it on this system"
    assert loop_module() == "uvloop"


def test_a_variable_goes_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "asyncio")
    assert loop_module() == "asyncio"


def test_without_it_asyncio_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert loop_module() == "asyncio"


def test_the_gateway_of_these_tests_runs_on_the_loop_asked_for(
    gateway: RunningGateway, event_loop_name: str
) -> None:
    assert type(gateway.loop).__module__.partition(".")[0] == event_loop_name
