"""What happens to a client, as values: they are given to its observer, one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from birthmark.device.errors import BirthmarkError
from birthmark.device.escape import escaped
from birthmark.device.frozen import Frozen

if TYPE_CHECKING:
    from birthmark.device.clock import Moment
    from birthmark.device.credentials import BrokerAddress
    from birthmark.device.errors import ConnectionFailedError


class Connected(Frozen):
    """The broker let us in; subscriptions and presence were sent."""

    broker: BrokerAddress
    client_id: str
    tls_version: str
    tls_resumed: bool
    """Whether the TLS session of an earlier connection was used again."""
    session_present: bool
    """Whether the broker had kept our MQTT session."""
    moment: Moment
    """The time that the broker's certificate was checked by."""


class Disconnected(Frozen):
    """A connection that was up ended, and we did not end it."""

    error: ConnectionFailedError
    connected_for_s: float
    retry_in_s: float


class AttemptFailed(Frozen):
    """A connection did not come about."""

    error: ConnectionFailedError
    retry_in_s: float
    renews: bool = False
    """Whether our certificate, which has expired, is renewed meanwhile: with a new one we connect at once."""


class SubscriptionDenied(Frozen):
    """The broker does not let us subscribe to this filter (SUBACK 0x80)."""

    topic_filter: str

    def in_words(self) -> str:
        """Return it as one line."""
        return f"the broker does not let us subscribe to {escaped(self.topic_filter)}"


class HandlerFailed(Frozen):
    """A callback raised; the client goes on."""

    topic: str
    """Of the message that it was given; for what is done at intervals, the function's name."""
    error: Exception

    def in_words(self) -> str:
        """Return it as one line; of somebody else's error only its kind is told."""
        cause = self.error.message if isinstance(self.error, BirthmarkError) else type(self.error).__name__
        return f"the handler of {escaped(self.topic)} failed: {cause}"


RenewalState = Literal["asked", "granted", "trying", "confirming", "renewed", "refused", "rolled-back", "failed"]


class RenewalChanged(Frozen):
    """The renewal of our certificate has come to another state."""

    state: RenewalState
    detail: str
    """For people; what others have said in it is not escaped."""
    retry_in_s: float | None = None
    """When the next attempt is made at the latest, if this one did not succeed."""


OutboxCondition = Literal["waiting", "drained", "dropping", "failing", "working", "set-aside"]


class OutboxChanged(Frozen):
    """The outbox has come to another state."""

    state: OutboxCondition
    """`waiting`: it has messages from before this start; `set-aside`: its file was of no use, a new one began."""
    detail: str
    """For people; a file's path in it is not escaped."""


Event = (
    Connected | Disconnected | AttemptFailed | SubscriptionDenied | HandlerFailed | RenewalChanged | OutboxChanged
)
