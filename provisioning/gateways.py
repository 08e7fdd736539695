"""Bringing a CRL to every gateway, and hearing from each what it did with it.

Rules:

- A gateway has the CRL when its receipt says so: `installed` or `current`, for the very bytes that were sent.
  Anything else (no receipt, an unreadable one, one for another CRL) is PENDING; `refused` is a refusal.
- By path: the CRL is written durably to the gateway's `crl_path` (PEM); the receipt appears beside it, under the
  same name with `.receipt` appended. By MQTT: published as DER on `gateway/{name}/crl` with QoS 1 by an operator;
  the receipt comes on `gateway/{name}/receipts`.
- All gateways are served at once; one that does not answer delays nobody.
"""

from __future__ import annotations

import queue
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from birthmark.device.client import Client
from birthmark.device.credentials import BrokerAddress, Credentials
from birthmark.device.durable import write_durably
from birthmark.device.errors import BirthmarkError, UnreachableError
from birthmark.device.escape import escaped
from birthmark.device.identity import BrokerName
from birthmark.device.messages import ClosedIdentity, Receipt
from birthmark.device.topics import gateway_crl, gateway_receipts

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from birthmark.device.received import Message
    from birthmark.provisioning.revocation import StoredCrl
    from birthmark.provisioning.settings import Gateway

DEFAULT_TIMEOUT_S: Final = 10.0
CRL_FILE_MODE: Final = 0o644
_POLL_S: Final = 0.02
_STOP_S: Final = 1.0
_MAX_RECEIPT_BYTES: Final = 16 * 1024 * 1024
MAX_MQTT_CRL_BYTES: Final = 1024 * 1024 - 1024
"""What a gateway takes in one packet by default, less the packet's own head."""


class Outcome(StrEnum):
    """Where a delivery stands."""

    DONE = "done"
    REFUSED = "refused"
    PENDING = "PENDING"


@dataclass(frozen=True, slots=True)
class Delivery:
    """What became of a CRL at one gateway."""

    gateway: str
    outcome: Outcome
    cause: str = ""
    """Why it is not done."""
    receipt: Receipt | None = None

    def record(self) -> dict[str, Any]:
        """Return this as a JSON object."""
        record: dict[str, Any] = {"gateway": self.gateway, "outcome": self.outcome.value, "cause": self.cause}
        if self.receipt is not None:
            record |= {
                "crl_number": self.receipt.crl_number,
                "elapsed_ms": self.receipt.elapsed_ms,
                "revoked_count": self.receipt.revoked_count,
                "closed": [_closed_record(closed) for closed in self.receipt.closed],
            }
        return record

    def described(self) -> str:
        """Return this as a line for people."""
        if self.outcome is Outcome.PENDING:
            return f"{self.gateway}: PENDING: {self.cause}"
        if self.outcome is Outcome.REFUSED or self.receipt is None:
            return f"{self.gateway}: refused the CRL: {self.cause}"
        receipt = self.receipt
        verb = "has it already" if receipt.outcome == "current" else f"installed in {receipt.elapsed_ms:.1f} ms"
        parts = [f"CRL {receipt.crl_number} {verb}", "handshakes refused"]
        if receipt.closed:
            parts += [_closed_text(closed) for closed in receipt.closed]
        elif receipt.outcome == "installed":
            parts.append("no live session")
        return f"{self.gateway}: {parts[0]}: " + "; ".join(parts[1:])


def deliver(
    gateways: Sequence[Gateway], crl: StoredCrl, *, anchors_path: Path, timeout_s: float = DEFAULT_TIMEOUT_S
) -> list[Delivery]:
    """Bring `crl` to every gateway at once and wait for the receipts, at most `timeout_s` in all.

    Args:
        gateways: where to.
        crl: what.
        anchors_path: the CA certificate that a gateway's own certificate leads to (PEM).
        timeout_s: how long to wait.

    Never fails as a whole: what went wrong at a gateway is in its `Delivery`.
    """
    if not gateways:
        return []
    deadline = time.monotonic() + timeout_s
    with ThreadPoolExecutor(max_workers=min(32, len(gateways))) as pool:
        return list(pool.map(lambda gateway: _deliver_one(gateway, crl, anchors_path, deadline), gateways))


