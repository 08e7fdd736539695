"""An amqtt plug-in that writes down what it is told."""

from __future__ import annotations

from typing import Any, ClassVar

from amqtt.broker import BrokerContext
from amqtt.plugins.base import BasePlugin


class Recorder(BasePlugin[BrokerContext]):
    """Events of the newest broker that loaded it, and that broker's context."""

    events: ClassVar[list[tuple[str, Any]]] = []
    contexts: ClassVar[list[BrokerContext]] = []

    def __init__(self, context: BrokerContext) -> None:
        super().__init__(context)
        self.events.clear()
        self.contexts[:] = [context]

    async def on_broker_post_start(self) -> None:
        self.events.append(("started", None))

    async def on_broker_client_connected(self, client_id: str, client_session: Any) -> None:  # noqa: ARG002 - amqtt passes it by name
        self.events.append(("connected", client_id))

    async def on_broker_client_disconnected(self, client_id: str, client_session: Any) -> None:  # noqa: ARG002 - amqtt passes it by name
        self.events.append(("disconnected", client_id))

    async def on_broker_client_subscribed(self, client_id: str, topic: str, qos: int) -> None:
        self.events.append(("subscribed", (client_id, topic, qos)))

    async def on_broker_client_unsubscribed(self, client_id: str, topic: str) -> None:
        self.events.append(("unsubscribed", (client_id, topic)))

    async def on_broker_message_received(self, client_id: str, message: Any) -> None:
        self.events.append(("message", (client_id, message.topic, message.data, message.qos)))

    async def on_broker_post_shutdown(self) -> None:
        self.events.append(("stopped", None))
