"""What goes out, and waiting for the broker's word that it has it."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from birthmark.device.errors import BirthmarkError, LocalProtocolError, UnreachableError
from birthmark.device.escape import quoted

MAX_TOPIC_BYTES = 65_535
"""MQTT 3.1.1 §1.5.3."""
MAX_PAYLOAD_BYTES = 268_435_455 - MAX_TOPIC_BYTES - 4
"""What always fits a packet (MQTT 3.1.1 §2.2.3)."""

Payload = bytes | str | Mapping[str, Any]
"""Bytes as they are, text in UTF-8, a mapping as a JSON object."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One message to publish.

    Raises:
        LocalProtocolError: a topic or a quality of service that MQTT 3.1.1 does not know (§4.7.1, §4.7.3).
    """

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False

    def __post_init__(self) -> None:
        what = quoted(self.topic)
        if not self.topic or len(self.topic.encode("utf-8", "surrogatepass")) > MAX_TOPIC_BYTES:
            raise LocalProtocolError(f"could not publish to {what}: a topic has 1 to {MAX_TOPIC_BYTES} bytes")
        if any(c in self.topic for c in "+#\0") or not is_utf8(self.topic):
            raise LocalProtocolError(
                f"could not publish to {what}: it is a filter, no topic", hint="leave out + and # and NUL"
            )
        if self.qos not in (0, 1):
            raise LocalProtocolError(f"could not publish to {what}: the quality of service is 0 or 1")
        if len(self.payload) > MAX_PAYLOAD_BYTES:
            raise LocalProtocolError(f"could not publish to {what}: {len(self.payload)} bytes are too many")


def as_bytes(payload: Payload) -> bytes:
    """Return the bytes that stand for a payload.

    Raises:
        LocalProtocolError: a mapping that JSON has no words for.
    """
    if isinstance(payload, bytes):
        return payload
    if isinstance(payload, str):
        if not is_utf8(payload):
            raise LocalProtocolError("could not publish text: it holds a lone surrogate", hint="publish bytes")
        return payload.encode()
    try:
        return json.dumps(payload, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise LocalProtocolError("could not publish a mapping: JSON cannot hold what is in it") from error


class Acknowledgement:
    """The broker's answer to one PUBLISH or SUBSCRIBE, in the making."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._settled = threading.Event()
        self._error: BirthmarkError | None = None

    @property
    def done(self) -> bool:
        """Whether the broker has said yes."""
        return self._settled.is_set() and self._error is None

    def settle(self, error: BirthmarkError | None = None) -> None:
        """Say that it was acknowledged, or why it will never be. The first word stands."""
        if not self._settled.is_set():
            self._error = error
            self._settled.set()

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the broker has said yes.

        Raises:
            UnreachableError: it did not within `timeout_s` (None: wait for ever), or the client stopped first.
            RefusedError: it said no.
        """
        if not self._settled.wait(timeout_s):
            raise UnreachableError(
                f"could not {self.what}: the broker did not acknowledge it within {timeout_s:g} s",
                hint="it stays queued: it goes out, or out again, once there is a connection",
                check="no-answer",
            )
        if self._error is not None:
            raise self._error


def is_utf8(text: str) -> bool:
    """Whether `text` has an encoding: a lone surrogate has none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
