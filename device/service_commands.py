"""`birthmark-device watch` and `send`: what an operator does with a service identity."""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from birthmark.device import topics
from birthmark.device.client import Client
from birthmark.device.console import Console, Parser, command
from birthmark.device.core_dumps import forbid_core_dumps
from birthmark.device.credentials import Credentials
from birthmark.device.escape import escaped
from birthmark.device.events import Disconnected
from birthmark.device.identity import DeviceId
from birthmark.device.options import broker_address, number, seconds
from birthmark.device.publication import Outgoing
from birthmark.device.stopping import Stopping, stopping_on_signals

if TYPE_CHECKING:
    import argparse

    from birthmark.device.events import Event
    from birthmark.device.received import Message

ANSWER_TIMEOUT_S = 10.0
LONGEST_SHOWN = 4096

_IDENTITY = "--identity alice.pem --ca ca.pem --broker gateway-1.example.com:8883"
_WATCH_EXAMPLES = f"""
birthmark-device watch 'devices/+/status' {_IDENTITY}
birthmark-device watch 'devices/sensor-17/#' {_IDENTITY} --json
"""
_SEND_EXAMPLES = f"""
birthmark-device send sensor-17 reboot {_IDENTITY}
birthmark-device send sensor-17 interval '{{"seconds":5}}' {_IDENTITY} --wait 10
"""


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add `watch` and `send` to the commands of `birthmark-device`."""
    watch = command(
        commands, "watch", _watch, "print the messages on a topic filter, as an operator", _WATCH_EXAMPLES
    )
    watch.add_argument("filter", metavar="FILTER", help="in MQTT's syntax: + stands for a level, # for the rest")
    watch.add_argument("--count", type=number, metavar="N", help="end after so many messages")
    send = command(commands, "send", _send, "send a command to a device, as an operator", _SEND_EXAMPLES)
    send.add_argument("id", metavar="ID", help="the device")
    send.add_argument("command", metavar="COMMAND", help="the command's name")
    send.add_argument(
        "payload", metavar="PAYLOAD", nargs="?", default="", help="what goes with it (default: nothing)"
    )
    send.add_argument(
        "--wait",
        type=seconds,
        metavar="S",
        help="print the device's reply, waiting S seconds for it; later, the device does not begin",
    )
    for parser in (watch, send):
        parser.add_argument(
            "--identity", required=True, metavar="PEM", type=Path, help="the service's key, certificate and chain"
        )
        parser.add_argument("--ca", required=True, metavar="PEM", type=Path, help="whom to trust for the broker")
        parser.add_argument("--broker", required=True, metavar="HOST:PORT", help="where the broker listens")


def _watch(arguments: argparse.Namespace, console: Console) -> int:
    with stopping_on_signals() as stopping:
        watching = _Watching(console, stopping, arguments.count)
        client = _client(arguments, console)
        subscribed = client.subscribe(arguments.filter, watching.show)
        with client:
            subscribed.wait(ANSWER_TIMEOUT_S)
            stopping.wait()
        return stopping.exit_code


class _Watching:
    def __init__(self, console: Console, stopping: Stopping, count: int | None) -> None:
        self._console = console
        self._stopping = stopping
        self._left = count

    def show(self, message: Message) -> None:
        if self._left is not None and self._left <= 0:
            return
        payload = escaped(message.payload, LONGEST_SHOWN)
        record = {
            "event": "message",
            "topic": escaped(message.topic),
            "payload": payload,
            "bytes": len(message.payload),
            "qos": message.qos,
            "retained": message.retained,
        }
        retained = self._console.paint("  (retained)", "dim") if message.retained else ""
        self._console.emit(record, f"{self._console.paint(escaped(message.topic), 'bold')}  {payload}{retained}")
        if self._left is not None:
            self._left -= 1
            if self._left <= 0:
                self._stopping.set()


def _send(arguments: argparse.Namespace, console: Console) -> int:
    device_id = DeviceId(arguments.id)
    payload = os.fsencode(arguments.payload)  # as it was given, whether it is text or not
    outgoing = Outgoing(topics.command(device_id, arguments.command), payload)
    client = _client(arguments, console)
    record: dict[str, Any] = {"id": str(device_id), "command": arguments.command, "sent": True}
    with client:
        if arguments.wait is None:
            client.publish(outgoing.topic, outgoing.payload, wait=ANSWER_TIMEOUT_S)
            text = f"sent {escaped(arguments.command)} to {device_id}: the broker has it"
        else:
            reply = client.request(device_id, arguments.command, payload, timeout_s=arguments.wait)
            elapsed_ms = round(reply.elapsed_s * 1000, 1)
            shown = escaped(reply.payload, LONGEST_SHOWN)
            record |= {"reply": shown, "elapsed_ms": elapsed_ms}
            text = f"{device_id} replied in {elapsed_ms} ms: {shown}"
        console.emit(record, text)
    return 0


def _client(arguments: argparse.Namespace, console: Console) -> Client:
    forbid_core_dumps()
    credentials = Credentials.from_files(arguments.identity, arguments.ca, broker_address(arguments.broker))
    logging.getLogger("birthmark.device").addHandler(logging.NullHandler())

    def observe(event: Event) -> None:
        if isinstance(event, Disconnected):
            console.warn(f"{event.error.message}; trying again")

    # Each command is a session of its own: two terminals must not take the connection from each other.
    suffix = (
        f"{arguments.handler.__name__.strip('_')}-{secrets.token_hex(4)}" if credentials.role.is_reserved else ""
    )
    return Client(credentials, client_suffix=suffix, presence=False, clean_session=True, observe=observe)
