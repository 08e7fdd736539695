"""The state folder of an enrolled device, as the agent leaves it, without an enrollment."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from birthmark.device.identity import DeviceId, Role
from birthmark.device.link.bundle import Bundle, BundleConfig
from birthmark.device.pem import BUNDLE, TRANSACTION, block

if TYPE_CHECKING:
    from pathlib import Path

    from support.pki import Issued, Pki


def enrolled(
    folder: Path,
    pki: Pki,
    issued: Issued | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8883,
    keepalive_s: int | None = None,
    name: str = "sensor-1",
    slot: str = "active",
    issued_at: int | None = None,
    txn: bytes = bytes(16),
) -> Path:
    """Write the slot and return the folder."""
    leaf = issued or pki.device(name)
    config = BundleConfig(host, port, DeviceId(name), Role("device"), keepalive_s)
    bundle = Bundle(
        leaf_der=leaf.der,
        issuing_der=tuple(ca.der for ca in leaf.chain),
        anchors_der=(pki.root.der,),
        config=config,
        issued_at=int(time.time()) - 3600 if issued_at is None else issued_at,
    )
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / slot
    path.write_bytes(leaf.pem + block(BUNDLE, bundle.to_bytes()) + block(TRANSACTION, txn))
    path.chmod(0o600)
    return folder
