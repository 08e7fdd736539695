"""Many devices in one process, each with its own client: run as `python renewal_fleet.py FOLDER...`.

Says `connected` when all are, renews all of them at once when it reads a line, and says what came of it in JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from birthmark.device.backoff import Backoff, RetryTimer
from birthmark.device.client import Client
from birthmark.device.events import RenewalChanged
from birthmark.device.renewal.schedule import Pace

if TYPE_CHECKING:
    from birthmark.device.events import Event

STACK_BYTES = 256 * 1024
LONG_S = 600.0


def main(folders: list[Path]) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8 * len(folders) + 256), hard))
    threading.stack_size(STACK_BYTES)
    changed = threading.Condition()
    took_s: list[float] = []
    troubles: list[str] = []
    began = 0.0

    def observe(event: Event) -> None:
        if not isinstance(event, RenewalChanged):
            return
        with changed:
            if event.state == "renewed":
                took_s.append(time.monotonic() - began)
                changed.notify_all()
            elif event.state in ("failed", "refused", "rolled-back"):
                troubles.append(event.detail)

    soon = Backoff(1.0, 5.0)
    clients = [
        Client.from_folder(
            folder,
            observe=observe,
            connect_timeout_s=60.0,
            retry=RetryTimer(unreachable=soon, refused=soon),
            renewal_pace=Pace(answered_within_s=120.0, repeat=soon),
        )
        for folder in folders
    ]
    for client in clients:
        client.connect(timeout_s=120.0)
    print("connected", flush=True)
    sys.stdin.readline()
    began = time.monotonic()
    for client in clients:
        client.renew()
    with changed:
        changed.wait_for(lambda: len(took_s) == len(clients), timeout=LONG_S)
    print(
        json.dumps({"renewed": len(took_s), "last_s": max(took_s, default=0.0), "troubles": troubles}), flush=True
    )
    for client in clients:
        client.stop(timeout_s=0.0)


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
