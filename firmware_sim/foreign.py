"""A board that another station has locked: an `active` slot under a CA that nobody here knows."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from birthmark.device.agent import keys
from birthmark.device.agent.slots import PendingKey, Slot
from birthmark.device.identity import DeviceId, Role
from birthmark.device.link.bundle import Bundle, BundleConfig

if TYPE_CHECKING:
    from birthmark.device.agent.slots import Slots

TXN_BYTES = 16


def lock_elsewhere(slots: Slots, hwid: bytes) -> None:
    """Commit an identity of another maker, if the board has none yet.

    Raises:
        StoreError: it could not be stored.
    """
    if slots.active() is not None:
        return
    txn = hashlib.sha256(b"foreign" + hwid).digest()[:TXN_BYTES]
    key_der = keys.key_to_der(key := keys.make_key())
    ca_key = keys.make_key()
    now = datetime.now(UTC)
    ca_der = _certificate("Another maker's CA", ca_key, ca_key, is_ca=True, now=now)
    leaf_der = _certificate("somebody-elses", key, ca_key, is_ca=False, now=now)
    config = BundleConfig("broker.example.org", 8883, DeviceId("somebody-elses"), Role("sensor"), None)
    bundle = Bundle(
        leaf_der=leaf_der, issuing_der=(), anchors_der=(ca_der,), config=config, issued_at=int(now.timestamp())
    )
    slots.store_pending(PendingKey(txn, key_der))
    slots.store_prepared(Slot(txn, key_der, bundle))
    slots.commit()


def _certificate(name: str, key: keys.PrivateKey, ca_key: keys.PrivateKey, *, is_ca: bool, now: datetime) -> bytes:
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Another maker's CA")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
    )
    return builder.sign(ca_key, hashes.SHA256()).public_bytes(Encoding.DER)
