"""What became of the CRLs at a gateway, and what is to be brought there.

Rules:

- A gateway has a CRL when its receipt says so: `installed` or `current`, for the very bytes that were sent, by
  the gateway they were sent to. Anything else (no receipt, an unreadable one, one for another CRL, one that
  contradicts itself) is PENDING; `refused` is a refusal.
- Every issuing CA's CRL needs a receipt, but for that of a CA which has not issued anything yet: a gateway that
  does not trust such a one passes its CRL over, and lets nobody in by it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from birthmark.device.errors import BirthmarkError
from birthmark.device.escape import escaped
from birthmark.device.messages import ClosedIdentity, Receipt
from birthmark.provisioning.cas import SHORT

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping
    from datetime import datetime

    from birthmark.provisioning.cas import Cas
    from birthmark.provisioning.crl_store import CrlSet, StoredCrl

MAX_MQTT_CRL_BYTES: Final = 1024 * 1024 - 1024
"""What a gateway takes in one packet by default, less the packet's own head."""

INTERRUPTED: Final = "it had not answered when that was interrupted"
"""Why nothing is known of a gateway that nobody waited for any longer."""


class Outcome(StrEnum):
    """Where a delivery stands."""

    DONE = "done"
    REFUSED = "refused"
    PENDING = "PENDING"


@dataclass(frozen=True, slots=True)
class Delivery:
    """What became of the CRLs at one gateway."""

    gateway: str
    outcome: Outcome
    cause: str = ""
    """Why it is not done."""
    receipts: tuple[Receipt, ...] = ()
    """For the CRLs that it has; `issuer` is as the station knows it."""
    distrusted: tuple[str, ...] = ()
    """The key identifiers of CAs that have issued nothing yet, and that it does not trust."""
    since: datetime | None = None
    """Since when deliveries to it have not been done; None if this one is, or is the first."""
    missed: tuple[str, ...] = ()
    """Servers of its upstream that were not brought them, and why."""

    def record(self) -> dict[str, Any]:
        """Return this as a JSON object."""
        record: dict[str, Any] = {"gateway": self.gateway, "outcome": self.outcome.value, "cause": self.cause}
        if self.since is not None:
            record["since"] = self.since.strftime("%Y-%m-%dT%H:%M:%SZ")
        if self.missed:
            record["missed"] = list(self.missed)
        if self.receipts:
            record |= _receipt_record(self.receipts[0])
        if len(self.receipts) > 1:
            record["others"] = [{"issuer": one.issuer, **_receipt_record(one)} for one in self.receipts[1:]]
        if self.distrusted:
            record["distrusted"] = list(self.distrusted)
        return record

    def described(self) -> str:
        """Return this as a line for people."""
        since = "" if self.since is None else f" since {self.since:%Y-%m-%d %H:%M} UTC"
        if self.outcome is Outcome.PENDING:
            return f"{self.gateway}: PENDING{since}: {self.cause}"
        if self.outcome is Outcome.REFUSED or not self.receipts:
            return f"{self.gateway}: refused the CRL{since}: {self.cause}"
        heads = [self._head(receipt) for receipt in self.receipts]
        parts = ["handshakes refused"]
        closed = [one for receipt in self.receipts for one in receipt.closed]
        if closed:
            parts += [_closed_text(one) for one in closed]
        elif any(receipt.outcome == "installed" for receipt in self.receipts):
            parts.append("no live session")
        if self.distrusted:
            parts.append(f"does not trust {', '.join(key_id[:SHORT] for key_id in self.distrusted)} yet")
        return f"{self.gateway}: {', '.join(heads)}: " + "; ".join(parts)

    def _head(self, receipt: Receipt) -> str:
        verb = "has it already" if receipt.outcome == "current" else f"installed in {receipt.elapsed_ms:.1f} ms"
        whose = f" of {receipt.issuer[:SHORT]}" if len(self.receipts) > 1 else ""
        return f"CRL {receipt.crl_number}{whose} {verb}"


