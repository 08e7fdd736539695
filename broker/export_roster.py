"""Whose rights an export writes down: the certificates of a registry's JSONL, each read as the gateway reads it.

`birthmark registry export --format jsonl` writes the file. Other engines know no roles, so each identity is
named to them, by the whole subject of its certificate: the CN and the role that the CA signed.

Rules:

- Every certificate passes the gateway's own check (`peer.read_peer`), or the file is refused with its line: a
  name outside the grammar, a foreign issuer or a forged certificate never reaches another engine's
  configuration.
- Left out are gateways, what is revoked by the CRL in force or by the file, and what is not valid at this
  moment.
- A subject is spelt as OpenSSL prints it (RFC 2253). One that would need an escape there is refused: what is
  written down must be what the engine compares.
"""

from __future__ import annotations

import json
import re
from base64 import b64decode
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.x509.oid import NameOID

from birthmark.broker.peer import PeerRefusedError, let_in, read_peer
from birthmark.device.errors import ConfigurationError
from birthmark.device.escape import quoted

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime
    from pathlib import Path

    from birthmark.broker.crl import Crl
    from birthmark.broker.peer import Peer
    from birthmark.broker.trust import Trust

_PLAIN = re.compile(r"[A-Za-z0-9._:/@&()'-](?:[A-Za-z0-9 ._:/@&()'-]*[A-Za-z0-9._:/@&()'-])?")
"""What OpenSSL prints as it is."""
_SHORT = {NameOID.COMMON_NAME: "CN", NameOID.ORGANIZATIONAL_UNIT_NAME: "OU", NameOID.ORGANIZATION_NAME: "O"}
_HINT = "write it at the station: birthmark registry export --format jsonl -o identities.jsonl"


@dataclass(frozen=True, slots=True)
class Roster:
    """Who is named to the engine."""

    peers: Mapping[str, Peer]
    """By the subject of the certificate, as OpenSSL prints it."""
    revoked: int
    """Certificates that were left out because they are revoked."""
    out_of_date: int
    """Certificates that were left out because they are not valid at this moment."""


def read_roster(path: Path, trust: Trust, crls: Mapping[str, Crl], now: datetime) -> Roster:
    """Read the identities of a registry's JSONL file.

    Args:
        path: the file.
        trust: the trusted issuing CAs.
        crls: the CRLs in force, by issuer.
        now: the clock, aware.

    Raises:
        ConfigurationError: the file, or a line of it, cannot be used; nothing of it counts then.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigurationError(f"could not read the identities in {path}: {cause}", hint=_HINT) from error
    peers: dict[str, Peer] = {}
    revoked = out_of_date = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = _record(line)
            if record.get("kind") == "broker" or "certificate" not in record:
                continue
            der = b64decode(record["certificate"], validate=True)
            peer = _peer(der, trust, record.get("id"))
            crl = crls.get(peer.issuer)
            if "revoked_at" in record or (crl is not None and peer.cert_serial in crl.serials):
                revoked += 1
            elif not _is_valid(peer, trust, now):
                out_of_date += 1
            else:
                peers.setdefault(_subject(der), peer)
        except (ValueError, PeerRefusedError) as error:
            message = f"could not use the identities in {path}, line {number}: {error}"
            raise ConfigurationError(message, hint=_HINT) from error
    return Roster(peers, revoked, out_of_date)


def _record(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError("it is no JSON") from error
    if not isinstance(record, dict) or not isinstance(record.get("certificate", ""), str):
        raise ValueError("it is no record of a registry")  # noqa: TRY004 - a bad line, not a bug
    return record


def _peer(der: bytes, trust: Trust, name: str | None) -> Peer:
    peer = read_peer(der, trust)
    if str(peer.device_id) != name:
        raise ValueError(f"its id is not the CN of its certificate, {peer.device_id}")
    return peer


def _is_valid(peer: Peer, trust: Trust, now: datetime) -> bool:
    try:
        let_in(peer, trust, now)
    except PeerRefusedError:
        return False
    return True


def _subject(der: bytes) -> str:
    """Return the subject as OpenSSL prints it with XN_FLAG_RFC2253: the last name first."""
    parts = []
    for rdn in reversed(x509.load_der_x509_certificate(der).subject.rdns):
        (name, *more) = rdn
        short, value = _SHORT.get(name.oid), str(name.value)
        if more or short is None or not _PLAIN.fullmatch(value):
            raise ValueError(f"its subject has {quoted(value, 64)}, which other engines would spell otherwise")
        parts.append(f"{short}={value}")
    return ",".join(parts)
