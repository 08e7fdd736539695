"""What the station's gateways say of themselves; nothing is brought.

Rules:

- Over MQTT: the retained `gateway/{name}/status` and, where that is asked for, `gateway/{name}/seen/+`, in the
  name of an operator, at each gateway's own broker or at the upstream that it keeps a link to. Whom it saw is
  asked first: a broker sends retained messages in the order in which they were asked for, so with the status all
  have come.
- Of several servers each may retain something else, and an old status stays where a gateway was connected before:
  the newest counts, by the gateway's own clock.
- A gateway that is reached by a path cannot be asked; of it is known what its receipts said (`gateway_receipts`).
- All gateways at once, within one time-out; what goes wrong at one is said in its look.
"""

from __future__ import annotations

import contextlib
import queue
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

from birthmark.device.errors import BirthmarkError, RefusedError, RemoteProtocolError, UnreachableError
from birthmark.device.identity import BrokerName
from birthmark.device.messages import GatewayStatus, Sighting
from birthmark.device.topics import (
    FLEET_POLICY,
    gateway_crl_in_force,
    gateway_receipts,
    gateway_seen,
    gateway_status,
)
from birthmark.provisioning.at_once import in_order
from birthmark.provisioning.gateway_contact import Contact, contacts, left, unknown_at

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from pathlib import Path

    from birthmark.device.client import Client
    from birthmark.device.credentials import BrokerAddress
    from birthmark.device.received import Message
    from birthmark.provisioning.gateway_settings import Gateway, Upstream

DEFAULT_TIMEOUT_S: Final = 5.0
MAX_TOLD_BYTES: Final = 256 * 1024 * 1024
"""Four times what a broker retains by default. Whoever has one must not have the station run out of memory."""
_FOR_ALL: Final = ""
"""Stands for the fleet among the names of gateways."""


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen of one gateway."""

    name: str
    reached_by: str
    cause: str = ""
    """Why it could not be looked at; empty if it could."""
    crl_numbers: tuple[tuple[str, int], ...] = ()
    """Of the CRLs in force there, by the issuing CA's key identifier."""
    status: GatewayStatus | None = None
    """None for one that is reached by a path."""
    sightings: tuple[Sighting, ...] | None = None
    """Whom it saw; None where it cannot be asked, or was not."""
    looked_at_s: float = 0.0
    """When the status came, in seconds since 1970, by this station's clock."""
    via: str = ""
    """The upstream that it was seen through."""


def look_at(
    gateways: Sequence[Gateway],
    *,
    anchors_path: Path,
    timeout_s: float,
    upstreams: Sequence[Upstream] = (),
    sightings: bool = True,
) -> list[Look]:
    """Look at every gateway that is reached over MQTT, at all at once. Never fails as a whole.

    Args:
        gateways: which; those that are reached by a path are passed over.
        anchors_path: the CA certificates that a gateway's own certificate leads to (PEM).
        timeout_s: how long to wait in all.
        upstreams: that some of the gateways are reached through.
        sightings: whether to ask whom each saw.
    """
    reached = contacts(gateways, upstreams, anchors_path)
    deadline = time.monotonic() + timeout_s
    looks = in_order(lambda contact: _look(contact, deadline, sightings=sightings), reached)
    found = {look.name: look for some in looks for look in some}
    return [found[gateway.name] for gateway in gateways if gateway.name in found]


def crls_in_force(
    contact: Contact, issuers: Iterable[str], *, timeout_s: float
) -> tuple[dict[str, list[bytes] | BirthmarkError], list[bytes]]:
    """Return by name the CRLs (DER) that each gateway at a contact goes by, as it says, or why there are none.

    Beside them the fleet's policy, as it is retained there, if it is.

    Args:
        contact: where.
        issuers: the key identifiers of the CAs whose CRLs are asked for.
        timeout_s: how long to wait.

    Raises:
        BirthmarkError: no server there can be reached.
    """
    asked = [
        (gateway.name, gateway_crl_in_force(BrokerName(gateway.name), issuer))
        for gateway in contact.gateways
        for issuer in ("+", *issuers)  # a RabbitMQ answers to exact topics only
    ]
    asked.append((_FOR_ALL, FLEET_POLICY))
    told = _ask(contact, asked, time.monotonic() + timeout_s)
    crls = {gateway.name: _crls_of(gateway, told[gateway.name]) for gateway in contact.gateways}
    return crls, list(told[_FOR_ALL].payloads)


def _crls_of(gateway: Gateway, told: _Told) -> list[bytes] | BirthmarkError:
    if told.status is None:
        return UnreachableError(told.silence)
    if told.is_denied:
        return RefusedError(f"could not ask {gateway.name} for its CRL: the policy keeps that from its operator")
    if not told.payloads:
        return BirthmarkError(f"could not take the CRL of {gateway.name}: it does not say which one it goes by")
    return list(told.payloads)


def _look(contact: Contact, deadline: float, *, sightings: bool) -> list[Look]:
    asked = [
        (gateway.name, gateway_seen(BrokerName(gateway.name), "+")) for gateway in contact.gateways if sightings
    ]
    try:
        told = _ask(contact, asked, deadline)
    except BirthmarkError as error:
        return [Look(gateway.name, gateway.reached_by, error.message) for gateway in contact.gateways]
    except OSError as error:
        cause = f"could not read {error.filename or contact.where}: {error.strerror or error}"
        return [Look(gateway.name, gateway.reached_by, cause) for gateway in contact.gateways]
    return [_look_of(contact, gateway, told[gateway.name], is_asked=bool(asked)) for gateway in contact.gateways]


