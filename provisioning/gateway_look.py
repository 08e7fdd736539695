"""What the station's gateways say of themselves, for `birthmark doctor`: looked at, and nothing brought.

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
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from birthmark.device.client import Client
from birthmark.device.credentials import BrokerAddress, Credentials
from birthmark.device.errors import BirthmarkError, RefusedError, RemoteProtocolError
from birthmark.device.identity import BrokerName
from birthmark.device.messages import GatewayStatus, Sighting
from birthmark.device.topics import gateway_seen, gateway_status

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from birthmark.device.received import Message
    from birthmark.provisioning.settings import Gateway

DEFAULT_TIMEOUT_S: Final = 5.0
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
        return _by_mqtt(gateway, anchors_path, deadline)
    except BirthmarkError as error:
        return Look(gateway.name, gateway.reached_by, error.message)
    except OSError as error:
        where = error.filename or gateway.reached_by
        return Look(gateway.name, gateway.reached_by, f"could not read {where}: {error.strerror or error}")


def _by_mqtt(gateway: Gateway, anchors_path: Path, deadline: float) -> Look:
    if gateway.operator_path is None:
        raise BirthmarkError(f"could not reach {gateway.name}: no operator is set for it")
    address = BrokerAddress(gateway.host, gateway.port)
    credentials = Credentials.from_files(gateway.operator_path, anchors_path, address)
    name = BrokerName(gateway.name)
    sightings: list[Sighting] = []
    statuses: queue.Queue[GatewayStatus] = queue.Queue()
    guard = threading.Lock()

    def keep_sighting(message: Message) -> None:
        with contextlib.suppress(RemoteProtocolError), guard:
            sightings.append(Sighting.from_bytes(message.payload))

    def keep_status(message: Message) -> None:
        with contextlib.suppress(RemoteProtocolError):
            if message.retained:
                statuses.put(GatewayStatus.from_bytes(message.payload))

    client = Client(credentials, client_suffix=f"look-{secrets.token_hex(4)}", connect_timeout_s=_left(deadline))
    client.connect(timeout_s=_left(deadline))
    try:
        may_see = True
        try:
            client.subscribe(gateway_seen(name, "+"), keep_sighting, qos=0, wait=_left(deadline))
        except RefusedError:
            may_see = False  # a policy of before: `birthmark doctor` says so
        client.subscribe(gateway_status(name), keep_status, qos=0, wait=_left(deadline))
        status = statuses.get(timeout=_left(deadline))
    except queue.Empty:
        return Look(
            gateway.name, gateway.reached_by, f"nothing from a gateway of that name at {gateway.reached_by}"
        )
    finally:
        client.stop(timeout_s=_STOP_S)
    with guard:
        seen = tuple(sightings)
    return Look(
        gateway.name,
        gateway.reached_by,
        crl_numbers=tuple(sorted(status.crl_numbers.items())),
        status=status,
        sightings=seen if may_see else None,
        looked_at_s=time.time(),
    )


def _left(deadline: float) -> float:
    """Return the seconds until `deadline`, a few milliseconds at least."""
    return max(_LEAST_S, deadline - time.monotonic())
