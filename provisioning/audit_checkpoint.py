"""A checkpoint of the audit log: its last entry's number and hash, signed by the CA, to be carried away.

Whoever can write the registry and the log can rewrite both so that they fit each other. A checkpoint that is
elsewhere cannot be rewritten with them: the log must have the entry of that number and hash for ever.

Rules:

- Signed by the issuing CA of devices and services, whose key the station has at hand; its certificate is in the
  file, and leads to the root that the verifier brings. What is signed is a transcript with a label of its own
  (docs/serial-protocol.md section 6), so that it passes for nothing else.
- A checkpoint holds for ever: also when the CA that signed it has ended. So dates are checked against the time
  that is signed, and not against now.
- The last one is kept at the station as well; the file that is carried away is the proof.
- The word of it is in the log before the file is anywhere.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from birthmark.device.durable import exclusive_lock, remove_leftovers, write_durably
from birthmark.device.errors import BirthmarkError, ConfigurationError
from birthmark.device.escape import escaped
from birthmark.device.link.transcript import Label, transcript, verify
from birthmark.device.pem import CERTIFICATE, block, read_blocks
from birthmark.device.renewal.anchors import may_sign_certificates
from birthmark.provisioning import profile
from birthmark.provisioning.audit import Head, written

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from birthmark.provisioning.station import Station

CHECKPOINT_FILE: Final = "checkpoint.pem"
"""Where a station keeps its last one."""
LAST_CHECKPOINT_AT: Final = "last_checkpoint_at"
"""The counter with the time of the last one that was carried away, in seconds since 1970."""
STATEMENT: Final = "BIRTHMARK AUDIT CHECKPOINT"
SIGNATURE: Final = "BIRTHMARK SIGNATURE"
_FILE_MODE: Final = 0o644
_HASH: Final = re.compile("[0-9a-f]{64}")
_HEADER_BYTES: Final = len(transcript(Label.AUDIT, b""))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint says."""

    head: Head
    at: datetime
    organization: str
    key_id: str
    """Of the CA that signed it."""

    def statement(self) -> bytes:
        """Return it as what is signed, but for the label."""
        return written(
            {
                "seq": self.head.seq,
                "hash": self.head.hash,
                "at": self.at.isoformat(),
                "organization": self.organization,
                "key_id": self.key_id,
            }
        ).encode()

    def record(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return dict(json.loads(self.statement()))


def make_checkpoint(station: Station, out: Path | None) -> Checkpoint:
    """Sign a checkpoint of the log as it is now, keep it at the station, and write it to `out`.

    Raises:
        ConfigurationError: there is something at `out`; nothing was done.
        AuthorityError: the CA cannot be unlocked; nothing was done.
        OSError: a file could not be written; that it was signed is in the log.
    """
    _check_free(out)
    authority = station.authority
    with exclusive_lock(station.folder / "checkpoint.lock"):
        remove_leftovers(station.folder, CHECKPOINT_FILE)
        now = station.clock()
        made = Checkpoint(station.registry.audit_head(), now, station.settings.organization, authority.key_id)
        signed = transcript(Label.AUDIT, made.statement())
        text = (
            f"audit log of {escaped(made.organization)}: entry {made.head.seq} at {made.at.isoformat()}\n"
            f"hash {made.head.hash}\n"
            "What is signed stands below; docs/audit.md says how to check it, with OpenSSL alone.\n"
        )
        content = text.encode() + b"".join(
            [
                block(STATEMENT, signed),
                block(SIGNATURE, authority.sign_transcript(signed)),
                block(CERTIFICATE, authority.issuing_der),
            ]
        )
        with station.registry.transaction() as transaction:
            to = str(out) if out else None
            transaction.record("checkpoint", "audit-log", number=made.head.seq, hash=made.head.hash, to=to)
            if out is not None:
                last = transaction.counter(LAST_CHECKPOINT_AT)
                transaction.set_counter(LAST_CHECKPOINT_AT, max(last, int(now.timestamp())))
        write_durably(station.folder / CHECKPOINT_FILE, content, mode=_FILE_MODE)
        if out is not None:
            remove_leftovers(out.parent, out.name)
            write_durably(out, content, mode=_FILE_MODE)
    return made


def _check_free(out: Path | None) -> None:
    if out is not None and (out.exists() or out.is_symlink()):
        raise ConfigurationError(
            f"could not write the checkpoint {out}: it is there already",
            hint="name another file: an older checkpoint is worth keeping",
        )


def read_checkpoint(path: Path, roots: Iterable[x509.Certificate]) -> Checkpoint:
    """Read a checkpoint and check its signature, up to one of these roots.

    Raises:
        ConfigurationError: it cannot be read, is none, or is not signed by a CA under one of the roots.
    """
    what = f"could not use the checkpoint {path}"
    try:
        blocks = dict(read_blocks(path.read_bytes()))
    except OSError as error:
        raise ConfigurationError(f"{what}: {error.strerror}", hint="check the path") from error
    except BirthmarkError as error:
        raise ConfigurationError(f"{what}: {error.message}", hint="is the file whole?") from error
    try:
        cause, checkpoint = _read(blocks, roots)
    except Exception as error:  # noqa: BLE001 - hostile DER or JSON: whatever a parser trips over is a refusal
        cause, checkpoint = f"it does not parse ({type(error).__name__})", None
    if checkpoint is None:
        raise ConfigurationError(
            f"{what}: {cause}",
            hint="is it this CA's? Name the root that it leads to with --root",
        )
    return checkpoint


def _read(blocks: dict[str, bytes], roots: Iterable[x509.Certificate]) -> tuple[str, Checkpoint | None]:
    if blocks.keys() != {STATEMENT, SIGNATURE, CERTIFICATE}:
        return "it has not the three blocks of one", None
    signed = blocks[STATEMENT]
    statement = signed[_HEADER_BYTES:]
    if signed != transcript(Label.AUDIT, statement):
        return "what is signed is no checkpoint", None
    signer = x509.load_der_x509_certificate(blocks[CERTIFICATE])
    if not may_sign_certificates(signer) or not any(_issued(root, signer) for root in roots):
        return "the CA that signed it leads to none of the roots", None
    key = signer.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not verify(key, blocks[SIGNATURE], signed):
        return "its signature does not verify", None
    facts = json.loads(statement)
    made = Checkpoint(
        Head(int(facts["seq"]), str(facts["hash"])),
        datetime.fromisoformat(facts["at"]),
        str(facts["organization"]),
        str(facts["key_id"]),
    )
    if made.statement() != statement or made.head.seq < 1 or not _HASH.fullmatch(made.head.hash):
        return "what is signed is no checkpoint", None
    if made.key_id != profile.key_id(signer).hex():
        return "it names another CA than the one that signed it", None
    if not signer.not_valid_before_utc <= made.at <= signer.not_valid_after_utc:
        return "the CA that signed it was not valid then", None
    return "", made


def _issued(root: x509.Certificate, signer: x509.Certificate) -> bool:
    try:
        signer.verify_directly_issued_by(root)
    except Exception:  # noqa: BLE001 - another name, a bad signature, an odd key: it did not issue this one
        return False
    return may_sign_certificates(root)
