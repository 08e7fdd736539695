"""A station's process that kills itself at a given point of one enrollment: `python -m support.board_killed`.

Arguments: the station's folder, the port, the device id, the key mode, and the state or step after which it dies.
The passphrase is on stdin.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from birthmark.device.identity import DeviceId, Role
from birthmark.device.link.timers import DEFAULT_BAUD
from birthmark.provisioning.enrollment.bundles import BrokerAddress
from birthmark.provisioning.enrollment.enrol import Reached, Stored
from birthmark.provisioning.enrollment.journal import Wish
from birthmark.provisioning.enrollment.port import PortName
from birthmark.provisioning.enrollment.session import Session
from birthmark.provisioning.enrollment.transitions import Transitions
from birthmark.provisioning.registry.model import KeyMode
from birthmark.provisioning.station import Station

if TYPE_CHECKING:
    from collections.abc import Callable

    from birthmark.provisioning.enrollment.session import Event


def session(station: Station, port: str, device_id: str, keys: KeyMode, watch: Callable[[Event], None]) -> Session:
    """One enrollment as `birthmark flash` would run it."""
    journal = Transitions(
        station.registry,
        station.authority_of,
        broker=BrokerAddress("localhost", 8883),
        default_role=Role("sensor"),
        clock=station.clock,
        random_bytes=secrets.token_bytes,
    )
    return Session(PortName.of(port), DEFAULT_BAUD, journal, Wish(DeviceId(device_id), None, keys), watch)


def main() -> None:
    folder, port, device_id, keys, point = sys.argv[1:]

    def die(event: Event) -> None:
        here = event.row.state.value if isinstance(event, Stored) else ""
        here = event.step.value if isinstance(event, Reached) else here
        if here == point:
            os.kill(os.getpid(), signal.SIGKILL)

    station = Station.open(Path(folder), passphrase=sys.stdin.buffer.readline().rstrip(b"\n"))
    session(station, port, device_id, KeyMode(keys), die).run()


if __name__ == "__main__":
    main()