class Latest:
    """The CRLs that a gateway is to have: those it was begun with, or what was signed since.

    Args:
        crls: to begin with.
        cas: the station's CAs.
        successor: returns newer CRLs than those it is given, if there are any (`crl_store.successor`).
    """

    def __init__(self, crls: CrlSet, cas: Cas, successor: Callable[[CrlSet], CrlSet | None]) -> None:
        self.crls = crls
        self.cas = cas
        self._successor = successor

    def has_moved(self) -> bool:
        """Whether a newer one was signed, here or at another station of the registry; `crls` has it then."""
        newer = self._successor(self.crls)
        if newer is None:
            return False
        self.crls = newer
        return True

    def take(self, newer: StoredCrl) -> None:
        """Have this one be that of its CA."""
        crls = tuple(newer if crl.issuer == newer.issuer else crl for crl in self.crls.crls)
        self.crls = replace(self.crls, crls=crls)

    def needs(self, crl: StoredCrl) -> bool:
        """Whether a gateway must have this one: its CA has issued."""
        return self.cas.get(crl.issuer).activated_at is not None

    def missing(self, receipts: Container[str]) -> list[StoredCrl]:
        """Return those that a gateway must have, and has not."""
        return [crl for crl in self.crls.crls if crl.sha256 not in receipts and self.needs(crl)]

    def check_size(self) -> None:
        """Refuse (`BirthmarkError`) what no gateway takes in a message."""
        longest = max(len(crl.der) for crl in self.crls.crls)
        if longest > MAX_MQTT_CRL_BYTES:
            raise BirthmarkError(
                f"the CRL is too long for MQTT ({longest} bytes, and {MAX_MQTT_CRL_BYTES} go): bring it by a file "
                "(birthmark gateway add NAME --path FILE)"
            )


def concluded(gateway: str, latest: Latest, receipts: Mapping[str, Receipt]) -> Delivery:
    """Return what receipts, by the SHA-256 of the CRL that each is for, make of a delivery; none is missing."""
    refused = [receipt for receipt in receipts.values() if receipt.outcome == "refused"]
    # In the CRLs' order, and under the issuer that we know it by: a refusal may not have been able to read it.
    told = tuple(
        replace(receipts[crl.sha256], issuer=crl.issuer)
        for crl in latest.crls.crls
        if crl.sha256 in receipts and receipts[crl.sha256] not in refused
    )
    needless = tuple(
        crl.issuer for crl in latest.crls.crls if not latest.needs(crl) and crl.sha256 not in receipts
    )
    for receipt in refused:
        crl = next(crl for crl in latest.crls.crls if crl.sha256 == receipt.crl_sha256)
        if latest.needs(crl):
            cause = escaped(receipt.reason) or "no reason given"
            return Delivery(gateway, Outcome.REFUSED, cause, told, needless)
        needless += (crl.issuer,)
    return Delivery(gateway, Outcome.DONE, "", told, needless)


def check_receipt(receipt: Receipt, name: str, crl: StoredCrl) -> None:
    """Refuse a receipt for our CRL that is another gateway's, or that contradicts itself."""
    if receipt.gateway.lower() != name.lower():
        raise BirthmarkError(
            f"the receipt is of the gateway {escaped(receipt.gateway, 64)}: name this one as its broker.toml does"
        )
    if receipt.outcome != "refused" and receipt.crl_number != crl.number:
        raise BirthmarkError(
            f"the receipt is for CRL {crl.number}, but says that {receipt.crl_number} is in force"
        )


def _receipt_record(receipt: Receipt) -> dict[str, Any]:
    return {
        "crl_number": receipt.crl_number,
        "elapsed_ms": receipt.elapsed_ms,
        "revoked_count": receipt.revoked_count,
        "closed": [_closed_record(closed) for closed in receipt.closed],
    }


def _closed_text(closed: ClosedIdentity) -> str:
    sessions = "1 live session" if closed.sessions_closed == 1 else f"{closed.sessions_closed} live sessions"
    parts = [f"{escaped(closed.id, 64)}: {sessions} closed in {closed.elapsed_ms:.1f} ms"]
    if closed.will_suppressed:
        parts.append("will suppressed")
    plural = "message" if closed.queued_messages_purged == 1 else "messages"
    parts.append(f"queue purged ({closed.queued_messages_purged} {plural})")
    if closed.retained_presence_purged:
        parts.append("presence cleared")
    return ", ".join(parts)


def _closed_record(closed: ClosedIdentity) -> dict[str, Any]:
    return {name: getattr(closed, name) for name in ClosedIdentity.__slots__}
