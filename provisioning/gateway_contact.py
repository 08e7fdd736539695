"""The brokers at which gateways are talked to: each one's own, or an upstream that several have a link to.

Rules:

- One connection to a server serves every gateway that is reached there, in a session of its own each time, so that
  several commands by one operator do not take over from each other.
- An upstream of several servers is talked to at each of them, as one node of a cluster may retain what the others
  do not (RabbitMQ). One that cannot be reached is missed, and named; it is an error only if none can.
"""

from __future__ import annotations

import secrets
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from birthmark.device.credentials import BrokerAddress, Credentials
from birthmark.device.errors import BirthmarkError, RefusedError
from birthmark.provisioning.at_once import in_order

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from birthmark.device.client import Client
    from birthmark.provisioning.gateway_settings import Gateway, Upstream

STOP_S: Final = 1.0
ONE_OF_SEVERAL_S: Final = 3.0
"""For one server of several: how long it may keep the others waiting."""
AGAIN_S: Final = 0.2
_LEAST_S: Final = 0.02


@dataclass(slots=True)
class Connected:
    """The servers of a contact that we are connected to."""

    clients: dict[BrokerAddress, Client] = field(default_factory=dict)
    missed: dict[BrokerAddress, str] = field(default_factory=dict)
    """Those that could not be reached, and why."""


@dataclass(frozen=True, slots=True)
class Contact:
    """A broker or a cluster, whom we are there, and the gateways that are reached there."""

    servers: tuple[BrokerAddress, ...]
    operator_path: Path
    anchors_path: Path
    """The CA certificates that a server's own may lead to (PEM)."""
    gateways: tuple[Gateway, ...]
    upstream: str = ""
    """The upstream's name; empty for a gateway's own broker."""

    @property
    def where(self) -> str:
        """What it is called, for people."""
        return self.upstream or str(self.servers[0])

    @contextmanager
    def connected(self, purpose: str, deadline: float) -> Iterator[Connected]:
        """Be connected there within the block, to every server that can be reached.

        Args:
            purpose: a word for the client ids.
            deadline: until when to try (`time.monotonic`).

        Raises:
            BirthmarkError: none can be reached in time, or lets us in, or our files cannot be used.
        """
        found = self._connect(purpose, deadline)
        try:
            yield found
        finally:
            in_order(lambda client: client.stop(timeout_s=STOP_S), list(found.clients.values()))

    @contextmanager
    def client(self, purpose: str, deadline: float) -> Iterator[Client]:
        """Be connected to the first server that can be reached; otherwise as `connected`."""
        with self.connected(purpose, deadline) as found:
            yield next(iter(found.clients.values()))

    def _connect(self, purpose: str, deadline: float) -> Connected:
        """Try all at once, and again until one is reached."""
        while True:
            answers = in_order(lambda server: self._attempt(server, purpose, deadline), self.servers)
            found = Connected()
            for server, answer in zip(self.servers, answers, strict=True):
                if isinstance(answer, BirthmarkError):
                    found.missed[server] = answer.message
                else:
                    found.clients[server] = answer
            if found.clients:
                return found
            refusals = [answer for answer in answers if isinstance(answer, BirthmarkError)]
            is_final = len(refusals) == 1 or all(isinstance(error, RefusedError) for error in refusals)
            if is_final or time.monotonic() + AGAIN_S >= deadline:
                raise refusals[0]
            time.sleep(AGAIN_S)

    def _attempt(self, server: BrokerAddress, purpose: str, deadline: float) -> Client | BirthmarkError:
        from birthmark.device.client import Client  # noqa: PLC0415 - it costs time to import, and many have no gateway

        credentials = Credentials.from_files(self.operator_path, self.anchors_path, server)
        suffix = f"{purpose}-{secrets.token_hex(4)}"
        is_alone = len(self.servers) == 1
        limit_s = left(deadline) if is_alone else min(left(deadline), ONE_OF_SEVERAL_S)
        client = Client(credentials, client_suffix=suffix, connect_timeout_s=limit_s)
        try:
            client.connect(timeout_s=limit_s if is_alone else 0.0)
        except BirthmarkError as error:
            return error
        return client


def contacts(gateways: Sequence[Gateway], upstreams: Sequence[Upstream], anchors_path: Path) -> list[Contact]:
    """Return where those of the gateways that are reached over MQTT are talked to.

    Args:
        gateways: which; those that are reached by a path are passed over.
        upstreams: that some of them are reached through.
        anchors_path: the station's roots.
    """
    found = [
        Contact((BrokerAddress(gateway.host, gateway.port),), gateway.operator_path, anchors_path, (gateway,))
        for gateway in gateways
        if gateway.operator_path is not None
    ]
    for upstream in upstreams:
        behind = tuple(gateway for gateway in gateways if gateway.via.lower() == upstream.name.lower())
        if behind:
            anchors = upstream.ca_path or anchors_path
            found.append(Contact(upstream.servers, upstream.operator_path, anchors, behind, upstream.name))
    return found


def unknown_at(upstream: str, connected: Connected) -> str:
    """Say that the servers of an upstream know nothing of a gateway."""
    if connected.missed:
        servers = ", ".join(map(str, connected.missed))
        return f"{upstream} knows nothing of it, and could not be reached at {servers}"
    return f"{upstream} knows nothing of it: has it a link there, with fleet = true?"


def left(deadline: float) -> float:
    """Return the seconds until `deadline` (`time.monotonic`), a few milliseconds at least."""
    return max(_LEAST_S, deadline - time.monotonic())
