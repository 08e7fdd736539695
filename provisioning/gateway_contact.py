"""The brokers at which gateways are talked to: each one's own, or an upstream that several have a link to.

Rules: one connection to a broker serves every gateway that is reached there, in a session of its own each time, so
that several commands by one operator do not take over from each other.
"""

from __future__ import annotations

import secrets
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from birthmark.device.credentials import BrokerAddress, Credentials

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from birthmark.device.client import Client
    from birthmark.provisioning.gateway_settings import Gateway, Upstream

STOP_S: Final = 1.0
_LEAST_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class Contact:
    """A broker, whom we are there, and the gateways that are reached there."""

    address: BrokerAddress
    operator_path: Path
    anchors_path: Path
    """The CA certificates that the broker's own may lead to (PEM)."""
    gateways: tuple[Gateway, ...]
    upstream: str = ""
    """The upstream's name; empty for a gateway's own broker."""

    @contextmanager
    def client(self, purpose: str, deadline: float) -> Iterator[Client]:
        """Be connected there within the block.

        Args:
            purpose: a word for the client id.
            deadline: until when to try (`time.monotonic`).

        Raises:
            BirthmarkError: it cannot be reached in time, does not let us in, or our files cannot be used.
        """
        from birthmark.device.client import Client  # noqa: PLC0415 - it costs time to import, and many have no gateway

        credentials = Credentials.from_files(self.operator_path, self.anchors_path, self.address)
        suffix = f"{purpose}-{secrets.token_hex(4)}"
        client = Client(credentials, client_suffix=suffix, connect_timeout_s=left(deadline))
        client.connect(timeout_s=left(deadline))
        try:
            yield client
        finally:
            client.stop(timeout_s=STOP_S)


def contacts(gateways: Sequence[Gateway], upstreams: Sequence[Upstream], anchors_path: Path) -> list[Contact]:
    """Return where those of the gateways that are reached over MQTT are talked to.

    Args:
        gateways: which; those that are reached by a path are passed over.
        upstreams: that some of them are reached through.
        anchors_path: the station's roots.
    """
    found = [
        Contact(BrokerAddress(gateway.host, gateway.port), gateway.operator_path, anchors_path, (gateway,))
        for gateway in gateways
        if gateway.operator_path is not None
    ]
    for upstream in upstreams:
        behind = tuple(gateway for gateway in gateways if gateway.via.lower() == upstream.name.lower())
        if behind:
            address = BrokerAddress(upstream.host, upstream.port)
            anchors = upstream.ca_path or anchors_path
            found.append(Contact(address, upstream.operator_path, anchors, behind, upstream.name))
    return found


def left(deadline: float) -> float:
    """Return the seconds until `deadline` (`time.monotonic`), a few milliseconds at least."""
    return max(_LEAST_S, deadline - time.monotonic())
