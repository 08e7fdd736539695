"""`birthmark-device renew`: a new certificate now, whenever it is due."""

from __future__ import annotations

import logging
import queue
import time
from typing import TYPE_CHECKING, Final

from birthmark.device import event_lines
from birthmark.device.client import Client
from birthmark.device.console import Console, Parser, command
from birthmark.device.core_dumps import forbid_core_dumps
from birthmark.device.errors import RefusedError, UnreachableError
from birthmark.device.escape import escaped
from birthmark.device.events import Event, RenewalChanged
from birthmark.device.options import (
    add_broker_option,
    add_renewal_port_option,
    add_state_option,
    credentials_of,
    timeout,
)
from birthmark.device.renewal.store import RenewalStore

if TYPE_CHECKING:
    import argparse

DEFAULT_TIMEOUT_S: Final = 120.0

_EXAMPLES: Final = """
birthmark-device renew --state /var/lib/birthmark
birthmark-device renew --state ./board-1 --timeout 30 --json
birthmark-device renew --state ./board-1 --renewal-port 8884
"""


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add `renew` to the commands of `birthmark-device`."""
    parser = command(commands, "renew", _renew, "get a new certificate now", _EXAMPLES)
    add_state_option(parser)
    add_broker_option(parser)
    add_renewal_port_option(parser)
    parser.add_argument(
        "--timeout",
        type=timeout,
        default=DEFAULT_TIMEOUT_S,
        metavar="S",
        help="give up after so many seconds; what was granted by then is kept (default: %(default)g)",
    )


def _renew(arguments: argparse.Namespace, console: Console) -> int:
    forbid_core_dumps()
    credentials = credentials_of(arguments)
    with RenewalStore(arguments.state).exclusive():
        pass  # a client that runs with this identity must not lose its connection to this command
    logging.getLogger("birthmark.device").addHandler(logging.NullHandler())
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    client = Client(
        credentials,
        observe=events.put,
        presence=False,
        takes_all=False,  # what is sent to the device meanwhile waits for its own client
        renewal_port=arguments.renewal_port,
    )
    client.renew()
    client.start()
    try:
        return _wait(events, console, arguments.timeout)
    finally:
        client.stop()


def _wait(events: queue.SimpleQueue[Event], console: Console, timeout_s: float) -> int:
    deadline, last = time.monotonic() + timeout_s, "it took too long"
    while (left_s := deadline - time.monotonic()) > 0:
        try:
            event = events.get(timeout=left_s)
        except queue.Empty:
            break
        event_lines.show(console, event)
        if not isinstance(event, RenewalChanged):
            continue
        if event.state == "renewed":
            return 0
        if event.state in ("refused", "rolled-back"):
            raise RefusedError(
                f"could not renew: {escaped(event.detail)}",
                hint="the certificate in use stands; the station's `birthmark show ID` says more",
            )
        last = event.detail
    raise UnreachableError(
        f"could not renew within {timeout_s:g} s: {last}",
        hint="is `birthmark renewd` running, and connected to this gateway?",
    )
