"""What amqtt's plug-ins see of our sessions, subscriptions and retained messages: read-only, made when asked.

amqtt's own tables stay empty: they are what its defects live in (docs/amqtt.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from amqtt.broker import RetainedApplicationMessage

if TYPE_CHECKING:
    from birthmark.broker.delivery import Exchange
    from birthmark.broker.session import Session


class SessionsView(Mapping[str, "tuple[Session, None]"]):
    """Sessions by client id; there is no amqtt handler behind any of them."""

    def __init__(self, exchange: Exchange) -> None:
        self._sessions = exchange.sessions

    def __getitem__(self, client_id: str) -> tuple[Session, None]:
        session = self._sessions.get(client_id)
        if session is None:
            raise KeyError(client_id)
        return session, None

    def __iter__(self) -> Iterator[str]:
        return (session.client_id for session in self._sessions)

    def __len__(self) -> int:
        return len(self._sessions)


class RetainedView(Mapping[str, RetainedApplicationMessage]):
    """Retained messages by topic."""

    def __init__(self, exchange: Exchange) -> None:
        self._retained = exchange.retained

    def __getitem__(self, topic: str) -> RetainedApplicationMessage:
        message = self._retained.get(topic)
        if message is None:
            raise KeyError(topic)
        return RetainedApplicationMessage(None, topic, message.payload, message.qos)

    def __iter__(self) -> Iterator[str]:
        return (message.topic for message in self._retained)

    def __len__(self) -> int:
        return len(self._retained)


def subscriptions_view(exchange: Exchange) -> dict[str, list[tuple[Session, int]]]:
    """Subscribers and their QoS by filter."""
    return {topic_filter: list(subscribers.items()) for topic_filter, subscribers in exchange.router.filters()}
