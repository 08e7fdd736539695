"""A revocation at twenty gateways: how long until each of them has confirmed it.

Rules:

- Everything is a process of its own: the gateways, the birthmark-broker that all of them have a link to, and for
  the whole command `birthmark revoke`, which starts, asks for a passphrase's key, signs, publishes and waits.
- From the signed CRL means: from when it is in its file until every receipt has come and is on record (registry
  and audit log).
- A figure counts only if every gateway has confirmed the very CRL.
- The goal of one second is for all gateways together, from the signed CRL.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Final

from cryptography import x509

from bench.fleet_stand import FleetStand, fleet_stand
from bench.report import Figure
from birthmark.provisioning.crl_delivery import deliver_crl
from birthmark.provisioning.delivery import Outcome
from birthmark.provisioning.founding import found_station
from birthmark.provisioning.gateway_look import look_at
from birthmark.provisioning.issuing import issue_operator
from birthmark.provisioning.revocation import revoke
from birthmark.provisioning.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SECTION: Final = "A revocation"
GATEWAYS, QUICK_GATEWAYS = 20, 3
GOAL_S: Final = 1.0
PASSPHRASE: Final = "of a station that is measured"  # noqa: S105 - it protects nothing
FROM_THE_CRL, WHOLE_COMMAND = "from the signed CRL", "the whole command"
_DEADLINE_S: Final = 60.0


def figures(folder: Path, rounds: int, gateways: int, say: Callable[[str], None]) -> Iterator[Figure]:
    """Measure; `folder` is for the fleet."""
    folder.mkdir()
    station = found_station(folder / "station", Settings("Bench"), passphrase=PASSPHRASE.encode())
    names = [f"g-{number:02}" for number in range(1, gateways + 1)]
    values: dict[str, list[float]] = {FROM_THE_CRL: [], WHOLE_COMMAND: [], "goal": []}
    errors: list[str] = []
    with fleet_stand(folder / "fleet", station, names) as stand:
        say(f"a revocation: {gateways} gateways start")
        stand.start(names)
        _wait(stand)
        for number in range(rounds):
            say(f"a revocation, round {number + 1} of {rounds}")
            for way, measure in ((FROM_THE_CRL, _from_the_crl), (WHOLE_COMMAND, _whole_command)):
                name = f"thief-{way.count(' ')}-{number}"
                issue_operator(station, name, folder, role="service-thief")
                try:
                    values[way].append(measure(stand, name))
                except RuntimeError as error:
                    errors.append(f"{way}: {error}")
            values["goal"].append(GOAL_S)
    for way in (FROM_THE_CRL, WHOLE_COMMAND):
        is_held = way == FROM_THE_CRL  # a command's start is measured elsewhere
        yield Figure(
            SECTION,
            f"{gateways} gateways have confirmed it, {way}",
            "s",
            {way: values[way]} | ({"goal": values["goal"]} if is_held else {}),
            ours=way,
            reference="goal" if is_held else "",
            at_most=1.0 if is_held else None,
            note="gateways, broker and station share this machine",
            errors=[error for error in errors if error.startswith(way)],
        )


def _wait(stand: FleetStand) -> None:
    """Wait until every link is up."""
    settings, deadline = stand.station.settings, time.monotonic() + _DEADLINE_S
    while time.monotonic() < deadline:
        looks = look_at(
            settings.gateways,
            anchors_path=stand.station.root_path,
            timeout_s=_DEADLINE_S,
            upstreams=settings.upstreams,
            sightings=False,
        )
        if all(look.status is not None and look.status.online for look in looks):
            return
    raise RuntimeError("not every gateway has its link")


def _from_the_crl(stand: FleetStand, name: str) -> float:
    crls = revoke(stand.station, name, x509.ReasonFlags.key_compromise).crls
    begun_s = time.perf_counter()
    deliveries = deliver_crl(stand.station, crls, _DEADLINE_S)
    taken_s = time.perf_counter() - begun_s
    lacking = [delivery.described() for delivery in deliveries if delivery.outcome is not Outcome.DONE]
    if lacking:
        raise RuntimeError("; ".join(lacking))
    return taken_s


def _whole_command(stand: FleetStand, name: str) -> float:
    command = [sys.executable, "-m", "birthmark.provisioning", "revoke", name, "--reason", "lost"]
    command += ["--timeout", f"{_DEADLINE_S:g}", "--station", str(stand.station.folder)]
    begun_s = time.perf_counter()
    done = subprocess.run(
        command,
        env={**os.environ, "BIRTHMARK_PASSPHRASE": PASSPHRASE},
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * _DEADLINE_S,
    )
    taken_s = time.perf_counter() - begun_s
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or done.stdout.strip())
    return taken_s
