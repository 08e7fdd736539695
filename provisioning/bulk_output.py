"""Where the certificates of `birthmark issue --from` go: a folder with files for each device, or one JSONL file.

Rules:

- In a folder: `ID.crt.pem` with a device's certificate and its issuing CA, `ca.pem` with the trusted roots. A
  JSONL file has the certificates alone, a line a device, in the order in which they were asked for.
- A key that the station makes is in `ID/pending`, on disk, before anything is registered for it; in the end it is
  in `ID/active`, with certificate and bundle: `ID` is then the state folder of a device (docs/device.md). Mode
  0600 in a folder of 0700, and nowhere else.
- What is there already and the same is left alone: a killed run, run again, writes what is missing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

import orjson
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_private_key,
)

from birthmark.device.agent.slots import ACTIVE, PENDING, PendingKey, Slot
from birthmark.device.durable import durable_file, private_folder, remove_leftovers, write_durably, write_many
from birthmark.device.errors import BirthmarkError, ConfigurationError
from birthmark.device.link.bundle import Bundle
from birthmark.device.pem import CERTIFICATE, PRIVATE_KEY, TRANSACTION, block, read_blocks
from birthmark.provisioning.record_files import JSONL
from birthmark.provisioning.station import PUBLIC_FILE_MODE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from birthmark.device.identity import DeviceId
    from birthmark.provisioning.cas import Cas
    from birthmark.provisioning.registry.model import Row

ANCHORS_FILE: Final = "ca.pem"
CERTIFICATE_SUFFIX: Final = ".crt.pem"


@dataclass(frozen=True, slots=True)
class StationKey:
    """A device's key that the station made."""

    txn: bytes
    public_key_der: bytes
    key_der: bytes = field(repr=False)
    """PKCS#8."""


class Output(Protocol):
    """Takes what was issued, group by group."""

    def has_key(self, device_id: DeviceId) -> bool:
        """Whether the station has made a key for a device, in an earlier run."""

    def key_for(self, device_id: DeviceId, txn: bytes) -> StationKey:
        """Return the durable key that the station has made for a device; made now, for `txn`, if need be."""

    def put(self, rows: Sequence[Row], cas: Cas) -> None:
        """Write the certificates of these rows, durably."""

    def put_slots(self, rows: Sequence[Row], keys: Sequence[StationKey]) -> None:
        """Write the state folders of these rows, in ISSUED, durably."""

    def finish(self, rows: Sequence[Row], cas: Cas) -> None:
        """Write what is about all rows, in the order in which they were asked for."""


def output_at(path: Path) -> Output:
    """Return where a user wants the certificates: a file if the name ends in .jsonl, else a folder.

    Raises:
        OSError: the folder cannot be made.
    """
    return _File(path) if path.suffix.lower() == JSONL else _Folder(path)


class _Folder:
    def __init__(self, path: Path) -> None:
        self._path = path
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
        remove_leftovers(path)

    def has_key(self, device_id: DeviceId) -> bool:
        return any((self._path / device_id.text / name).exists() for name in (ACTIVE, PENDING))

    def key_for(self, device_id: DeviceId, txn: bytes) -> StationKey:
        folder = private_folder(self._path / device_id.text, known=(PENDING, ACTIVE))
        remove_leftovers(folder)
        for name in (ACTIVE, PENDING):
            if (folder / name).exists():
                return _read_key(folder / name)
        private_key = generate_private_key(SECP256R1())
        pending = PendingKey(txn, private_key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()))
        content = block(PRIVATE_KEY, pending.key_der) + block(TRANSACTION, pending.txn)
        write_durably(folder / PENDING, content)
        return _station_key(pending, private_key)

    def put(self, rows: Sequence[Row], cas: Cas) -> None:
        write_many(
            self._path,
            ((f"{row.name}{CERTIFICATE_SUFFIX}", _chain(row, cas)) for row in rows),
            mode=PUBLIC_FILE_MODE,
        )

    def put_slots(self, rows: Sequence[Row], keys: Sequence[StationKey]) -> None:
        for row, key in zip(rows, keys, strict=True):
            folder = self._path / row.name
            slot = Slot(key.txn, key.key_der, Bundle.from_bytes(row.bundle or b""))
            write_durably(folder / ACTIVE, slot.to_pem())
            (folder / PENDING).unlink(missing_ok=True)

    def finish(self, rows: Sequence[Row], cas: Cas) -> None:  # noqa: ARG002 - a folder has no order
        roots = b"".join(ca.pem for ca in cas.roots)
        write_many(self._path, [(ANCHORS_FILE, roots)], mode=PUBLIC_FILE_MODE)


class _File:
    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name)

    def has_key(self, device_id: DeviceId) -> bool:  # noqa: ARG002 - none of them
        return False

    def key_for(self, device_id: DeviceId, txn: bytes) -> StationKey:  # noqa: ARG002 - refused whichever it is
        raise ConfigurationError(
            f"could not make a key for {device_id}: {self._path} is for certificates alone",
            hint="name a folder with --out: each key gets a file of its own",
        )

    def put(self, rows: Sequence[Row], cas: Cas) -> None:
        """Nothing yet: the file is written whole."""

    def put_slots(self, rows: Sequence[Row], keys: Sequence[StationKey]) -> None:
        """Nothing: there are no keys."""

    def finish(self, rows: Sequence[Row], cas: Cas) -> None:
        with durable_file(self._path, mode=PUBLIC_FILE_MODE) as file:
            file.writelines(_line(row, cas) for row in rows)


def _chain(row: Row, cas: Cas) -> bytes:
    return block(CERTIFICATE, row.certificate_der or b"") + cas.get(row.issuer).pem


def _line(row: Row, cas: Cas) -> bytes:
    record = {
        "id": row.name,
        "role": row.role,
        "cert_serial": f"{row.cert_serial:x}",
        "not_before": row.not_before,
        "not_after": row.not_after,
        "certificate": _chain(row, cas).decode(),
    }
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)


def _read_key(path: Path) -> StationKey:
    """Read the key that an earlier run, or a killed one, has left."""
    try:
        blocks = read_blocks(path.read_bytes())
        (key_der,) = (der for label, der in blocks if label == PRIVATE_KEY)
        (txn,) = (content for label, content in blocks if label == TRANSACTION)
        private_key = load_der_private_key(key_der, None)
        if isinstance(private_key, EllipticCurvePrivateKey):
            return _station_key(PendingKey(txn, key_der), private_key)
    except (BirthmarkError, ValueError, TypeError):
        pass  # without the cause: it may quote the key
    raise ConfigurationError(
        f"could not use the key in {path}: the file is damaged",
        hint="if its device never got a certificate, remove its folder; else revoke it first",
    )


def _station_key(pending: PendingKey, private_key: EllipticCurvePrivateKey) -> StationKey:
    public_key_der = private_key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return StationKey(pending.txn, public_key_der, pending.key_der)
