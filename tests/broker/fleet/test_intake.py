"""What the intake of a fleet's CRLs and policies does with a flood: it rests, keeps the last, and says little."""

from __future__ import annotations

import asyncio
import logging

import pytest
from support.patience import PATIENCE_S

from birthmark.broker.alarms import Alarm, Alarms
from birthmark.broker.fleet.intake import Intake, Judgement, Offer
from birthmark.broker.log_budget import MAX_LINES, LogBudget

POLICY = "fleet/policy"
TRUSTED, STRANGE = "aa", "bb"


class Bench:
    """An intake that judges by the first letter, and rests until it is told to go on."""

    def __init__(self) -> None:
        self.judged: list[tuple[str, bytes]] = []
        self.resting = asyncio.Event()
        self.go_on = asyncio.Event()
        self.budget = LogBudget(lambda: 0.0)
        self.intake = Intake(self._judge, lambda key_id: key_id == TRUSTED, lambda: None, self.budget, self._rest)

    async def _judge(self, offer: Offer) -> Judgement:
        self.judged.append((offer.topic, offer.payload))
        if offer.payload.startswith(b"defect"):
            raise RuntimeError
        return Judgement("" if offer.payload.startswith(b"good") else "malformed")

    async def _rest(self) -> None:
        self.resting.set()
        await self.go_on.wait()

    def offer(self, topic: str, payload: bytes) -> None:
        self.intake.offer(topic, payload, "the upstream cloud")


@pytest.mark.parametrize("first", [b"bad", b"defect"])
def test_it_rests_after_a_refusal_and_a_good_one_behind_bad_ones_is_taken(first: bytes) -> None:
    async def main() -> None:
        bench = Bench()
        running = asyncio.create_task(bench.intake.run())
        bench.offer(POLICY, first)
        await asyncio.wait_for(bench.resting.wait(), PATIENCE_S)
        await bench.intake.settled()  # whoever waits for the judgement does not wait for the rest
        for number in range(200):
            bench.offer(POLICY, b"bad %d" % number)
        bench.offer(POLICY, b"good")
        for _ in range(50):
            await asyncio.sleep(0)
        assert bench.judged == [(POLICY, first)], "it judges while it should rest"
        bench.go_on.set()
        await bench.intake.settled()
        assert bench.judged == [(POLICY, first), (POLICY, b"good")]
        assert bench.intake.alarms() == []
        running.cancel()

    asyncio.run(main())


def test_a_stop_does_not_wait_for_the_end_of_a_rest() -> None:
    async def main() -> None:
        bench = Bench()
        running = asyncio.create_task(bench.intake.run())
        bench.offer(POLICY, b"bad")
        await asyncio.wait_for(bench.resting.wait(), PATIENCE_S)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(running, PATIENCE_S)

    asyncio.run(main())


def test_nothing_rests_after_what_is_good() -> None:
    async def main() -> None:
        bench = Bench()
        running = asyncio.create_task(bench.intake.run())
        for topic in (POLICY, f"fleet/crl/{TRUSTED}"):
            bench.offer(topic, b"good")
        await bench.intake.settled()
        assert not bench.resting.is_set()
        running.cancel()

    asyncio.run(main())


def test_what_may_count_goes_before_what_strangers_sign() -> None:
    async def main() -> None:
        bench = Bench()
        topics = [f"fleet/crl/{STRANGE}", f"fleet/crl/{STRANGE}0", f"fleet/crl/{TRUSTED}", POLICY]
        for topic in topics:
            bench.offer(topic, b"good")
        running = asyncio.create_task(bench.intake.run())
        await bench.intake.settled()
        assert [topic for topic, _payload in bench.judged] == [*topics[2:], *topics[:2]]
        running.cancel()

    asyncio.run(main())


def test_what_is_taken_away_again_and_again_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        bench = Bench()
        for _ in range(MAX_LINES + 40):
            bench.offer(POLICY, b"")

    with caplog.at_level(logging.INFO):
        asyncio.run(main())
    assert len([line for line in caplog.messages if "was taken away" in line]) == MAX_LINES


def test_alarms_that_come_and_go_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    alarms = Alarms(lambda: 0.0)
    with caplog.at_level(logging.INFO):
        for number in range(MAX_LINES + 40):
            alarms.look([Alarm("fleet-policy-refused", f"refused: {number}", "look", logging.ERROR)])
            alarms.look([])
        assert len([line for line in caplog.messages if line.startswith("ALARM")]) == MAX_LINES
        assert len([line for line in caplog.messages if line.endswith("is over")]) == MAX_LINES
        alarms.look([Alarm("crl-due", "a CRL is due", "make one")])
    assert caplog.messages[-1].startswith("ALARM crl-due"), "one kind keeps another out"
