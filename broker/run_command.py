"""`birthmark-broker run`: put the gateway together, run it, stop it.

Rules:

- Everything is read and judged before the port is opened: a wrong file is an error with exit code, not a broker
  that refuses everybody. Once it listens, one line says so, with the address (`{"event": "ready", ...}` with
  `--json`), and systemd is told; its watchdog is fed from then on.
- SIGTERM and SIGINT stop it in good order, exit code 0. SIGHUP reads policy, CRL and credentials again: what
  cannot be used changes nothing and is logged.
- One broker a data folder: a lock is held while it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import os
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from birthmark.broker.config import BrokerSettings, override_listen, read_settings
from birthmark.broker.event_loop import run_loop
from birthmark.broker.gateway import Gateway
from birthmark.broker.listener import shown_address
from birthmark.broker.logs import log_to_stderr
from birthmark.broker.server import GatewayBroker
from birthmark.device.console import command
from birthmark.device.core_dumps import forbid_core_dumps
from birthmark.device.durable import exclusive_lock, private_folder
from birthmark.device.errors import SystemFailureError
from birthmark.device.systemd import feed_watchdog, notify, watchdog_interval_s

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from birthmark.device.console import Console, Parser

EXAMPLES = """
birthmark-broker run
birthmark-broker run --config /etc/birthmark/broker.toml
birthmark-broker run --listen 127.0.0.1:0 --json
"""


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the `run` command."""
    parser = command(commands, "run", _run, "run the gateway's broker", EXAMPLES)
    parser.add_argument("--config", type=Path, default=Path("broker.toml"), metavar="FILE", help="broker.toml")
    parser.add_argument(
        "--listen", metavar="HOST:PORT", help="instead of what the file says (port 0: any free one)"
    )
    parser.add_argument("--verbose", action="store_true", help="log more")


def _run(arguments: argparse.Namespace, console: Console) -> None:
    forbid_core_dumps()  # the gateway's key, and the TLS secrets of every session
    log_to_stderr(as_json=console.as_json, is_verbose=arguments.verbose)
    settings = read_settings(arguments.config)
    if arguments.listen:
        host, port = override_listen(arguments.listen)
        settings = dataclasses.replace(settings, listen_host=host, listen_port=port)
    with _locked(settings.data_folder):
        run_loop(serve(settings, console))


@contextlib.contextmanager
def _locked(data_folder: Path) -> Iterator[None]:
    with contextlib.ExitStack() as held:
        try:
            private_folder(data_folder)
            held.enter_context(exclusive_lock(data_folder / "lock", wait=False))
        except BlockingIOError as error:
            raise SystemFailureError(
                f"could not start: another broker runs with the data folder {data_folder}",
                hint="stop it first, or give this one its own data_folder in broker.toml",
            ) from error
        yield


def compose(settings: BrokerSettings, stop: asyncio.Event) -> tuple[Gateway, GatewayBroker]:
    """Return a gateway and its broker, which starts both, and listens once the gateway is ready for clients.

    Args:
        settings: of both.
        stop: set when they are told to stop: nothing is waited for at the start any more.

    Raises:
        BirthmarkError: something that a start needs is missing or cannot be used.
    """
    gateway = Gateway.open(settings)
    broker = GatewayBroker(
        settings, gateway.tls_context, gateway.admit, gateway.policy, renewal=gateway.renewal_door()
    )
    broker.before_listening = partial(gateway.start, broker, stop)
    return gateway, broker


async def serve(settings: BrokerSettings, console: Console) -> None:
    """Run a gateway until it is told to stop. Raises `BirthmarkError` where it cannot start."""
    stop = asyncio.Event()
    gateway, broker = compose(settings, stop)
    loop = asyncio.get_running_loop()
    # Before the port is open: whoever sees us listening may also stop us.
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, gateway.reload)
    await broker.start()
    interval_s = watchdog_interval_s()
    watchdog = loop.create_task(feed_watchdog(interval_s)) if interval_s else None
    try:
        _say_ready(settings, broker, console)
        await stop.wait()
        notify("STOPPING=1")
        await gateway.stop()
    finally:
        await broker.shutdown()
        if watchdog:
            watchdog.cancel()
        # The interpreter would look through all sessions and messages for cycles before it ends, over and over:
        # seconds, with millions of them. Nobody needs their memory back.
        gc.freeze()
    record = {"event": "stopped", "gateway": str(settings.name), "counters": broker.counters.as_dict()}
    console.emit(record, f"stopped: gateway {settings.name}")


def _say_ready(settings: BrokerSettings, broker: GatewayBroker, console: Console) -> None:
    shown = f"{', '.join(map(shown_address, broker.addresses))}, mutual TLS only"
    record: dict[str, Any] = {
        "event": "ready",
        "gateway": str(settings.name),
        "listen": [{"host": host, "port": port} for host, port in broker.addresses],
        "pid": os.getpid(),
    }
    if broker.renewal_addresses:
        record["renewal_listen"] = [{"host": host, "port": port} for host, port in broker.renewal_addresses]
        late = ", ".join(map(shown_address, broker.renewal_addresses))
        shown += f"; on {late} for the renewal of what has expired"
    console.emit(record, f"ready: gateway {settings.name} listens on {shown}")
    notify("READY=1")
