"""What the station's gateways say of themselves, for `birthmark doctor` and for a restore; nothing is brought.

Rules:

- Over MQTT: the retained `gateway/{name}/status` and `gateway/{name}/seen/+`, in the name of its operator.
  Whom it saw is asked first: the broker sends retained messages in the order in which they were asked for, so
  with the retained status all have come.
- A gateway that is reached by a path cannot be asked; of it is known what its receipts said (`gateway_receipts`).
- All gateways at once, within one time-out; what goes wrong at one is said in its look.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from birthmark.device.client import Client
from birthmark.device.credentials import BrokerAddress, Credentials
from birthmark.device.errors import BirthmarkError, RefusedError, RemoteProtocolError, UnreachableError
from birthmark.device.identity import BrokerName
from birthmark.device.messages import GatewayStatus, Sighting
from birthmark.device.topics import gateway_crl_in_force, gateway_seen, gateway_status

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from birthmark.device.received import Message
    from birthmark.provisioning.gateway_settings import Gateway

DEFAULT_TIMEOUT_S: Final = 5.0
MAX_TOLD_BYTES: Final = 256 * 1024 * 1024
"""Four times what a gateway retains by default. Whoever has one must not have the station run out of memory."""
_STOP_S: Final = 1.0
_LEAST_S: Final = 0.02


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
    """Whom it saw; None where it cannot be asked."""
    looked_at_s: float = 0.0
    """When the status came, in seconds since 1970, by this station's clock."""


def look_at(gateways: Sequence[Gateway], *, anchors_path: Path, timeout_s: float) -> list[Look]:
    """Look at every gateway at once, for `timeout_s` at most. Never fails as a whole.

    Args:
        gateways: which.
        anchors_path: the CA certificates that a gateway's own certificate leads to (PEM).
        timeout_s: how long to wait in all.
    """
    if not gateways:
        return []
    deadline = time.monotonic() + timeout_s
    with ThreadPoolExecutor(max_workers=min(32, len(gateways))) as pool:
        return list(pool.map(lambda gateway: _look_at_one(gateway, anchors_path, deadline), gateways))


def _look_at_one(gateway: Gateway, anchors_path: Path, deadline: float) -> Look:
    try:
        return _look_by_mqtt(gateway, anchors_path, deadline)
    except BirthmarkError as error:
        return Look(gateway.name, gateway.reached_by, error.message)
    except OSError as error:
        where = error.filename or gateway.reached_by
        return Look(gateway.name, gateway.reached_by, f"could not read {where}: {error.strerror or error}")


def crls_in_force(gateway: Gateway, *, anchors_path: Path, timeout_s: float) -> list[bytes]:
    """Return the CRLs (DER) that a gateway which is reached by MQTT goes by, as it says.

    Raises:
        BirthmarkError: it cannot be reached, does not answer in time, or does not tell its operator.
    """
    name = BrokerName(gateway.name)
    topic = gateway_crl_in_force(name, "+")
    _, payloads = _retained(gateway, topic, anchors_path, time.monotonic() + timeout_s)
    if payloads is None:
        raise RefusedError(f"could not ask {gateway.name} for its CRL: its policy keeps that from its operator")
    if not payloads:
        raise BirthmarkError(f"could not take the CRL of {gateway.name}: it does not say which one it goes by")
    return payloads


def _look_by_mqtt(gateway: Gateway, anchors_path: Path, deadline: float) -> Look:
    topic = gateway_seen(BrokerName(gateway.name), "+")
    status, payloads = _retained(gateway, topic, anchors_path, deadline)
    sightings = []
    for payload in payloads or ():
        with contextlib.suppress(RemoteProtocolError):
            sightings.append(Sighting.from_bytes(payload))
    return Look(
        gateway.name,
        gateway.reached_by,
        crl_numbers=tuple(sorted(status.crl_numbers.items())),
        status=status,
        sightings=None if payloads is None else tuple(sightings),
        looked_at_s=time.time(),
    )


def _retained(
    gateway: Gateway, topic_filter: str, anchors_path: Path, deadline: float
) -> tuple[GatewayStatus, list[bytes] | None]:
    """Return a gateway's status, and what it retains on other topics; None if its policy denies these."""
    if gateway.operator_path is None:
        raise BirthmarkError(f"could not reach {gateway.name}: no operator is set for it")
    address = BrokerAddress(gateway.host, gateway.port)
    credentials = Credentials.from_files(gateway.operator_path, anchors_path, address)
    payloads: list[bytes] = []
    told_bytes = 0
    statuses: queue.Queue[GatewayStatus] = queue.Queue()

    def keep(message: Message) -> None:
        nonlocal told_bytes
        told_bytes += len(message.payload)
        if message.retained and told_bytes <= MAX_TOLD_BYTES:
            payloads.append(message.payload)

    def keep_status(message: Message) -> None:
        with contextlib.suppress(RemoteProtocolError):
            if message.retained:
                statuses.put(GatewayStatus.from_bytes(message.payload))

    client = Client(credentials, client_suffix=f"look-{secrets.token_hex(4)}", connect_timeout_s=_left(deadline))
    client.connect(timeout_s=_left(deadline))
    try:
        is_denied = False
        try:
            client.subscribe(topic_filter, keep, qos=0, wait=_left(deadline))
        except RefusedError:
            is_denied = True  # a policy of before
        client.subscribe(gateway_status(BrokerName(gateway.name)), keep_status, qos=0, wait=_left(deadline))
        # Callbacks run in order, on one thread: with the status, all that came before it has been kept.
        status = statuses.get(timeout=_left(deadline))
    except queue.Empty as error:
        raise UnreachableError(f"nothing from a gateway of that name at {gateway.reached_by}") from error
    finally:
        client.stop(timeout_s=_STOP_S)
    if told_bytes > MAX_TOLD_BYTES:
        raise RemoteProtocolError(
            f"could not take what {gateway.name} says: it is more than {MAX_TOLD_BYTES} bytes",
            hint="no gateway retains so much of itself: look at that machine",
        )
    return status, None if is_denied else payloads


def _left(deadline: float) -> float:
    """Return the seconds until `deadline`, a few milliseconds at least."""
    return max(_LEAST_S, deadline - time.monotonic())
