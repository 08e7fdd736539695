"""Which sessions a topic goes to: a tree of filters, and the routes already found.

Rules (MQTT 3.1.1 §4.7, §3.3.5):

- A subscriber with several matching filters appears once, with the highest QoS among them.
- A route is kept until a filter that could change it comes or goes, or the policy changes; what is kept is
  bounded by topics and by subscribers on them together.
- A route holds only subscribers that may receive its topic: the policy is asked when the route is found.

Pure: subscribers are opaque, and nothing here knows sessions or sockets. Nothing recurses: a filter's levels
are as many as its sender likes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

from birthmark.broker.packets import topic_field

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

S = TypeVar("S")

MAX_ROUTES = 32_768
MAX_ROUTE_TARGETS = 262_144
MAX_ROUTE_TOPIC_CHARACTERS = 1_024
"""A longer topic's route is found anew each time, so that what is kept stays small."""


class Route(Generic[S]):
    """Where one topic goes."""

    __slots__ = ("targets", "topic", "topic_bytes")

    def __init__(self, topic: str, targets: tuple[tuple[S, int], ...]) -> None:
        self.topic = topic
        self.topic_bytes = topic_field(topic)
        self.targets = targets
        """The subscribers, with the QoS granted to each."""


class _Node(Generic[S]):
    __slots__ = ("children", "subscribers")

    def __init__(self) -> None:
        self.children: dict[str, _Node[S]] = {}
        self.subscribers: dict[S, int] = {}


class Router(Generic[S]):
    """The subscriptions of all sessions.

    Args:
        may_receive: whether a subscriber may be sent messages of a topic.
    """

    def __init__(self, may_receive: Callable[[S, str], bool]) -> None:
        self._may_receive = may_receive
        self._root: _Node[S] = _Node()
        self._routes: dict[str, Route[S]] = {}
        self._route_targets = 0
        self.count = 0
        """Subscriptions, all sessions together."""

    def subscribe(self, subscriber: S, topic_filter: str, qos: int) -> None:
        """Add a subscription, or change the QoS of the same one (§3.8.4-3)."""
        node = self._root
        for level in topic_filter.split("/"):
            child = node.children.get(level)
            if child is None:
                child = node.children[level] = _Node()
            node = child
        if subscriber not in node.subscribers:
            self.count += 1
        node.subscribers[subscriber] = qos
        self._changed(topic_filter)

    def unsubscribe(self, subscriber: S, topic_filter: str) -> None:
        """Remove a subscription, if it is there, and the branches that it leaves empty."""
        path = [("", self._root)]
        for level in topic_filter.split("/"):
            child = path[-1][1].children.get(level)
            if child is None:
                return
            path.append((level, child))
        if path[-1][1].subscribers.pop(subscriber, None) is None:
            return
        self.count -= 1
        for position in range(len(path) - 1, 0, -1):
            level, node = path[position]
            if node.subscribers or node.children:
                break
            del path[position - 1][1].children[level]
        self._changed(topic_filter)

    def route(self, topic: str) -> Route[S]:
        """Return where a topic goes. `topic` is a valid topic name."""
        found = self._routes.get(topic)
        return found if found is not None else self._find(topic)

    def forget_routes(self) -> None:
        """Forget every route found: what subscribers may receive has changed."""
        self._routes.clear()
        self._route_targets = 0

    def filters(self) -> Iterator[tuple[str, dict[S, int]]]:
        """Every filter, with its subscribers and their QoS."""
        pending: list[tuple[str | None, _Node[S]]] = [(None, self._root)]
        while pending:
            prefix, node = pending.pop()
            if node.subscribers:
                yield prefix or "", node.subscribers
            for level, child in node.children.items():
                pending.append((level if prefix is None else f"{prefix}/{level}", child))

    def _find(self, topic: str) -> Route[S]:
        granted: dict[S, int] = {}
        for subscribers in self._matching(topic.split("/")):
            for subscriber, qos in subscribers.items():
                if granted.get(subscriber, -1) < qos:
                    granted[subscriber] = qos
        route = Route(topic, tuple(item for item in granted.items() if self._may_receive(item[0], topic)))
        if len(topic) <= MAX_ROUTE_TOPIC_CHARACTERS and len(route.targets) < MAX_ROUTE_TARGETS:
            self._route_targets += len(route.targets)
            if len(self._routes) >= MAX_ROUTES or self._route_targets >= MAX_ROUTE_TARGETS:
                self.forget_routes()
                self._route_targets = len(route.targets)
            self._routes[topic] = route
        return route

    def _matching(self, levels: list[str]) -> Iterator[dict[S, int]]:
        nodes = [self._root]
        for depth, level in enumerate(levels):
            # A filter that begins with a wildcard does not match `$...` (§4.7.2-1).
            wild = depth > 0 or not level.startswith("$")
            deeper = []
            for node in nodes:
                children = node.children
                if wild and "#" in children:
                    yield children["#"].subscribers
                exact = children.get(level)
                if exact is not None:
                    deeper.append(exact)
                if wild and "+" in children:
                    deeper.append(children["+"])
            if not deeper:
                return
            nodes = deeper
        for node in nodes:
            if node.subscribers:
                yield node.subscribers
            below = node.children.get("#")
            if below is not None:
                yield below.subscribers

    def _changed(self, topic_filter: str) -> None:
        if "+" in topic_filter or "#" in topic_filter:
            self.forget_routes()
            return
        gone = self._routes.pop(topic_filter, None)
        if gone is not None:
            self._route_targets -= len(gone.targets)
