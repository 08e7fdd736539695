"""What a fleet's CRLs and policy go through before they take hold, from wherever they come.

    fleet/crl/{issuer}   a CRL
    fleet/policy         a signed policy

Rules:

- An upstream and a client whom the policy lets publish there are treated alike: nothing is believed for having
  come, only for whose signature it has.
- They are judged one at a time, off the event loop. Each is a state: of several on one topic only the last counts.
- After one that is refused the intake rests, as each costs a thread, a retained receipt and a status: nobody may
  have them made as fast as one can be judged. What comes meanwhile waits, the last one of each topic.
- What was refused because its CA is not trusted *yet*, because of a clock, or of a disk is judged again, by and by
  and after each change of the issuing CAs: it is retained above, and nobody sends it twice.
- While the last one on a topic is one that was refused, that is an alarm.
- Nothing on other topics keeps out what is on those of trusted CAs, or the policy: these are judged first.
- An empty message takes a retained one away. It takes nothing away here.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from birthmark.broker.alarms import Alarm
from birthmark.device.escape import escaped
from birthmark.device.topics import FLEET_POLICY, fleet_crl

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from birthmark.broker.log_budget import LogBudget

MAX_STRANGERS = 16
"""Topics of CAs that are not trusted, of which something is kept: the one heard of first makes room."""
REST_S = 0.1
"""Between one that is refused and the next: no person notices it, and a flood comes to ten receipts a second."""
Code = Literal["fleet-crl-refused", "fleet-policy-refused"]
_TOPIC = re.compile(rf"{re.escape(FLEET_POLICY)}|{re.escape(fleet_crl(''))}[0-9a-f]{{1,64}}")

_log = logging.getLogger(__name__)


async def _rest() -> None:
    await asyncio.sleep(REST_S)


@dataclass(frozen=True, slots=True)
class Offer:
    """Something that arrived on a topic of the fleet."""

    topic: str
    payload: bytes
    by: str
    """Who brought it, fit for a log."""
    started_s: float
    """`time.monotonic()` when it arrived."""
    is_again: bool = False
    """Whether it was refused before, and that was said."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What became of an offer."""

    refusal: str = ""
    """Why it was refused; empty if it is in force now."""
    hint: str = ""
    may_pass_later: bool = False
    """Whether the very same may be taken another time."""
    is_stale: bool = False
    """Whether it is merely older than what is in force, as a node may serve that was away."""


class Intake:
    """Takes offers, and has them judged.

    Args:
        judge: installs what is good, with all effects and its receipt.
        is_trusted: whether a CA, by its key identifier, is trusted now.
        changed: called after each one: what the alarms are about may be another.
        budget: of the log's lines that one who brings things may cause.
        rest: returns when the intake has rested.
    """

    def __init__(
        self,
        judge: Callable[[Offer], Awaitable[Judgement]],
        is_trusted: Callable[[str], bool],
        changed: Callable[[], None],
        budget: LogBudget,
        rest: Callable[[], Awaitable[None]] = _rest,
    ) -> None:
        self._budget = budget
        self._rest = rest
        self._judge = judge
        self._is_trusted = is_trusted
        self._changed = changed
        self._waiting: dict[str, Offer] = {}
        self._again: dict[str, Offer] = {}
        self._refused: dict[str, Alarm] = {}
        self._arrived = asyncio.Event()
        self._judged = asyncio.Condition()
        self._is_judging = False
        self._complained = False
        self._heard: set[str] = set()
        """Topics on which something was judged since the start."""

    def offer(self, topic: str, payload: bytes, by: str) -> None:
        """Have something judged, soon. Never raises; what is no topic of the fleet's is logged once."""
        if not _TOPIC.fullmatch(topic):
            if not self._complained:
                self._complained = True
                _log.warning("ignored a message from %s on %s: no topic of a fleet's", by, escaped(topic[:128]))
            return
        if not payload:
            if self._budget.grants(by, "taken away"):
                _log.info("%s was taken away by %s; what is in force here stays", topic, by)
            return
        self._make_room(topic)
        self._waiting[topic] = Offer(topic, payload, by, time.monotonic())
        self._again.pop(topic, None)
        self._arrived.set()

    def try_again(self) -> None:
        """Have judged once more what may be taken now."""
        for topic, offer in self._again.items():
            self._waiting.setdefault(topic, offer)
        if self._again:
            self._again.clear()
            self._arrived.set()

    def unheard(self, topics: Iterable[str]) -> list[str]:
        """Return those topics of which nothing was judged since the start."""
        return [topic for topic in topics if topic not in self._heard]

    async def settled(self, topics: Iterable[str] = ()) -> None:
        """Wait until everything that has come is judged, and something on each of some topics."""
        wanted = list(topics)
        async with self._judged:
            await self._judged.wait_for(lambda: not (self._waiting or self._is_judging or self.unheard(wanted)))

    def alarms(self) -> list[Alarm]:
        """Return what was refused, of what stands on the fleet's topics."""
        return list(self._refused.values())

    async def run(self) -> None:
        """Judge what comes, one at a time, until cancelled."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._waiting:
                topic = min(self._waiting, key=self._is_strange)  # of equals the one that has waited longest
                offer = self._waiting.pop(topic)
                self._is_judging = True
                is_good = False
                try:
                    judgement = await self._judge(offer)
                    self._note(offer, judgement)
                    is_good = not judgement.refusal
                except Exception:  # noqa: BLE001 - a defect over one of them must not keep out the next
                    _log.exception("a message from %s on %s could not be judged", offer.by, offer.topic)
                self._is_judging = False
                self._changed()
                async with self._judged:
                    self._judged.notify_all()
                if not is_good:
                    await self._rest()

    def _note(self, offer: Offer, judgement: Judgement) -> None:
        topic = offer.topic
        self._heard.add(topic)
        self._refused.pop(topic, None)
        self._again.pop(topic, None)
        if not judgement.refusal:
            return
        level = logging.WARNING if judgement.is_stale else logging.ERROR
        message = f"what {offer.by} has on {topic} is refused, and what was in force stays: {judgement.refusal}"
        self._refused[topic] = Alarm(
            "fleet-policy-refused" if topic == FLEET_POLICY else "fleet-crl-refused",
            message,
            judgement.hint,
            level,
        )
        if judgement.may_pass_later and topic not in self._waiting:
            self._again[topic] = replace(offer, is_again=True)

    def _make_room(self, topic: str) -> None:
        known = self._refused | dict.fromkeys(self._waiting)
        strangers = [found for found in known if found != topic and self._is_strange(found)]
        if self._is_strange(topic) and len(strangers) >= MAX_STRANGERS:
            self._waiting.pop(strangers[0], None)
            self._again.pop(strangers[0], None)
            self._refused.pop(strangers[0], None)

    def _is_strange(self, topic: str) -> bool:
        return topic != FLEET_POLICY and not self._is_trusted(topic.rpartition("/")[2])
