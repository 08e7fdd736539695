"""Bringing the fleet's policy to every gateway, and hearing from each what it did with it (`broadcast`).

Rules:

- It is published on `fleet/policy`, at the upstream or at a gateway's own broker; the receipts come on
  `gateway/{name}/policy-receipts`. Only what a gateway says counts: a receipt for the very message, or its status
  with version and text.
- A gateway that is reached by a path takes no policy from a station.
- A newer one that the broker holds is this station's if the registry has it by now. Otherwise this ends, and says
  so; the next version will be above it.
"""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from birthmark.device.errors import BirthmarkError
from birthmark.device.escape import escaped
from birthmark.device.fleet_policy import PolicyReceipt, SignedPolicy
from birthmark.device.topics import FLEET_POLICY, gateway_policy_receipts
from birthmark.provisioning.at_once import as_done
from birthmark.provisioning.broadcast import Broadcast, Known
from birthmark.provisioning.delivery import INTERRUPTED, Outcome
from birthmark.provisioning.fleet_policy import current_policy, note_version, trusted_policy
from birthmark.provisioning.gateway_contact import contacts
from birthmark.provisioning.gateway_receipts import note_policy_version

if TYPE_CHECKING:
    from birthmark.device.identity import BrokerName
    from birthmark.provisioning.gateway_contact import Connected, Contact
    from birthmark.provisioning.station import Station


@dataclass(frozen=True, slots=True)
class PolicyDelivery:
    """What became of a policy at one gateway."""

    gateway: str
    outcome: Outcome
    version: int
    """That was to be brought."""
    cause: str = ""
    """Why it is not done."""
    receipt: PolicyReceipt | None = None
    """None where only its status said so."""
    missed: tuple[str, ...] = ()
    """Servers of its upstream that were not brought it, and why."""

    def record(self) -> dict[str, Any]:
        """Return this as a JSON object."""
        record: dict[str, Any] = {"gateway": self.gateway, "outcome": self.outcome.value, "cause": self.cause}
        if self.missed:
            record["missed"] = list(self.missed)
        if self.receipt is not None and self.outcome is Outcome.DONE:
            record["elapsed_ms"] = self.receipt.elapsed_ms
            record["subscriptions_ended"] = self.receipt.subscriptions_ended
        return record

    def described(self) -> str:
        """Return this as a line for people."""
        if self.outcome is Outcome.PENDING:
            return f"{self.gateway}: PENDING: {self.cause}"
        if self.outcome is Outcome.REFUSED:
            return f"{self.gateway}: refused the policy: {self.cause}"
        if self.receipt is None or self.receipt.outcome == "current":
            return f"{self.gateway}: goes by version {self.version} already"
        ended = self.receipt.subscriptions_ended
        plural = "" if ended == 1 else "s"
        tail = f"; {ended} subscription{plural} ended" if ended else ""
        return f"{self.gateway}: goes by version {self.version} after {self.receipt.elapsed_ms:.1f} ms{tail}"


def deliver_policy(station: Station, policy: SignedPolicy, timeout_s: float) -> list[PolicyDelivery]:
    """Bring a policy to every gateway of the station at once, and put what became of it on record.

    Ctrl-C ends the waiting alone, as it does for CRLs (`gateways`).

    Returns:
        What became of it at each, in the order of the settings. What goes wrong at one is in there.

    Raises:
        RegistryError: the registry cannot be used.
    """
    settings = station.settings
    deadline = time.monotonic() + timeout_s
    reached = contacts(settings.gateways, settings.upstreams, station.root_path)
    at_path = "a path takes no policy: put it there as its policy.toml, or give the gateway a link"
    causes = {gateway.name: at_path for gateway in settings.gateways}
    causes |= {gateway.name: INTERRUPTED for contact in reached for gateway in contact.gateways}
    found = {name: PolicyDelivery(name, Outcome.PENDING, policy.version, cause) for name, cause in causes.items()}
    with suppress(KeyboardInterrupt):
        for _, done in as_done(lambda contact: _deliver_at(contact, station, policy, deadline), reached):
            found |= {delivery.gateway: delivery for delivery in done}
    deliveries = [found[gateway.name] for gateway in settings.gateways]
    if deliveries:
        with station.registry.transaction() as transaction:
            for delivery in deliveries:
                if delivery.outcome is Outcome.DONE:
                    note_policy_version(transaction, delivery.gateway, delivery.version)
                transaction.record(
                    "policy-deliver",
                    delivery.gateway,
                    version=delivery.version,
                    outcome=delivery.outcome.value,
                    cause=delivery.cause or None,
                )
    return deliveries


