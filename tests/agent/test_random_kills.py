"""The agent's process killed at random moments of an enrollment, again and again: never half an identity."""

from __future__ import annotations

import contextlib
import os
import random
import ssl
import threading
from typing import TYPE_CHECKING

import pytest
from support.agent_bench import reference_ca
from support.agent_process import AgentProcess, Pty, station_on
from support.reference_station import NoAnswerError, ReferenceEnrollment

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

UNITS = 60 if os.environ.get("BIRTHMARK_PROOF") == "whole" else 1
KILLS = 3
ENROLLMENT_S = 0.12
"""About as long as one takes here; the kills fall into it."""


@pytest.mark.proof
@pytest.mark.parametrize("unit", range(UNITS))
def test_killed_at_random_moments(tmp_path: Path, unit: int, proven: Callable[[str], None]) -> None:
    moments = random.Random(unit)
    state = tmp_path / "state"
    enrollment = ReferenceEnrollment(reference_ca(), f"unit-{unit}")
    with Pty() as pty:
        for _ in range(KILLS):
            with AgentProcess(pty.path, state) as agent:
                agent.wait_for("started")
                killer = threading.Timer(moments.uniform(0, ENROLLMENT_S), agent.kill)
                killer.start()
                station = station_on(pty)
                station.limit_s, station.first_wait_s = 0.5, 0.2
                with contextlib.suppress(NoAnswerError):
                    enrollment.run(station)
                killer.join()
            if (state / "active").exists():
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(state / "active")
        with AgentProcess(pty.path, state) as agent:
            agent.wait_for("started")
            enrollment.run(station_on(pty))
            assert agent.stop() == 0
    assert enrollment.certificates_signed == 1
    assert {path.name for path in state.iterdir()} == {"active", "hwid"}
    proven(f"each killed {KILLS} times in its enrollment: one certificate, and never half of one")
