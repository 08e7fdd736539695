"""`birthmark-sim fleet`: a thousand devices at once, over a good network or a bad one."""

from __future__ import annotations

import argparse
import math
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

from birthmark.device.agent.stop import stop_on_signals
from birthmark.device.console import command
from birthmark.device.credentials import BrokerAddress, Credentials
from birthmark.device.errors import UnreachableError
from birthmark.device.options import given_broker, taken_from_options
from birthmark.firmware_sim.fleet import default_processes, device_folders, run_fleet
from birthmark.firmware_sim.fleet_worker import Task
from birthmark.firmware_sim.network import MEANING, NetworkFaults, Proxy

if TYPE_CHECKING:
    from birthmark.device.console import Console, Parser
    from birthmark.firmware_sim.fleet import Totals

BAR_WIDTH: Final = 50
MOST_BARS: Final = 40
MAX_SECONDS: Final = 7 * 86_400.0
NAMED: Final = 5

_EXAMPLES = """
birthmark-sim fleet --state ./fleet
birthmark-sim fleet --state ./fleet --devices 1000 --seconds 300 --interval 30 --ramp 20
birthmark-sim fleet --state ./fleet --fault latency=80 loss=0.02 cut=60
birthmark-sim fleet --state ./fleet --fault outage=10@60 --json
"""


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add `fleet` to the commands of `birthmark-sim`."""
    parser = command(commands, "fleet", _fleet, "run many enrolled devices at once, for a while", _EXAMPLES)
    parser.add_argument(
        "--state",
        type=Path,
        required=True,
        metavar="DIR",
        help="a folder with the state folder of each device in it, as `birthmark-sim board` leaves them",
    )
    parser.add_argument("--devices", type=_whole, metavar="N", help="how many of them, by name (all)")
    parser.add_argument("--broker", metavar="HOST:PORT", help="connect there, not where the devices belong")
    parser.add_argument("--seconds", type=_positive, default=60.0, metavar="S", help="for how long (60)")
    parser.add_argument("--interval", type=_positive, default=5.0, metavar="S", help="between two readings (5)")
    parser.add_argument("--payload", type=_whole, default=64, metavar="BYTES", help="of a reading, at least (64)")
    parser.add_argument(
        "--ramp", type=_positive, default=1.0, metavar="S", help="start the devices over so many seconds (1)"
    )
    parser.add_argument("--processes", type=_whole, default=default_processes(), metavar="N", help="(%(default)s)")
    faults = ", ".join(f"{name}={how} ({meaning})" for name, (how, meaning) in MEANING.items())
    parser.add_argument(
        "--fault",
        "--faults",
        dest="faults",
        nargs="+",
        action="extend",
        default=[],
        metavar="KIND=VALUE",
        help=f"put a bad network before the broker, which has to be on this machine: {faults}",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the network's misfortunes (0)")


def _fleet(arguments: argparse.Namespace, console: Console) -> None:
    with taken_from_options():
        faults = NetworkFaults.parse(arguments.faults)
    broker = given_broker(arguments)
    folders = device_folders(arguments.state, arguments.devices)
    resets = 0
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals(signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        proxy = None
        if faults.are_there:
            address = broker or Credentials.from_folder(folders[0]).broker
            proxy = stack.enter_context(Proxy(address.host, address.port, faults, seed=arguments.seed))
            broker = BrokerAddress(address.host, proxy.port)
        task = Task([], str(broker) if broker else None, arguments.interval, arguments.payload, arguments.ramp)
        totals = run_fleet(
            folders,
            task,
            processes=arguments.processes,
            seconds=arguments.seconds,
            stop=stop,
            show=lambda so_far: console.emit({"event": "progress", **_figures(so_far)}, _line(so_far)),
        )
        resets = proxy.resets if proxy else 0
    console.emit({"event": "end", **totals.record(), "resets": resets}, _summary(totals, resets))
    if totals.never:
        some = ", ".join(totals.never[:NAMED]) + (", ..." if len(totals.never) > NAMED else "")
        raise UnreachableError(
            f"could not bring {len(totals.never)} of {totals.devices} devices online: {some}",
            hint=f"what failed: {_failures(totals)}",
            check="never-online",
        )


def _figures(totals: Totals) -> dict[str, object]:
    names = ("devices", "online", "connects", "lost", "published", "acknowledged", "pending", "refused")
    return {name: getattr(totals, name) for name in names}


def _line(totals: Totals) -> str:
    waiting = f", {totals.pending} wait" if totals.pending else ""
    return (
        f"{totals.online} of {totals.devices} online; {totals.acknowledged} of {totals.published} readings"
        f" acknowledged{waiting}; {totals.connects} connects, {totals.lost} lost"
    )


def _summary(totals: Totals, resets: int) -> str:
    p50, p99 = totals.latency(0.5), totals.latency(0.99)
    lines = ["", _line(totals)]
    if p50 is not None and p99 is not None:
        lines.append(f"acknowledged after {p50:.1f} ms (median), {p99:.1f} ms (p99)")
    if totals.failures:
        lines.append(f"attempts that failed: {_failures(totals)}")
    if resets:
        lines.append(f"the network ended {resets} connections")
    lines.append(f"{totals.resumed} of {totals.connects} handshakes resumed a TLS session")
    each_kb = totals.max_rss_kb / totals.devices
    lines.append(f"{totals.max_rss_kb / 1024:.0f} MB of memory at most, {each_kb:.0f} KB a device")
    lines += ["", "connects by second:", *_bars(dict(totals.connects_by_second))]
    return "\n".join(lines)


def _failures(totals: Totals) -> str:
    return ", ".join(f"{count} {check}" for check, count in totals.failures.most_common()) or "nothing was tried"


def _bars(by_second: dict[int, int]) -> list[str]:
    """Draw a bar for each second with a connect, or for several seconds if there are too many."""
    if not by_second:
        return ["  none"]
    step = math.ceil((max(by_second) + 1) / MOST_BARS)
    sums: dict[int, int] = {}
    for second, count in by_second.items():
        sums[second // step * step] = sums.get(second // step * step, 0) + count
    most = max(sums.values())
    return [
        f"{second:>7} s  {'#' * math.ceil(count / most * BAR_WIDTH):<{BAR_WIDTH}}  {count}"
        for second, count in sorted(sums.items())
    ]


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not more than 0, and at most a week of seconds")
    return value


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not from 1 to 1000000")
    return int(text)
