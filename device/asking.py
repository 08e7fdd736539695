"""Asking a device to do something, and waiting for its reply: the operator's half of `commands`."""

from __future__ import annotations

import json
import queue
import secrets
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from birthmark.device import requests, topics
from birthmark.device.commands import MAX_AHEAD_S, CommandFailedError
from birthmark.device.errors import LocalProtocolError, RemoteProtocolError, UnreachableError
from birthmark.device.escape import escaped, quoted

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from birthmark.device.client import Client
    from birthmark.device.identity import DeviceId
    from birthmark.device.received import Message

_HINTS: Final = {
    requests.EXPIRED: "are the two clocks right? `birthmark-device status` on the device shows its own",
    requests.UNKNOWN: "the device's program has no handler for it",
    requests.FAILED: "the device's own log says more",
    requests.LATE: "it was done, but later than you waited: give it more time",
    requests.INTERRUPTED: "see what state the device is in before you ask again",
    requests.BUSY: "wait until what was asked before has expired, and look at the device's disk",
}


class Reply(NamedTuple):
    """What a device answered. The payload is its own text: escape it before showing it."""

    payload: bytes
    elapsed_s: float
    """From asking to the reply."""

    def json(self) -> Any:
        """Return the payload as JSON; raises `RemoteProtocolError` if it is none."""
        try:
            return json.loads(self.payload)
        except (ValueError, RecursionError) as error:
            raise RemoteProtocolError("could not read a reply: not JSON") from error


def ask(
    client: Client,
    device_id: DeviceId,
    command: str,
    payload: bytes,
    *,
    timeout_s: float,
    now: Callable[[], datetime],
) -> Reply:
    """Send a request, and wait for its reply; see `Client.request`."""
    if not 0 < timeout_s <= MAX_AHEAD_S:
        raise LocalProtocolError(
            f"could not wait {timeout_s:g} s for a reply: more than 0, at most {MAX_AHEAD_S:g}"
        )
    began = time.monotonic()
    request = requests.Request(secrets.token_urlsafe(9), now().timestamp() + timeout_s)
    replies: queue.SimpleQueue[Message] = queue.SimpleQueue()
    answers = topics.reply(device_id, requests.reply_name(command, request.id, "+"))
    try:
        client.subscribe(answers, replies.put, wait=timeout_s)
        topic = topics.command(device_id, f"{command}/{request.level}")
        client.publish(topic, payload, wait=_left_s(began, timeout_s))
        answer = replies.get(timeout=_left_s(began, timeout_s))
    except queue.Empty:
        raise UnreachableError(
            f"could not get a reply from {device_id}: none came within {timeout_s:g} s",
            hint=f"is it online? `birthmark-device watch devices/{device_id}/status` shows it",
            check="no-answer",
        ) from None
    finally:
        client.unsubscribe(answers)
    outcome = requests.outcome_of(answer.topic)
    if outcome != requests.DONE:
        raise CommandFailedError(
            f"could not have {device_id} do {quoted(command)}: {_why(outcome, answer.payload)}",
            hint=_HINTS[outcome],
        )
    return Reply(answer.payload, time.monotonic() - began)


def _left_s(began: float, timeout_s: float) -> float:
    return max(0.0, began + timeout_s - time.monotonic())


def _why(outcome: str, payload: bytes) -> str:
    """Return what a device said, in one line; its own words are escaped."""
    said = ""
    try:
        told = json.loads(payload)
        said = str(told["error"])
        if outcome == requests.EXPIRED:
            said += f" ({float(told['clock']):.0f} there, the deadline is {float(told['expires']):.0f})"
    except (ValueError, RecursionError, KeyError, TypeError, OverflowError):
        pass
    return f"{outcome}{': ' if said else ''}{escaped(said, 400)}"
