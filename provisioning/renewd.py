"""The renewal service: takes requests from the gateways and has them answered in groups (docs/renewal.md).

Rules:

- Requests come on the callbacks' threads of one client a gateway; one thread takes all that wait, up to
  `MAX_GROUP`, and has them answered together: the slower the registry's disk, the larger the groups.
- Gateways take turns in a group, and of each at most `MAX_WAITING` wait. What finds no room is dropped; the device
  asks again. So a gateway that brings too much keeps nobody at another one waiting.
- An answer goes out on the gateway that its request came from, after everything in it is durable.
- A device may ask `MAX_ASKED` times in `ASKED_WITHIN_S` by one gateway; beyond that it is not heard, whether it
  can be understood or not. So one device neither fills a log nor keeps the others waiting; and a gateway that says
  anything in a device's name silences it there, and at no other gateway.
- A request that brings out a defect is answered as a trouble, and those of its group are answered without it.
- A trouble of the station (registry, CA, clock) is told to the devices as one that is worth another try.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, Final

from birthmark.device import topics
from birthmark.device.certificate_facts import certificate_facts
from birthmark.device.errors import BirthmarkError, RemoteProtocolError
from birthmark.device.escape import escaped
from birthmark.device.identity import DeviceId
from birthmark.device.renewal.messages import RenewalAnswer, RenewalRequest
from birthmark.provisioning.defects import described
from birthmark.provisioning.renewal import Asked

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from birthmark.device.client import Client
    from birthmark.device.received import Message
    from birthmark.provisioning.renewal import Renewals

MAX_GROUP: Final = 256
"""How many requests share the registry's writes."""
MAX_WAITING: Final = 10_000
MAX_ASKED: Final = 12
ASKED_WITHIN_S: Final = 60.0
MAX_ASKERS: Final = 50_000
"""Whom one gateway may name in `ASKED_WITHIN_S`; there are no more devices at one."""
TROUBLE_RETRY_S: Final = 60


