"""What the station puts into a device's bundle (docs/serial-protocol.md section 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from birthmark.device.identity import DeviceId, device_role
from birthmark.device.link.bundle import Bundle, BundleConfig

if TYPE_CHECKING:
    from datetime import datetime

    from birthmark.provisioning.authority import Authority
    from birthmark.provisioning.registry.model import Row


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Where a device finds its broker, as it is told in its bundle."""

    host: str
    port: int
    keepalive_s: int | None = None


def bundle_of(
    row: Row, authority: Authority, broker: BrokerAddress, certificate_der: bytes, *, now: datetime
) -> bytes:
    """Return the bundle of the device of `row`, whose certificate `authority` has signed.

    Raises:
        BundleRefusedError: it would break the schema.
    """
    return Bundle(
        leaf_der=certificate_der,
        issuing_der=(authority.issuing_der,),
        anchors_der=authority.anchors_der,
        config=BundleConfig(
            host=broker.host,
            port=broker.port,
            device_id=DeviceId(row.name),
            role=device_role(row.role),
            keepalive_s=broker.keepalive_s,
        ),
        issued_at=int(now.timestamp()),
    ).to_bytes()
