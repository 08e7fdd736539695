"""This gateway as one of a fleet: what it takes from above, what it says of it, and what it hands on.

Rules:

- CRLs and policies go through one intake, whoever brings them (`intake.py`).
- Each is answered: a CRL with the receipt that any CRL has, a policy with one of its own.
- Nobody is let in before what the upstream has retained was heard and judged, or `catch_up_s` are over, or the
  upstream is known not to be reached: a gateway that was away for long must not go by what was so then. It starts
  all the same by what it has: one that is alone must not take its devices down. What it has not heard is an alarm.
- Once a gateway below has come, what is in force is retained here on the fleet's topics, and nothing else is: it
  hears what this one goes by, and never what this one has refused.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Final

from birthmark.broker.alarms import Alarm
from birthmark.broker.fleet.intake import Intake, Judgement, Offer
from birthmark.broker.fleet.roaming import Roaming
from birthmark.broker.standing import Standing
from birthmark.device.fleet_policy import PolicyReceipt
from birthmark.device.topics import FLEET_POLICY, fleet_crl, gateway_policy_receipts, is_said_by_gateway

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from birthmark.broker.crl import Crl
    from birthmark.broker.fleet.policy import PolicyInstallation
    from birthmark.broker.fleet.visits import Visits
    from birthmark.broker.log_budget import LogBudget
    from birthmark.broker.peer import Peer
    from birthmark.broker.policy import Policy
    from birthmark.broker.policy_in_force import PolicyInForce
    from birthmark.broker.revocation import Installation
    from birthmark.broker.server_protocol import Server
    from birthmark.broker.sightings import Sightings
    from birthmark.broker.trust import Trust
    from birthmark.broker.upstream.upstream import Upstream
    from birthmark.device.identity import BrokerName

MAX_TOLD_CRL_BYTES: Final = 1024 * 1024 - 1024
"""A longer CRL is not told by message: whoever needs it takes it from the data folder."""
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
        crls: returns the CRLs in force.
        publish: retains a message of the broker's own.
        changed: called when what the alarms and the status say may be another.
        visits: where the fleet's devices are; None where there is no fleet.
        sightings: what this gateway says of those it has seen.
        budget: of the log's lines that one who brings things may cause.
    """

    def __init__(
        self,
        gateway: BrokerName,
        policies: PolicyInForce,
        *,
        trust: Callable[[], Trust],
        install_crl: Callable[[Offer], Awaitable[Sequence[Installation]]],
        go_by: Callable[[Policy], int],
        crls: Callable[[], Mapping[str, Crl]],
        publish: Callable[[str, bytes], None],
        changed: Callable[[], None],
        visits: Visits | None,
        sightings: Sightings,
        budget: LogBudget,
    ) -> None:
        self._gateway = gateway
        self._budget = budget
        self._visits = visits
        self._sightings = sightings
        self._roaming: Roaming | None = None
        self._upstreams: list[Upstream] = []
        self._has_begun = False
        """Whether whoever is let in is let in by what was heard up to now."""
        self._policies = policies
        self._trust = trust
        self._install_crl = install_crl
        self._go_by = go_by
        self._crls = crls
        self._publish = publish
        self._changed = changed
        self._intake = Intake(self._judge, lambda key_id: trust().has(key_id), changed, budget)
        self._serves = False
        self._told = Standing(publish)

    def start(self, server: Server) -> None:
        """Take what clients bring on the fleet's topics, and what comes down its upstreams."""
        for topic_filter in (fleet_crl("+"), FLEET_POLICY):
            server.on_gateway_message(topic_filter, self._bring)
        self._upstreams = [upstream for upstream in server.upstreams if upstream.settings.fleet]
        if self._visits is not None:
            self._roaming = Roaming(self._gateway, self._visits, self._sightings, server.roamers)
        for upstream in self._upstreams:
            upstream.on_fleet = partial(self._hear, upstream.name)
        self.follow_trust()

    def take_up(self) -> None:
        """Go on, from the sightings of before a restart, with who has moved elsewhere."""
        if self._roaming is not None:
            self._roaming.begin()

    def follow_trust(self) -> None:
        """Ask the upstreams for the CRLs of the CAs that are trusted now, and judge once more what was refused.

        Each by its own topic: RabbitMQ gives what is retained for no filter with a wildcard in it.
        """
        for upstream in self._upstreams:
            upstream.ask_for(fleet_crl(issuer.key_id) for issuer in self._trust())
        self._intake.try_again()

    async def catch_up(self, stop: asyncio.Event | None) -> None:
        """Wait for what the upstreams have retained, within bounds; `stop`: no longer than until this is set."""
        if self._upstreams:
            timeout_s = max(upstream.settings.catch_up_s for upstream in self._upstreams)
            _log.info("waiting for what the upstream has for the fleet, for %g s at most", timeout_s)
            over = [asyncio.create_task(self._have_caught_up())]
            if stop is not None:
                over.append(asyncio.create_task(_set(stop)))
            await asyncio.wait(over, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            for each in over:
                each.cancel()
            await asyncio.gather(*over, return_exceptions=True)
            self._has_begun = True
            self._changed()

    async def _have_caught_up(self) -> None:
        """Return when all that there should be is judged; what there may be is known once all is heard."""
        all_heard = asyncio.create_task(self._have_heard_all())
        if not self._policies.version:
            await all_heard
            return
        # A policy will come, as there was one: no need to wait for the sightings of a whole fleet behind it.
        enough = asyncio.create_task(self._intake.settled(self._wanted()))
        try:
            await asyncio.wait((all_heard, enough), return_when=asyncio.FIRST_COMPLETED)
        finally:
            all_heard.cancel()
            enough.cancel()

    async def _have_heard_all(self) -> None:
        for upstream in self._upstreams:
            await upstream.stands.wait()
        if any(upstream.caught_up.is_set() for upstream in self._upstreams):
            await self._intake.settled(self._wanted())

    def _wanted(self) -> list[str]:
        """The topics on which the upstreams should have something."""
        in_force = self._crls()
        topics = [
            fleet_crl(issuer.key_id)
            for issuer in self._trust()
            if issuer.key_id not in in_force or message_of(in_force[issuer.key_id])
        ]
        return [*topics, FLEET_POLICY] if self._policies.version else topics

    async def run(self) -> None:
        """Judge what comes, until cancelled."""
        await self._intake.run()

    async def settled(self) -> None:
        """Wait until everything that has come is judged."""
        await self._intake.settled()

    def try_again(self) -> None:
        """Judge once more what was refused for a reason that may be gone."""
        self._intake.try_again()

    def move(self) -> None:
        """Say what is due about devices that have moved."""
        if self._roaming is not None:
            self._roaming.tell()

    def alarms(self) -> list[Alarm]:
        """Return what was refused of what stands on the fleet's topics, and what was not heard since the start."""
        found = self._intake.alarms()
        if not self._upstreams or not self._has_begun:
            return found
        names = " ".join(upstream.name for upstream in self._upstreams)
        if not any(upstream.caught_up.is_set() for upstream in self._upstreams):
            message = f"nothing was heard of the fleet since the start ({names}): this gateway goes by what it has"
            return [*found, Alarm("fleet-unheard", message, "CRL numbers and policy version may be behind")]
        unheard = self._intake.unheard(self._wanted())
        if unheard:
            message = f"the fleet's upstream ({names}) has nothing on {', '.join(unheard)}"
            found.append(Alarm("fleet-unheard", message, "does the station deliver through this upstream?"))
        return found

    def serve(self) -> None:
        """A gateway below has connected: have for it what it is about to ask for."""
        if not self._serves:
            self._serves = True
            self.tell()

    def tell(self) -> None:
        """Retain what is in force on the fleet's topics, as far as it fits a message, for gateways below."""
        if not self._serves:
            return
        crls = {fleet_crl(issuer): (crl.sha256, message_of(crl)) for issuer, crl in self._crls().items()}
        told = {topic: (name, payload) for topic, (name, payload) in crls.items() if payload}
        in_force = self._policies.fleet.in_force
        if in_force is not None:
            told[FLEET_POLICY] = (str(in_force.signed.version), in_force.payload)
        self._told.tell(told)

    def _hear(self, name: str, topic: str, payload: bytes, is_retained: bool) -> bool:
        """Take what an upstream says to the gateways of a fleet; return whether it is such a thing."""
        del is_retained  # numbers and visits order what is heard; RabbitMQ does not tell which was retained
        if topic == FLEET_POLICY or topic.startswith(fleet_crl("")):
            self._intake.offer(topic, payload, f"the upstream {name}")
            return True
        if self._roaming is not None and is_said_by_gateway(topic):
            self._roaming.heard(topic, payload)
            return True
        return False

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
            if answer.outcome == "installed" or self._budget.grants(offer.by, f"policy_{answer.outcome}"):
                _log_policy(answer, offer.by, ended)
            self._publish(gateway_policy_receipts(self._gateway), receipt.to_bytes())
        return _judgement(answer.message, answer.hint, answer.fault or "")


def message_of(crl: Crl) -> bytes:
    """Return what is told of a CRL by message: all of it, or nothing of one that is too long."""
    return crl.der if len(crl.der) <= MAX_TOLD_CRL_BYTES else b""


async def _set(event: asyncio.Event) -> None:
    await event.wait()


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