class RenewalService:
    """Answers what the gateways bring.

    Args:
        renewals: the station's.
        say: prints one line: a name, a text for people, and facts.
        alive: is called at every turn of the loop, at least every `turn_s`.
        confirmed: is called when devices have confirmed: what they had before is due to be revoked some day.
        turn_s: the longest wait for a request.
    """

    def __init__(
        self,
        renewals: Renewals,
        *,
        say: Callable[..., None],
        alive: Callable[[], None] = lambda: None,
        confirmed: Callable[[], None] = lambda: None,
        turn_s: float = 30.0,
    ) -> None:
        self._renewals = renewals
        self._say = say
        self._alive = alive
        self._confirmed = confirmed
        self._turn_s = turn_s
        self._arrived = threading.Condition()
        """Held while anybody looks at what waits."""
        self._gateways: dict[Client, _Gateway] = {}
        self._is_over = False
        self._thread: threading.Thread | None = None
        self.counts: Counter[str] = Counter()
        """Answers by outcome, and what was not heard: `malformed`, `too-often`, `dropped`."""

    def take(self, client: Client, message: Message) -> None:
        """Take a message from a gateway; called on the callbacks' thread of its client."""
        if message.retained:
            return  # a request is for now; whoever keeps it for later has no device behind it
        with self._arrived:
            gateway = self._gateways.setdefault(client, _Gateway())
        try:
            device_id = DeviceId(message.topic.split("/")[1])
        except (BirthmarkError, IndexError):
            device_id = None
        if gateway.hears_too_often("" if device_id is None else device_id.folded):
            self.counts["too-often"] += 1
            return
        try:
            request = RenewalRequest.from_bytes(message.payload)
        except RemoteProtocolError as error:
            self._not_understood(message, error.message)
            return
        if device_id is None:
            self._not_understood(message, "its topic names no device")
            return
        broker = client.credentials.broker
        with self._arrived:
            if len(gateway.waiting) < MAX_WAITING:
                gateway.waiting.append(Asked(device_id, request, via=f"{broker.host}:{broker.port}"))
                self._arrived.notify()
            else:
                self.counts["dropped"] += 1

    def _not_understood(self, message: Message, cause: str) -> None:
        self.counts["malformed"] += 1
        self._say("malformed", f"not understood: {cause}", topic=escaped(message.topic), reason=cause)

    def start(self) -> None:
        """Answer from now on, on a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="birthmark-renewd", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Answer what waits, and end."""
        with self._arrived:
            self._is_over = True
            self._arrived.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            self._alive()
            group = self._next_group()
            if group is None:
                return
            if group:
                self._answer(group)

    def _next_group(self) -> list[tuple[Client, Asked]] | None:
        """Return what waits; empty if nothing came in time, None at the end."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._is_over or self._count_waiting(), timeout=self._turn_s)
            group = self._in_turn()
            return None if self._is_over and not group else group

    def _in_turn(self) -> list[tuple[Client, Asked]]:
        """Take one of each gateway, and again, up to a group."""
        group: list[tuple[Client, Asked]] = []
        while len(group) < MAX_GROUP:
            waiting = [(client, gateway) for client, gateway in self._gateways.items() if gateway.waiting]
            if not waiting:
                break
            group += [(client, gateway.waiting.popleft()) for client, gateway in waiting[: MAX_GROUP - len(group)]]
        return group

    def _count_waiting(self) -> int:
        with self._arrived:
            return sum(len(gateway.waiting) for gateway in self._gateways.values())

    def _answer(self, group: list[tuple[Client, Asked]]) -> None:
        asked = [one for _, one in group]
        began = time.monotonic()
        answers = self._answers(asked)
        elapsed_ms = round((time.monotonic() - began) * 1000, 1)
        for (client, one), answer in zip(group, answers, strict=True):
            try:
                client.publish(topics.renewal_answer(one.device_id), answer.to_bytes())
            except BirthmarkError as error:  # too many wait for a gateway that is gone: the device asks again
                self._say("not_sent", error.message, id=str(one.device_id), reason=error.message)
                continue
            self.counts[answer.outcome] += 1
            self._tell(one, answer)
        if any(answer.outcome == "confirmed" for answer in answers):
            self._confirmed()
        if len(group) > 1:
            self._say(
                "group",
                f"{len(group)} requests answered in {elapsed_ms} ms",
                requests=len(group),
                elapsed_ms=elapsed_ms,
                waiting=self._count_waiting(),
            )

    def _answers(self, asked: Sequence[Asked]) -> list[RenewalAnswer]:
        try:
            return self._renewals.answer(asked)
        except BirthmarkError as error:
            self._say("trouble", f"{error.message}\n          {error.hint}", reason=error.message, hint=error.hint)
        except Exception as error:  # noqa: BLE001 - a defect over one request must not end the service
            if len(asked) > 1:  # nor keep the others of its group waiting
                return [answer for one in asked for answer in self._answers([one])]
            cause = described(error)
            self._say("trouble", f"a defect: {cause}", reason=cause)
        return [_trouble(one) for one in asked]

    def _tell(self, one: Asked, answer: RenewalAnswer) -> None:
        device_id = str(one.device_id)
        facts: dict[str, Any] = {"id": device_id}
        if answer.outcome == "issued":
            leaf = certificate_facts(answer.leaf_der)
            facts |= {"cert_serial": f"{leaf.cert_serial:x}", "not_after": leaf.not_after.isoformat()}
            text = f"{device_id}: a certificate until {leaf.not_after:%Y-%m-%d}"
        elif answer.outcome == "refused":
            facts |= {"reason": answer.reason, "retry": answer.retry}
            text = f"{device_id}: refused: {escaped(answer.reason)}"
        else:
            text = f"{device_id}: confirmed"
        self._say(answer.outcome, text, **facts)


class _Gateway:
    """What one gateway has brought. Who was heard, its client's thread alone asks."""

    def __init__(self) -> None:
        self.waiting: deque[Asked] = deque()
        self._heard: dict[str, list[float]] = {}

    def hears_too_often(self, name: str) -> bool:
        """Take note of a request in somebody's name; return whether it is one too many."""
        now = time.monotonic()
        if len(self._heard) >= MAX_ASKERS:
            oldest = now - ASKED_WITHIN_S
            self._heard = {known: times for known, times in self._heard.items() if times[-1] > oldest}
            if len(self._heard) >= MAX_ASKERS:
                return True
        times = [at for at in self._heard.get(name, ()) if at > now - ASKED_WITHIN_S]
        if len(times) >= MAX_ASKED:
            return True
        self._heard[name] = [*times, now]
        return False


def _trouble(one: Asked) -> RenewalAnswer:
    return RenewalAnswer(
        "refused",
        one.request.nonce,
        reason="the station cannot renew at the moment",
        retry=True,
        retry_after_s=TROUBLE_RETRY_S,
    )
