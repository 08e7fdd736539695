"""What goes out, and waiting for the broker's word that it has it."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

from birthmark.device.errors import BirthmarkError, LocalProtocolError, UnreachableError
from birthmark.device.escape import quoted
from birthmark.device.frozen import Frozen

MAX_TOPIC_BYTES = 65_535
"""MQTT 3.1.1 §1.5.3."""
MAX_PAYLOAD_BYTES = 268_435_455 - MAX_TOPIC_BYTES - 4
"""What always fits a packet (MQTT 3.1.1 §2.2.3)."""

HEAD_BYTES = 128
"""Left for a packet's head."""

Payload = bytes | str | Mapping[str, Any]
"""Bytes as they are, text in UTF-8, a mapping as a JSON object."""


class Outgoing(Frozen):
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


def check_size(topic: str, payload: bytes, max_packet_bytes: int | None) -> None:
    """Refuse a message that is larger than what the gateway takes; None: that is not known.

    Raises:
        LocalProtocolError: it is.
    """
    if max_packet_bytes is None:
        return
    most = max_packet_bytes - HEAD_BYTES - len(topic.encode("utf-8", "surrogatepass"))
    if len(payload) > most:
        raise LocalProtocolError(
            f"could not publish to {quoted(topic)}: {len(payload)} bytes are too many, the gateway takes {most}",
            hint="send it in parts, or raise max_packet_bytes in device.toml and in the gateway's broker.toml",
        )


def with_id(payload: Payload, key: str, message_id: str) -> Payload:
    """Return a mapping with an id under `key`, unless it has one of its own there; another payload as it is."""
    if isinstance(payload, bytes | str) or key in payload:
        return payload
    return {**payload, key: message_id}


class Acknowledgement:
    """The broker's answer to one PUBLISH or SUBSCRIBE, in the making; with an outbox, the disk's before that.

    Args:
        what: what is waited for, for errors.
        is_kept: whether an outbox takes it.

    Attributes:
        message_id: the id of a message in an outbox; empty for others.
    """

    message_id: str = ""

    def __init__(self, what: str, *, is_kept: bool = False) -> None:
        self.what = what
        self._settled = threading.Event()
        self._error: BirthmarkError | None = None
        self._stored = threading.Event() if is_kept else None
        self._not_stored: BirthmarkError | None = None

    @property
    def is_stored(self) -> bool:
        """Whether it is on this device's disk, or was; never without an outbox."""
        return self._stored is not None and self._stored.is_set() and self._not_stored is None

    def settle_stored(self, error: BirthmarkError | None = None) -> None:
        """Say that it is on the disk, or why it will never be."""
        if self._stored is not None and not self._stored.is_set():
            self._not_stored = error
            self._stored.set()

    def wait_stored(self, timeout_s: float | None = None) -> None:
        """Wait until it is on the disk, so that neither a power cut nor a kill can lose it.

        Raises:
            SystemFailureError: the disk does not take it.
            UnreachableError: the outbox is full, or it was not stored within `timeout_s` (None: wait for ever).
            LocalProtocolError: no outbox keeps it.
        """
        if self._stored is None:
            raise LocalProtocolError(
                f"could not wait until it is stored to {self.what}: no outbox keeps it",
                hint="give the client an outbox (docs/outbox.md)",
            )
        if not self._stored.wait(timeout_s):
            raise UnreachableError(f"could not {self.what}: the disk did not take it within {timeout_s:g} s")
        if self._not_stored is not None:
            raise self._not_stored

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