def _deliver_at(contact: Contact, station: Station, policy: SignedPolicy, deadline: float) -> list[PolicyDelivery]:
    try:
        with contact.connected("policy", deadline) as connected:
            broadcast = _PolicyBroadcast(contact, station, policy, connected, deadline)
            broadcast.run()
        return [broadcast.delivery(known) for known in broadcast.gateways.values()]
    except BirthmarkError as error:
        cause = error.message
    except OSError as error:
        cause = f"could not read {error.filename or contact.where}: {error.strerror or error}"
    return [PolicyDelivery(gateway.name, Outcome.PENDING, policy.version, cause) for gateway in contact.gateways]


class _PolicyBroadcast(Broadcast[PolicyReceipt]):
    """One policy, put before the gateways at one contact."""

    def __init__(
        self, contact: Contact, station: Station, policy: SignedPolicy, connected: Connected, deadline: float
    ) -> None:
        super().__init__(contact, connected, deadline)
        self._station = station
        self._want(policy)

    def _want(self, policy: SignedPolicy) -> None:
        self._policy = policy
        self._payload = policy.to_bytes()
        self._sha256 = hashlib.sha256(self._payload).hexdigest()

    @property
    def wanted(self) -> dict[str, bytes]:
        return {FLEET_POLICY: self._payload}

    def receipts_topic(self, name: BrokerName) -> str:
        return gateway_policy_receipts(name)

    def take_receipt(self, known: Known[PolicyReceipt], payload: bytes) -> None:
        receipt = PolicyReceipt.from_bytes(payload)
        if receipt.sha256 != self._sha256:
            return
        known.trouble = ""
        if receipt.gateway.lower() != known.name.lower():
            known.trouble = f"the receipt is of the gateway {escaped(receipt.gateway, 64)}"
        elif receipt.outcome != "refused" and receipt.version != self._policy.version:
            known.trouble = f"the receipt says that version {receipt.version} is in force"
        else:
            known.keep(receipt.sha256, receipt)

    def told(self, known: Known[PolicyReceipt], *, by_status: bool) -> dict[str, PolicyReceipt]:
        if self._sha256 in known.receipts:
            return {self._sha256: known.receipts[self._sha256]}
        status = known.status
        if not by_status or status is None:
            return {}
        if (status.policy_version, status.policy_sha256) != (self._policy.version, self._policy.text_sha256):
            return {}
        return {
            self._sha256: PolicyReceipt(
                gateway=status.gateway,
                outcome="current",
                version=status.policy_version,
                sha256=self._sha256,
                installed_at=status.clock,
                elapsed_ms=0.0,
            )
        }

    def is_complete(self, told: dict[str, PolicyReceipt]) -> bool:
        return bool(told)

    def supersedes(self, topic: str, payload: bytes) -> bool:  # noqa: ARG002 - there is one topic
        held = trusted_policy(payload, self._station.cas)
        if held is None or held.version < self._policy.version:
            return False
        with self._station.registry.view() as view:
            ours = current_policy(view)
        if ours is not None and ours.version >= held.version:
            self._want(ours)  # another command has signed it meanwhile
            return ours == held
        note_version(self._station, held.version + 1)
        self.conflict = (
            f"{self.where} holds a version {held.version} that this station does not know: was it restored? "
            "publish again, which gives a version above that one"
        )
        return True

    def delivery(self, known: Known[PolicyReceipt]) -> PolicyDelivery:
        """Return what became of the policy at a gateway."""
        told = self.final(known).get(self._sha256)
        version = self._policy.version
        if told is not None and told.outcome == "refused":
            cause = escaped(told.reason) or "no reason given"
            return PolicyDelivery(known.name, Outcome.REFUSED, version, cause, told, self.missed)
        if told is None or self.conflict:
            cause = self.conflict or known.trouble or self.silence(known)
            return PolicyDelivery(known.name, Outcome.PENDING, version, cause, missed=self.missed)
        return PolicyDelivery(known.name, Outcome.DONE, version, "", told, self.missed)
