"""Bringing the CRLs to every gateway, and hearing from each what it did with them.

Rules:

- A gateway has a CRL when its receipt says so: `installed` or `current`, for the very bytes that were sent, by
  the gateway they were sent to. Anything else (no receipt, an unreadable one, one for another CRL, one that
  contradicts itself) is PENDING; `refused` is a refusal.
- Another command may sign and bring a newer CRL meanwhile. It lists all that this one does, so it counts as well;
  and a gateway's file that ours has overwritten is given the newer one again.
- Every issuing CA's CRL needs a receipt, but for that of a CA which has not issued anything yet: a gateway that
  does not trust such a one passes its CRL over, and lets nobody in by it.
- By path: the CRLs are written durably to the gateway's `crl_path` (PEM); the receipt appears beside it, under the
  same name with `.receipt` appended, or, for one of several, with its CA's key identifier before that. Once the
  one without has changed, all of them are there. By MQTT: each published as DER on `gateway/{name}/crl` with QoS 1
  by an operator; the receipts come on `gateway/{name}/receipts`.
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
from dataclasses import dataclass, replace
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
from birthmark.provisioning.cas import SHORT
from birthmark.provisioning.crls import successor

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence
    from pathlib import Path
    from typing import TypeAlias

    from birthmark.device.received import Message
    from birthmark.provisioning.cas import Cas
    from birthmark.provisioning.crls import CrlSet, StoredCrl
    from birthmark.provisioning.gateway_settings import Gateway

    _Identity: TypeAlias = tuple[int, int, int]

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
    """What became of the CRLs at one gateway."""

    gateway: str
    outcome: Outcome
    cause: str = ""
    """Why it is not done."""
    receipts: tuple[Receipt, ...] = ()
    """For the CRLs that it has; `issuer` is as the station knows it."""
    distrusted: tuple[str, ...] = ()
    """The key identifiers of CAs that have issued nothing yet, and that it does not trust."""

    def record(self) -> dict[str, Any]:
        """Return this as a JSON object."""
        record: dict[str, Any] = {"gateway": self.gateway, "outcome": self.outcome.value, "cause": self.cause}
        if self.receipts:
            record |= _receipt_record(self.receipts[0])
        if len(self.receipts) > 1:
            record["others"] = [{"issuer": one.issuer, **_receipt_record(one)} for one in self.receipts[1:]]
        if self.distrusted:
            record["distrusted"] = list(self.distrusted)
        return record

    def described(self) -> str:
        """Return this as a line for people."""
        if self.outcome is Outcome.PENDING:
            return f"{self.gateway}: PENDING: {self.cause}"
        if self.outcome is Outcome.REFUSED or not self.receipts:
            return f"{self.gateway}: refused the CRL: {self.cause}"
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


def deliver(
    gateways: Sequence[Gateway],
    crls: CrlSet,
    cas: Cas,
    *,
    anchors_path: Path,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> list[Delivery]:
    """Bring the CRLs to every gateway at once and wait for the receipts, at most `timeout_s` in all.

    Args:
        gateways: where to.
        crls: what.
        cas: the station's CAs.
        anchors_path: the CA certificates that a gateway's own certificate may lead to (PEM).
        timeout_s: how long to wait.

    Never fails as a whole: what went wrong at a gateway is in its `Delivery`.
    """
    if not gateways:
        return []
    deadline = time.monotonic() + timeout_s
    with ThreadPoolExecutor(max_workers=min(32, len(gateways))) as pool:
        return list(pool.map(lambda one: _deliver_one(one, _Latest(crls, cas), anchors_path, deadline), gateways))


def _deliver_one(gateway: Gateway, latest: _Latest, anchors_path: Path, deadline: float) -> Delivery:
    try:
        if gateway.crl_path is not None:
            receipts = _by_path(gateway.name, gateway.crl_path, latest, deadline)
        else:
            receipts = _by_mqtt(gateway, latest, anchors_path, deadline)
    except BirthmarkError as error:
        return Delivery(gateway.name, Outcome.PENDING, error.message)
    except OSError as error:
        return Delivery(
            gateway.name, Outcome.PENDING, f"could not reach {gateway.reached_by}: {error.strerror or error}"
        )
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
            return Delivery(gateway.name, Outcome.REFUSED, cause, told, needless)
        needless += (crl.issuer,)
    return Delivery(gateway.name, Outcome.DONE, "", told, needless)


class _Latest:
    """The CRLs that a gateway is to have: those it was begun with, or what the station has signed since."""

    def __init__(self, crls: CrlSet, cas: Cas) -> None:
        self.crls = crls
        self._cas = cas

    def has_moved(self) -> bool:
        """Whether the station has signed a newer one; `crls` has it then."""
        newer = successor(self._cas.issuing, self.crls)
        if newer is None:
            return False
        self.crls = newer
        return True

    def needs(self, crl: StoredCrl) -> bool:
        """Whether a gateway must have this one: its CA has issued."""
        return self._cas.get(crl.issuer).activated_at is not None

    def missing(self, receipts: Container[str]) -> list[StoredCrl]:
        """Return those that a gateway must have, and has not."""
        return [crl for crl in self.crls.crls if crl.sha256 not in receipts and self.needs(crl)]


def _by_path(name: str, crl_path: Path, latest: _Latest, deadline: float) -> dict[str, Receipt]:
    """Return the receipts by the SHA-256 of the CRL that each is for."""
    paths = _receipt_paths(crl_path, latest.crls)
    before = {path: _identity(path) for path in paths}
    write_durably(crl_path, latest.crls.pem, mode=CRL_FILE_MODE)
    while latest.has_moved():
        # Whoever signed it may have brought it already: then ours has just overwritten it.
        write_durably(crl_path, latest.crls.pem, mode=CRL_FILE_MODE)
    looked_at = None
    while True:
        told = _identity(paths[0])  # before the receipts are read: when it changes, they all have
        receipts, last_problem = _receipts_in(paths, before, latest.crls)
        missing = latest.missing(receipts)
        if missing and told != looked_at:
            looked_at = told
            if latest.has_moved():
                continue
        for crl in latest.crls.crls:
            if crl.sha256 in receipts:
                _check_receipt(receipts[crl.sha256], name, crl)
        is_over = time.monotonic() >= deadline
        if not missing and (len(receipts) == len(latest.crls.crls) or told != before[paths[0]] or is_over):
            return receipts
        if is_over:
            raise BirthmarkError(last_problem)
        time.sleep(_POLL_S)


def _receipt_paths(crl_path: Path, crls: CrlSet) -> list[Path]:
    """Return where receipts may be, the one for the whole file first."""
    names = ["", *(f".{crl.issuer}" for crl in crls.crls)]
    return [crl_path.with_name(f"{crl_path.name}{name}.receipt") for name in names]


def _receipts_in(
    paths: Sequence[Path], before: Mapping[Path, _Identity | None], crls: CrlSet
) -> tuple[dict[str, Receipt], str]:
    """Return the receipts for our CRLs by SHA-256, and what was wrong with what else is there."""
    wanted = {crl.sha256 for crl in crls.crls}
    receipts: dict[str, Receipt] = {}
    problem = f"no receipt at {paths[0]}"
    for path in reversed(paths):
        try:
            receipt = _read_receipt(path)
        except BirthmarkError as error:
            problem = error.message
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                problem = f"could not read the receipt {path}: {error.strerror}"
        else:
            # A refusal that was there before is of an earlier attempt: this one may fare better.
            is_new = _identity(path) != before[path] or receipt.outcome != "refused"
            if receipt.crl_sha256 in wanted and is_new:
                receipts[receipt.crl_sha256] = receipt
            else:
                problem = f"the receipt {path} is for another CRL"
    if receipts and len(wanted) > 1:
        lacking = next((crl for crl in crls.crls if crl.sha256 not in receipts), None)
        problem = (
            f"no receipt for the CRL of {lacking.issuer[:SHORT]}: does it trust that CA?" if lacking else problem
        )
    return receipts, problem


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


def _by_mqtt(gateway: Gateway, latest: _Latest, anchors_path: Path, deadline: float) -> dict[str, Receipt]:
    """Return the receipts by the SHA-256 of the CRL that each is for."""
    if gateway.operator_path is None:
        raise BirthmarkError(f"could not reach {gateway.name}: no operator is set for it")
    longest = max(len(crl.der) for crl in latest.crls.crls)
    if longest > MAX_MQTT_CRL_BYTES:
        raise BirthmarkError(f"the CRL is too long for MQTT ({longest} bytes): deliver it by a path")
    credentials = Credentials.from_files(
        gateway.operator_path, anchors_path, BrokerAddress(gateway.host, gateway.port)
    )
    name = BrokerName(gateway.name)
    payloads: queue.Queue[bytes] = queue.Queue()

    def keep(message: Message) -> None:
        if not message.retained:  # of an attempt before: this one may fare better, or worse
            payloads.put(message.payload)

    # A session of its own each time: several deliveries by one operator do not take over from each other.
    client = Client(credentials, client_suffix=f"crl-{secrets.token_hex(4)}", connect_timeout_s=_left(deadline))
    client.connect(timeout_s=_left(deadline))
    try:
        # Listen first, so that no receipt is missed.
        client.subscribe(gateway_receipts(name), keep, wait=_left(deadline))
        receipts: dict[str, Receipt] = {}
        while True:
            for crl in [crl for crl in latest.crls.crls if crl.sha256 not in receipts]:
                client.publish(gateway_crl(name), crl.der, wait=_left(deadline))
                receipts[crl.sha256] = _receipt_for(crl, payloads, deadline)
            refused = any(receipt.outcome == "refused" for receipt in receipts.values())
            if not refused or not latest.has_moved():
                for crl in latest.crls.crls:
                    _check_receipt(receipts[crl.sha256], gateway.name, crl)
                return {crl.sha256: receipts[crl.sha256] for crl in latest.crls.crls}
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


def _identity(path: Path) -> _Identity | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


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
