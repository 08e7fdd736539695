"""`birthmark-device run`: an enrolled device online, from the command line."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from birthmark.device import event_lines
from birthmark.device.client import Client
from birthmark.device.console import Console, Parser, command
from birthmark.device.core_dumps import forbid_core_dumps
from birthmark.device.errors import (
    BirthmarkError,
    ConfigurationError,
    CredentialError,
    SystemFailureError,
    UnreachableError,
)
from birthmark.device.escape import escaped
from birthmark.device.events import AttemptFailed, Connected, Disconnected, Event
from birthmark.device.options import (
    add_broker_option,
    add_renewal_port_option,
    add_state_option,
    given_broker,
    seconds,
)
from birthmark.device.stopping import Stopping, stopping_on_signals
from birthmark.device.systemd import notify, watchdog_interval_s

if TYPE_CHECKING:
    import argparse

    from birthmark.device.errors import ConnectionFailedError
    from birthmark.device.received import Command

DEFAULT_INTERVAL_S = 1.0
TELEMETRY = "environment"
LOOK_AGAIN_S = 2.0
"""How soon an identity that was enrolled, or repaired, is found."""
ACKNOWLEDGED_WITHIN_S = 2.0
"""A reading that takes longer is reported as late; it stays queued."""

_EXAMPLES = """
birthmark-device run --state /var/lib/birthmark
birthmark-device run --state ./board-1 --simulate --interval 0.5 --json
birthmark-device run --state ./board-1 --once
"""


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add `run` to the commands of `birthmark-device`."""
    parser = command(commands, "run", _run, "connect with the flashed identity and stay connected", _EXAMPLES)
    add_state_option(parser)
    add_broker_option(parser)
    parser.add_argument("--simulate", action="store_true", help="publish made-up readings, for a first try")
    parser.add_argument(
        "--interval",
        type=seconds,
        default=DEFAULT_INTERVAL_S,
        metavar="S",
        help="seconds between two of them (%(default)s)",
    )
    add_renewal_port_option(parser)
    parser.add_argument(
        "--wait",
        action="store_true",
        help="where there is no identity that can be used, say why, and begin as soon as there is one",
    )
    ends = parser.add_mutually_exclusive_group()
    ends.add_argument(
        "--once", action="store_true", help="do not try again: the first failure ends it, with its exit code"
    )
    ends.add_argument(
        "--give-up-after",
        type=seconds,
        metavar="S",
        help="end after so many seconds without a connection, with the last failure's exit code",
    )


def _run(arguments: argparse.Namespace, console: Console) -> int:
    forbid_core_dumps()
    event_lines.show_warnings(console)
    with stopping_on_signals() as stopping:
        running = _Running(console, stopping, once=arguments.once, give_up_after_s=arguments.give_up_after)
        notify("READY=1")  # and not when connected: a device may come up before its network
        client = _client(arguments, running)
        feeding_s = watchdog_interval_s()
        while client is None:
            if feeding_s:
                notify("WATCHDOG=1")
            if stopping.wait(LOOK_AGAIN_S):
                return stopping.exit_code
            client = _client(arguments, running)
        client.command()(running.answer)
        if feeding_s:
            client.every(feeding_s / 3)(lambda: notify("WATCHDOG=1") if client.is_alive else None)
        client.start()
        try:
            running.keep_going(client, interval_s=arguments.interval if arguments.simulate else None)
        finally:
            notify("STOPPING=1")
            client.stop()
        event_lines.say(console, "stopped", "stopped")
        if running.error is not None:
            raise running.error
        return stopping.exit_code


def _client(arguments: argparse.Namespace, running: _Running) -> Client | None:
    """Return the client; None with `--wait` if there is no identity that it can use."""
    broker = given_broker(arguments)
    try:
        return Client.from_folder(
            arguments.state, broker=broker, observe=running.observe, renewal_port=arguments.renewal_port
        )
    except (CredentialError, ConfigurationError) as error:
        if not arguments.wait:
            raise
        running.has_no_identity(error)
        return None


class _Running:
    """One run: what it prints, and when it ends."""

    def __init__(self, console: Console, stopping: Stopping, *, once: bool, give_up_after_s: float | None) -> None:
        self.error: ConnectionFailedError | None = None
        self._said = ""
        self._console = console
        self._stopping = stopping
        self._once = once
        self._give_up_after_s = give_up_after_s
        self._last_error: ConnectionFailedError | None = None
        self._offline_since: float | None = time.monotonic()

    def has_no_identity(self, error: BirthmarkError) -> None:
        """Say so, once for each reason."""
        if error.message == self._said:
            return
        self._said = error.message
        notify(f"STATUS={error.message}")
        event_lines.say(
            self._console,
            "no_identity",
            f"{error.message}\n          {error.hint}\n          waiting until there is one",
            reason=error.message,
            hint=error.hint,
        )

    def observe(self, event: Event) -> None:
        event_lines.show(self._console, event, is_last=self._once)
        if isinstance(event, Connected):
            notify(f"STATUS=connected to {event.broker} as {event.client_id}")
            self._offline_since = None
        if isinstance(event, AttemptFailed | Disconnected):
            notify(f"STATUS={event.error.message}")
            self._last_error = event.error
            self._offline_since = self._offline_since or time.monotonic()
            if self._once:
                self.error = event.error
                self._stopping.set()

    def answer(self, received: Command) -> dict[str, Any]:
        name = escaped(received.name)
        event_lines.say(
            self._console,
            "command",
            f"command {name}: {escaped(received.payload)}",
            name=name,
            payload=escaped(received.payload),
        )
        return {"command": received.name, "received": True, "at": time.time()}

    def keep_going(self, client: Client, *, interval_s: float | None) -> None:
        """Return when it is time to end; meanwhile publish simulated readings, if there is an interval."""
        count = 0
        due = time.monotonic()
        while not self._stopping.wait(self._nap_s(None if interval_s is None else due)):
            if self._gives_up():
                return
            if interval_s is None or time.monotonic() < due:
                continue
            due = max(due + interval_s, time.monotonic())
            if client.is_connected:
                count += 1
                self._publish(client, count)

    def _publish(self, client: Client, count: int) -> None:
        topic = client.telemetry(TELEMETRY)
        reading = {
            "count": count,
            "at": round(time.time(), 3),
            "celsius": round(21 + 3 * math.sin(count / 20), 2),
            "simulated": True,
        }
        try:
            client.publish(topic, reading, wait=ACKNOWLEDGED_WITHIN_S)
        except (UnreachableError, SystemFailureError) as error:
            event_lines.say(self._console, "not_published", error.message, topic=topic, reason=error.message)
        else:
            event_lines.say(
                self._console,
                "published",
                f"published to {topic}: {reading['celsius']} C",
                topic=topic,
                count=count,
            )

    def _gives_up(self) -> bool:
        if self._give_up_after_s is None or self._offline_since is None:
            return False
        if time.monotonic() - self._offline_since < self._give_up_after_s:
            return False
        self.error = self._last_error or UnreachableError("could not connect: there was not enough time")
        return True

    def _nap_s(self, due: float | None) -> float | None:
        waits = [] if due is None else [due - time.monotonic()]
        if self._give_up_after_s is not None:
            waits.append(min(1.0, self._give_up_after_s))
        return max(0.0, min(waits)) if waits else None
