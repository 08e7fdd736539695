"""This gateway as one of a fleet: what it takes from above, what it says of it, and what it hands on.

Rules:

- CRLs and policies go through one intake, whoever brings them (`intake.py`).
- Each is answered: a CRL with the receipt that any CRL has, a policy with one of its own.
- What is in force is retained here on the fleet's topics, and nothing else is: a gateway below hears what this one
  goes by, and never what this one has refused.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Final

from birthmark.broker.fleet.intake import Intake, Judgement, Offer
from birthmark.device.fleet_policy import PolicyReceipt
from birthmark.device.topics import FLEET_POLICY, fleet_crl, gateway_policy_receipts

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from birthmark.broker.alarms import Alarm
    from birthmark.broker.crl import Crl
    from birthmark.broker.fleet.policy import PolicyInstallation
    from birthmark.broker.peer import Peer
    from birthmark.broker.policy import Policy
    from birthmark.broker.policy_in_force import PolicyInForce
    from birthmark.broker.revocation import Installation
    from birthmark.broker.server_protocol import Server
    from birthmark.broker.trust import Trust
    from birthmark.device.identity import BrokerName

_MAY_PASS_LATER: Final = frozenset({"issuer", "not-yet-valid", "storage"})
"""Why something is refused that is good, perhaps: a CA not brought here yet, a clock, a disk."""
_STALE: Final = "older"

_log = logging.getLogger(__name__)


class Member:
    """Takes, judges, answers and hands on.

    Args:
        gateway: its name.
        policies: the policy in force.
        trust: returns the issuing CAs that are trusted now.
        install_crl: judges a CRL and puts it in force with all effects, its receipt included.
        go_by: has the broker go by another policy; returns how many subscriptions it ended.
        publish: retains a message of the broker's own.
        changed: called when what the alarms and the status say may be another.
    """

    def __init__(
        self,
        gateway: BrokerName,
        policies: PolicyInForce,
        *,
        trust: Callable[[], Trust],
        install_crl: Callable[[Offer], Awaitable[Sequence[Installation]]],
        go_by: Callable[[Policy], int],
        publish: Callable[[str, bytes], None],
        changed: Callable[[], None],
    ) -> None:
        self._gateway = gateway
        self._policies = policies
        self._trust = trust
        self._install_crl = install_crl
        self._go_by = go_by
        self._publish = publish
        self._intake = Intake(self._judge, lambda key_id: trust().has(key_id), changed)
        self._told: dict[str, str] = {}
        """What is retained on each topic of the fleet: the SHA-256 of a CRL, the version of a policy."""

    def start(self, server: Server) -> None:
        """Take what clients bring on the fleet's topics, and what comes down an upstream."""
        for topic_filter in (fleet_crl("+"), FLEET_POLICY):
            server.on_gateway_message(topic_filter, self._bring)

    async def run(self) -> None:
        """Judge what comes, until cancelled."""
        await self._intake.run()

    async def settled(self) -> None:
        """Wait until everything that has come is judged."""
        await self._intake.settled()

    def try_again(self) -> None:
        """Judge once more what was refused for a reason that may be gone."""
        self._intake.try_again()

    def alarms(self) -> list[Alarm]:
        """Return what was refused, of what stands on the fleet's topics."""
        return self._intake.alarms()

    def tell(self, crls: Mapping[str, Crl], max_bytes: int) -> None:
        """Retain what is in force on the fleet's topics; a CRL longer than `max_bytes` is not told by message."""
        told = {
            fleet_crl(issuer): (crl.sha256, crl.der) for issuer, crl in crls.items() if len(crl.der) <= max_bytes
        }
        in_force = self._policies.fleet.in_force
        if in_force is not None:
            told[FLEET_POLICY] = (str(in_force.signed.version), in_force.payload)
        for topic in self._told.keys() - told.keys():
            self._publish(topic, b"")
        for topic, (name, payload) in told.items():
            if self._told.get(topic) != name:
                self._publish(topic, payload)
        self._told = {topic: name for topic, (name, _payload) in told.items()}

    def _bring(self, topic: str, payload: bytes, peer: Peer) -> None:
        self._intake.offer(topic, payload, str(peer.device_id))

    async def _judge(self, offer: Offer) -> Judgement:
        if offer.topic == FLEET_POLICY:
            return await self._judge_policy(offer)
        for answer in await self._install_crl(offer):
            if answer.outcome == "refused":
                return _judgement(answer.reason, answer.hint, answer.fault)
        return Judgement()

    async def _judge_policy(self, offer: Offer) -> Judgement:
        answer = await asyncio.to_thread(self._policies.install, offer.payload, self._trust())
        ended = self._go_by(self._policies.policy) if answer.outcome == "installed" else 0
        if answer.fault is None or not offer.is_again:
            receipt = PolicyReceipt(
                gateway=str(self._gateway),
                outcome=answer.outcome,
                version=answer.version,
                sha256=answer.sha256,
                installed_at=time.time(),
                elapsed_ms=(time.monotonic() - offer.started_s) * 1_000,
                subscriptions_ended=ended,
                reason=answer.reason,
            )
            _log_policy(answer, offer.by, ended)
            self._publish(gateway_policy_receipts(self._gateway), receipt.to_bytes())
        return _judgement(answer.message, answer.hint, answer.fault or "")


def _judgement(refusal: str, hint: str, fault: str) -> Judgement:
    return Judgement(refusal, hint, may_pass_later=fault in _MAY_PASS_LATER, is_stale=fault == _STALE)


def _log_policy(answer: PolicyInstallation, by: str, ended: int) -> None:
    fields = {"event": f"policy_{answer.outcome}", "origin": by, "version": answer.version}
    if answer.fault is not None:
        fields["reason"] = answer.reason
        _log.error(
            "refused a policy from %s: %s; what was in force stays", by, answer.reason, extra={"fields": fields}
        )
        return
    _log.info(
        "the fleet's policy, version %s, from %s: %s; subscriptions ended: %s",
        answer.version,
        by,
        answer.outcome,
        ended,
        extra={"fields": fields},
    )
