"""A reading every half minute: the temperature of this machine's processor.

python examples/cpu_temperature.py /var/lib/birthmark
"""

from __future__ import annotations

import random
import signal
import sys
from pathlib import Path

from birthmark.device import Client

ZONE = Path("/sys/class/thermal/thermal_zone0/temp")  # in thousandths of a degree
INTERVAL_S = 30

client = Client.from_folder(sys.argv[1])


# A street of devices that get their power back in the same second: not all of them speak in the same second.
@client.every(INTERVAL_S, telemetry="cpu-temperature", delay_s=random.uniform(0, INTERVAL_S))
def cpu_temperature() -> dict[str, float] | None:
    if not ZONE.exists():
        return None  # nothing to say
    return {"celsius": int(ZONE.read_text()) / 1000}


ENDS = (signal.SIGTERM, signal.SIGINT)  # systemd's way to say stop, and Ctrl-C
signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)  # they wait for sigwait: none of them cuts the goodbye short
client.start()  # and not connect(): it is no reason to end that there is no network yet
signal.sigwait(ENDS)
client.stop()