def _deliver_one(gateway: Gateway, crl: StoredCrl, anchors_path: Path, deadline: float) -> Delivery:
    try:
        if gateway.crl_path is not None:
            receipt = _by_path(gateway.crl_path, crl, deadline)
        else:
            receipt = _by_mqtt(gateway, crl, anchors_path, deadline)
    except BirthmarkError as error:
        return Delivery(gateway.name, Outcome.PENDING, error.message)
    except OSError as error:
        return Delivery(
            gateway.name, Outcome.PENDING, f"could not reach {gateway.reached_by}: {error.strerror or error}"
        )
    if receipt.outcome == "refused":
        return Delivery(gateway.name, Outcome.REFUSED, escaped(receipt.reason) or "no reason given", receipt)
    return Delivery(gateway.name, Outcome.DONE, "", receipt)


def _by_path(crl_path: Path, crl: StoredCrl, deadline: float) -> Receipt:
    receipt_path = crl_path.with_name(crl_path.name + ".receipt")
    before = _identity(receipt_path)
    write_durably(crl_path, crl.pem, mode=CRL_FILE_MODE)
    last_problem = f"no receipt at {receipt_path}"
    while True:
        try:
            receipt = _read_receipt(receipt_path)
        except BirthmarkError as error:
            last_problem = error.message
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                last_problem = f"could not read the receipt {receipt_path}: {error.strerror}"
        else:
            # A refusal that was there before is of an earlier attempt: this one may fare better.
            is_new = _identity(receipt_path) != before
            if receipt.crl_sha256 == crl.sha256 and (is_new or receipt.outcome != "refused"):
                return receipt
            last_problem = f"the receipt {receipt_path} is for another CRL"
        if time.monotonic() >= deadline:
            raise BirthmarkError(last_problem)
        time.sleep(_POLL_S)


def _by_mqtt(gateway: Gateway, crl: StoredCrl, anchors_path: Path, deadline: float) -> Receipt:
    if gateway.operator_path is None:
        raise BirthmarkError(f"could not reach {gateway.name}: no operator is set for it")
    if len(crl.der) > MAX_MQTT_CRL_BYTES:
        raise BirthmarkError(f"the CRL is too long for MQTT ({len(crl.der)} bytes): deliver it by a path")
    credentials = Credentials.from_files(
        gateway.operator_path, anchors_path, BrokerAddress(gateway.host, gateway.port)
    )
    name = BrokerName(gateway.name)
    receipts: queue.Queue[Receipt] = queue.Queue()

    def keep_ours(message: Message) -> None:
        receipt = Receipt.from_bytes(message.payload)
        if receipt.crl_sha256 == crl.sha256:
            receipts.put(receipt)

    # A session of its own each time: several deliveries by one operator do not take over from each other.
    client = Client(credentials, client_suffix=f"crl-{secrets.token_hex(4)}", connect_timeout_s=_left(deadline))
    client.connect(timeout_s=_left(deadline))
    try:
        # Listen first, so that no receipt is missed.
        client.subscribe(gateway_receipts(name), keep_ours, wait=_left(deadline))
        client.publish(gateway_crl(name), crl.der, wait=_left(deadline))
        return receipts.get(timeout=_left(deadline))
    except queue.Empty as error:
        raise UnreachableError(f"no receipt from {gateway.reached_by}") from error
    finally:
        client.stop(timeout_s=_STOP_S)


def _left(deadline: float) -> float:
    """Return the seconds until `deadline`, a few milliseconds at least."""
    return max(_POLL_S, deadline - time.monotonic())


def _read_receipt(path: Path) -> Receipt:
    with path.open("rb") as file:
        content = file.read(_MAX_RECEIPT_BYTES + 1)
    if len(content) > _MAX_RECEIPT_BYTES:
        raise BirthmarkError(f"could not read the receipt {path}: it is too long")
    return Receipt.from_bytes(content)


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


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
