"""What a renewal uses of its client: the connection that is there, and one of its own where there can be none.

The gateway's renewal listener lets in what has expired, and knows the renewal topics only. It is asked over a
connection that has no presence, keeps no session, and ends with the answer.
"""

from __future__ import annotations

import contextlib
import queue
from typing import TYPE_CHECKING

from birthmark.device import topics
from birthmark.device.connection_checks import Check
from birthmark.device.errors import RefusedError, UnreachableError
from birthmark.device.renewal.messages import RenewalAnswer

if TYPE_CHECKING:
    from collections.abc import Callable

    from birthmark.device.client import Client
    from birthmark.device.credentials import Credentials
    from birthmark.device.events import RenewalChanged
    from birthmark.device.identity import DeviceId


class RenewalConnection:
    """The client, as `renewer.Connection`.

    Args:
        device_id: whose.
        port: of the renewal listener; None: the port after the gateway's own.
        use: has the client connect anew with other credentials.
        keep: has the client know the credentials in use by another name.
        publish: publishes on a topic.
        tell: gives an event to the observer.
        open_apart: makes a client, not started, for a connection of its own.
    """

    def __init__(
        self,
        device_id: DeviceId,
        port: int | None,
        *,
        use: Callable[[Credentials], None],
        keep: Callable[[Credentials], None],
        publish: Callable[[str, bytes], object],
        tell: Callable[[RenewalChanged], None],
        open_apart: Callable[[Credentials], Client],
    ) -> None:
        self._request_topic = topics.renewal_request(device_id)
        self._answer_topic = topics.renewal_answer(device_id)
        self._port = port
        self.use = use
        self.keep = keep
        self._publish = publish
        self.tell = tell
        self._open_apart = open_apart

    def publish_request(self, payload: bytes) -> None:
        """Publish on the device's `renewal/request`; raises `UnreachableError` if too much waits already."""
        self._publish(self._request_topic, payload)

    def ask_apart(self, credentials: Credentials, payload: bytes, timeout_s: float) -> RenewalAnswer | None:
        """Ask the gateway's renewal listener; None if no answer came in time.

        Raises:
            ConnectionFailedError: it is not there, or does not let us in.
            RemoteProtocolError: what came is no answer.
        """
        port = self._port or min(credentials.broker.port + 1, 65535)
        answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        apart = credentials.changed(broker=credentials.broker.changed(port=port))
        try:
            with self._open_apart(apart) as client:
                client.subscribe(self._answer_topic, lambda message: answers.put(message.payload), wait=timeout_s)
                client.publish(self._request_topic, payload, wait=timeout_s)
                with contextlib.suppress(queue.Empty):
                    return RenewalAnswer.from_bytes(answers.get(timeout=timeout_s))
        except UnreachableError as error:
            if error.check != Check.NETWORK:
                raise
            hint = "has the gateway's broker.toml a [renewal_listener] (by default there is none), on this port?"
            raise UnreachableError(error.message, hint, error.check) from error
        except RefusedError as error:
            if error.check not in (Check.EXPIRED, Check.NOT_AUTHORISED):
                raise
            # That it has expired is why we are there, and not why we are refused.
            raise RefusedError(
                f"could not renew at {apart.broker}: it refuses our certificate: revoked, or expired for too long",
                "the gateway's log says which; the station makes this device again with `birthmark reflash`",
                error.check,
            ) from error
        return None