def _look_of(contact: Contact, gateway: Gateway, told: _Told, *, is_asked: bool) -> Look:
    if told.status is None:
        return Look(gateway.name, gateway.reached_by, told.silence, via=contact.upstream)
    seen = []
    for payload in told.payloads:
        with contextlib.suppress(RemoteProtocolError):
            seen.append(Sighting.from_bytes(payload))
    # RabbitMQ gives nothing that is retained to a wildcard: then nobody seems to have been seen.
    is_mute = bool(contact.upstream) and told.status.sessions > 0 and not seen
    is_told = is_asked and not (told.is_denied or is_mute)
    return Look(
        gateway.name,
        gateway.reached_by,
        crl_numbers=tuple(sorted(told.status.crl_numbers.items())),
        status=told.status,
        sightings=tuple(seen) if is_told else None,
        looked_at_s=told.at_s,
        via=contact.upstream,
    )


@dataclass(slots=True)
class _Told:
    """What came of one gateway."""

    status: GatewayStatus | None = None
    """The newest."""
    at_s: float = 0.0
    statuses: dict[BrokerAddress, GatewayStatus] = field(default_factory=dict)
    """By who holds them."""
    payloads: dict[bytes, None] = field(default_factory=dict)
    """What it retains on the topics that were asked for."""
    silence: str = ""
    """Why nothing may have come."""
    is_denied: bool = False
    """Whether the policy denies these: one of before they were there."""


class _Hearing:
    """What comes of all gateways at one contact; the callbacks run in order, on one thread."""

    def __init__(self, names: Sequence[str]) -> None:
        self.told = {name: _Told() for name in (*names, _FOR_ALL)}
        self._names = names
        self.told_bytes = 0
        self.statuses: queue.Queue[str] = queue.Queue()

    @property
    def is_over(self) -> bool:
        """Whether a status of every gateway has come, or far too much."""
        return self.told_bytes > MAX_TOLD_BYTES or all(self.told[name].status for name in self._names)

    def keep(self, name: str, message: Message) -> None:
        self.told_bytes += len(message.payload)
        if message.retained and self.told_bytes <= MAX_TOLD_BYTES:
            self.told[name].payloads[message.payload] = None

    def keep_status(self, name: str, server: BrokerAddress, message: Message) -> None:
        with contextlib.suppress(RemoteProtocolError):
            status = GatewayStatus.from_bytes(message.payload)
            told = self.told[name]
            told.statuses[server] = status
            newest = max(told.statuses.values(), key=lambda each: each.clock)
            if newest is status:
                told.at_s = time.time()
            told.status = newest
            self.statuses.put(name)


def _ask(contact: Contact, asked: Sequence[tuple[str, str]], deadline: float) -> dict[str, _Told]:
    """Return by name what is retained of each gateway at a contact: its status, and what is asked for by a filter.

    Raises:
        BirthmarkError: no server can be reached, or one denies the statuses, or says too much.
    """
    names = [gateway.name for gateway in contact.gateways]
    hearing = _Hearing(names)
    with contact.connected("look", deadline) as connected:
        servers = connected.clients
        wanted = [
            (name, client.subscribe(topic, partial(hearing.keep, name), qos=0))
            for client in servers.values()
            for name, topic in asked
        ]
        for name, acknowledgement in wanted:
            try:
                acknowledgement.wait(left(deadline))
            except RefusedError:
                hearing.told[name].is_denied = True
        statuses = [
            client.subscribe(gateway_status(BrokerName(name)), partial(hearing.keep_status, name, server), qos=0)
            for server, client in servers.items()
            for name in names
        ]
        for acknowledgement in statuses:
            acknowledgement.wait(left(deadline))
        if len(servers) > 1:
            _hear_all(servers.values(), names, deadline)
        with contextlib.suppress(queue.Empty):
            while not hearing.is_over:
                hearing.statuses.get(timeout=left(deadline))
                if time.monotonic() >= deadline:
                    break
    if hearing.told_bytes > MAX_TOLD_BYTES:
        raise RemoteProtocolError(
            f"could not take what is said at {contact.where}: it is more than {MAX_TOLD_BYTES} bytes",
            hint="no gateway retains so much of itself: look at that machine",
        )
    for gateway in contact.gateways:
        hearing.told[gateway.name].silence = (
            unknown_at(contact.upstream, connected)
            if contact.upstream
            else f"nothing from a gateway of that name at {gateway.reached_by}"
        )
    return hearing.told


def _hear_all(clients: Collection[Client], names: Sequence[str], deadline: float) -> None:
    """Wait until each server has sent the statuses that it retains: they come before its next SUBACK."""
    topic = gateway_receipts(BrokerName(names[0]))
    for acknowledgement in [client.subscribe(topic, lambda _message: None, qos=0) for client in clients]:
        with contextlib.suppress(RefusedError):
            acknowledgement.wait(left(deadline))
    for client in clients:
        client.wait_for_callbacks(left(deadline))
