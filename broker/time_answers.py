"""The time, for devices that have no clock and trust their gateway's (docs/clock.md).

Rules:

- The gateway itself takes what is published on `devices/{id}/time/request`, once the policy has allowed it: nobody
  else ever sees a nonce, so nobody else can answer.
- Only the device whose topic it is gets an answer; a request that is none gets none.
- An answer is of QoS 0 and never retained: one that comes late is worth nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from birthmark.device.errors import RemoteProtocolError
from birthmark.device.messages import TimeAnswer, TimeRequest
from birthmark.device.topics import time_answer, time_request

if TYPE_CHECKING:
    from collections.abc import Callable

    from birthmark.broker.peer import Peer


class TimeAnswers:
    """Tells the time to whoever asks.

    Args:
        publish: publishes a message of the gateway's own, of QoS 0.
        now_s: seconds since 1970.
    """

    def __init__(self, publish: Callable[[str, bytes], None], now_s: Callable[[], float]) -> None:
        self._publish = publish
        self._now_s = now_s

    def asked(self, topic: str, payload: bytes, peer: Peer) -> None:
        """Answer a message on `devices/+/time/request`."""
        if topic != time_request(peer.device_id):
            return
        try:
            request = TimeRequest.from_bytes(payload)
        except RemoteProtocolError:
            return
        self._publish(time_answer(peer.device_id), TimeAnswer(request.nonce, self._now_s()).to_bytes())
