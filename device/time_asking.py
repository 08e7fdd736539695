"""The gateway's clock, for a device whose owner trusts it more than its own (docs/clock.md).

Rules:

- It is asked at every connection, over that connection, with a nonce of 16 random octets. An answer counts once,
  if it has the nonce of the last request, and is not retained.
- It moves the floor forward, never back, and never to where a certificate of the gateway, or ours, is not valid.
"""

from __future__ import annotations

import logging
import secrets
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from birthmark.device.errors import BirthmarkError
from birthmark.device.messages import NONCE_BYTES, TimeAnswer, TimeRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from birthmark.device.certificate_facts import CertificateFacts
    from birthmark.device.clock import Clock
    from birthmark.device.received import Message

_log = logging.getLogger(__name__)


class TimeAsking:
    """Asks one gateway after the other. Its methods are called on one thread.

    Args:
        clock: is moved forward.
        publish: publishes a request, with QoS 0.
        own: our certificate.
    """

    def __init__(
        self, clock: Clock, *, publish: Callable[[bytes], object], own: Callable[[], CertificateFacts]
    ) -> None:
        self._clock = clock
        self._publish = publish
        self._own = own
        self._nonce: bytes | None = None

    def connected(self) -> None:
        """Ask, over a new connection."""
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        try:
            self._publish(TimeRequest(self._nonce).to_bytes())
        except BirthmarkError as error:
            _log.warning("could not ask the gateway for the time: %s", error.message)

    def answered(self, message: Message) -> None:
        """Take a message on our `time/answer`."""
        try:
            answer = TimeAnswer.from_bytes(message.payload)
            told = datetime.fromtimestamp(answer.time, UTC)
        except (BirthmarkError, ValueError, OverflowError, OSError):
            _log.warning("could not go by the gateway's time: its answer is none")
            return
        if message.retained or answer.nonce != self._nonce:
            return
        self._nonce = None
        if not self._clock.told(told, self._own()):
            _log.warning(
                "could not go by the gateway's time, %s: its certificate, or ours, is not valid then",
                told.isoformat(timespec="seconds"),
            )
