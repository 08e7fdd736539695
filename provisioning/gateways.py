"""Bringing a CRL to every gateway, and hearing from each what it did with it.

Rules:

- A gateway has the CRL when its receipt says so: `installed` or `current`, for the very bytes that were sent, by
  the gateway they were sent to. Anything else (no receipt, an unreadable one, one for another CRL, one that
  contradicts itself) is PENDING; `refused` is a refusal.
- Another command may sign and bring a newer CRL meanwhile. It lists all that this one does, so it counts as well;
  and a gateway's file that ours has overwritten is given the newer one again.
- By path: the CRL is written durably to the gateway's `crl_path` (PEM); the receipt appears beside it, under the
  same name with `.receipt` appended. By MQTT: published as DER on `gateway/{name}/crl` with QoS 1 by an operator;
  the receipt comes on `gateway/{name}/receipts`.
- All gateways are served at once; one that does not answer delays nobody.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from birthmark.device.client import Client
from birthmark.device.credentials import BrokerAddress, Credentials
from birthmark.device.durable import write_durably
from birthmark.device.errors import BirthmarkError, RemoteProtocolError, UnreachableError
from birthmark.device.escape import escaped
from birthmark.device.identity import BrokerName
from birthmark.device.messages import ClosedIdentity, Receipt
from birthmark.device.topics import gateway_crl, gateway_receipts
from birthmark.provisioning.revocation import successor

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
        latest = _Latest(crl)
        if gateway.crl_path is not None:
            receipt = _by_path(gateway.name, gateway.crl_path, latest, deadline)
        else:
            receipt = _by_mqtt(gateway, latest, anchors_path, deadline)
    except BirthmarkError as error:
        return Delivery(gateway.name, Outcome.PENDING, error.message)
    except OSError as error:
        return Delivery(
            gateway.name, Outcome.PENDING, f"could not reach {gateway.reached_by}: {error.strerror or error}"
        )
    if receipt.outcome == "refused":
        return Delivery(gateway.name, Outcome.REFUSED, escaped(receipt.reason) or "no reason given", receipt)
    return Delivery(gateway.name, Outcome.DONE, "", receipt)


class _Latest:
    """The CRL that a gateway is to have: the one it was begun with, or what the station has signed since."""

    def __init__(self, crl: StoredCrl) -> None:
        self.crl = crl

    def has_moved(self) -> bool:
        """Whether the station has signed a newer one; `crl` is that one then."""
        newer = successor(self.crl)
        if newer is None:
            return False
        self.crl = newer
        return True


def _by_path(name: str, crl_path: Path, latest: _Latest, deadline: float) -> Receipt:
    receipt_path = crl_path.with_name(crl_path.name + ".receipt")
    before = _identity(receipt_path)
    write_durably(crl_path, latest.crl.pem, mode=CRL_FILE_MODE)
    while latest.has_moved():
        # Whoever signed it may have brought it already: then ours has just overwritten it.
        write_durably(crl_path, latest.crl.pem, mode=CRL_FILE_MODE)
    last_problem = f"no receipt at {receipt_path}"
    looked_at = None
    while True:
        try:
            receipt = _read_receipt(receipt_path)
        except BirthmarkError as error:
            last_problem = error.message
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                last_problem = f"could not read the receipt {receipt_path}: {error.strerror}"
        else:
            found = _identity(receipt_path)
            if found != looked_at and receipt.crl_sha256 != latest.crl.sha256:
                looked_at = found
                latest.has_moved()
            # A refusal that was there before is of an earlier attempt: this one may fare better.
            if receipt.crl_sha256 == latest.crl.sha256 and (found != before or receipt.outcome != "refused"):
                _check_receipt(receipt, name, latest.crl)
                return receipt
            last_problem = f"the receipt {receipt_path} is for another CRL"
        if time.monotonic() >= deadline:
            raise BirthmarkError(last_problem)
        time.sleep(_POLL_S)


def _check_receipt(receipt: Receipt, name: str, crl: StoredCrl) -> None:
    """Refuse a receipt for our CRL that is another gateway's, or that contradicts itself."""
    if receipt.gateway.lower() != name.lower():
        raise BirthmarkError(
            f"the receipt is of the gateway {escaped(receipt.gateway, 64)}: name this one as its broker.toml does"
        )
    if receipt.outcome != "refused" and receipt.crl_number != crl.number:
        raise BirthmarkError(
            f"the receipt is for CRL {crl.number}, but says that {receipt.crl_number} is in force"
        )


def _by_mqtt(gateway: Gateway, latest: _Latest, anchors_path: Path, deadline: float) -> Receipt:
    if gateway.operator_path is None:
        raise BirthmarkError(f"could not reach {gateway.name}: no operator is set for it")
    if len(latest.crl.der) > MAX_MQTT_CRL_BYTES:
        raise BirthmarkError(f"the CRL is too long for MQTT ({len(latest.crl.der)} bytes): deliver it by a path")
    credentials = Credentials.from_files(
        gateway.operator_path, anchors_path, BrokerAddress(gateway.host, gateway.port)
    )
    name = BrokerName(gateway.name)
    payloads: queue.Queue[bytes] = queue.Queue()

    def keep(message: Message) -> None:
        payloads.put(message.payload)

    # A session of its own each time: several deliveries by one operator do not take over from each other.
    client = Client(credentials, client_suffix=f"crl-{secrets.token_hex(4)}", connect_timeout_s=_left(deadline))
    client.connect(timeout_s=_left(deadline))
    try:
        # Listen first, so that no receipt is missed.
        client.subscribe(gateway_receipts(name), keep, wait=_left(deadline))
        while True:
            client.publish(gateway_crl(name), latest.crl.der, wait=_left(deadline))
            receipt = _receipt_for(latest.crl, payloads, deadline)
            if receipt.outcome != "refused" or not latest.has_moved():
                _check_receipt(receipt, gateway.name, latest.crl)
                return receipt
    except queue.Empty as error:
        raise UnreachableError(f"no receipt from {gateway.reached_by}") from error
    finally:
        client.stop(timeout_s=_STOP_S)


def _receipt_for(crl: StoredCrl, payloads: queue.Queue[bytes], deadline: float) -> Receipt:
    """Return the first receipt for `crl`; others, and what is no receipt, are not ours to judge."""
    while True:
        payload = payloads.get(timeout=_left(deadline))
        with contextlib.suppress(RemoteProtocolError):
            receipt = Receipt.from_bytes(payload)
            if receipt.crl_sha256 == crl.sha256:
                return receipt
        if time.monotonic() >= deadline:
            raise queue.Empty


def _left(deadline: float) -> float:
    """Return the seconds until `deadline`, a few milliseconds at least."""
    return max(_POLL_S, deadline - time.monotonic())


def _read_receipt(path: Path) -> Receipt:
    # Not blocking: whoever may write there may also have put a pipe there, which nobody ever writes to.
    with open(path, "rb", opener=_without_blocking) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise BirthmarkError(f"could not read the receipt {path}: it is no regular file")
        content = file.read(_MAX_RECEIPT_BYTES + 1)
    if len(content) > _MAX_RECEIPT_BYTES:
        raise BirthmarkError(f"could not read the receipt {path}: it is too long")
    return Receipt.from_bytes(content)


def _without_blocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


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
