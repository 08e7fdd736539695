"""Obey: a valve that opens and closes on command, and says what became of it.

python examples/valve.py /var/lib/birthmark
birthmark-device send valve-1 open '{"percent": 40}' --wait 10 --identity alice.pem --ca ca.pem --broker HOST:PORT
"""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

from birthmark.device import Client, CommandFailedError

if TYPE_CHECKING:
    from birthmark.device.received import Command

client = Client.from_folder(sys.argv[1])
valve = {"percent": 0}


@client.command("open")
def open_valve(command: Command) -> dict[str, int]:
    percent = command.json().get("percent")
    if not isinstance(percent, int) or not 0 <= percent <= 100:
        raise CommandFailedError("percent is a whole number from 0 to 100")  # goes back to whoever asked
    valve["percent"] = percent
    return valve


@client.command("close")
def close_valve(_command: Command) -> dict[str, int]:
    valve["percent"] = 0
    return valve


ENDS = (signal.SIGTERM, signal.SIGINT)  # systemd's way to say stop, and Ctrl-C
signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)  # they wait for sigwait: none of them cuts the goodbye short
client.start()
signal.sigwait(ENDS)
client.stop()
