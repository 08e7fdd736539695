"""A gateway as it runs tells the time to the device that asks, and nobody else hears of it."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from support import mqtt_client as mqtt
from support.mqtt_world import ProcessWorld, process_world
from support.pki import Pki
from support.repository import ROOT

from birthmark.broker.peer import check_peer
from birthmark.broker.time_answers import TimeAnswers
from birthmark.broker.trust import Trust
from birthmark.device.messages import TimeAnswer, TimeRequest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REQUEST, ANSWER = "devices/sensor-1/time/request", "devices/sensor-1/time/answer"
NONCE = bytes(range(16))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessWorld]:
    folder: Path = tmp_path_factory.mktemp("time")
    policy_toml = (ROOT / "broker" / "policy.default.toml").read_bytes()
    with process_world(folder, Pki.create(), policy_toml=policy_toml) as world:
        yield world


def test_it_answers_the_device_itself_and_keeps_nothing(world: ProcessWorld) -> None:
    device = world.client().subscribed((ANSWER, 1))
    operator = world.operator("alice", ("devices/#", 1))
    before = time.time()
    for qos in (0, 1):
        device.send(mqtt.publish(REQUEST, TimeRequest(NONCE).to_bytes(), qos=qos, pid=7, retain=True))
        found = device.read_delivery()
        assert (found.topic, found.qos, found.retain) == (ANSWER, 0, False)
        answer = TimeAnswer.from_bytes(found.payload)
        assert answer.nonce == NONCE
        assert before - 0.001 <= answer.time <= time.time()
    # An operator may listen to all of a device's topics, and sees answers that it has no use for; but no request.
    for _ in range(2):
        assert operator.read_delivery().topic == ANSWER
    late = world.operator("bob", ("devices/#", 1))
    late.ping()


def test_what_is_no_request_gets_no_answer(world: ProcessWorld) -> None:
    device = world.client("sensor-2").subscribed(("devices/sensor-2/time/answer", 1))
    for payload in (b"", b"{}", b'{"nonce": "00"}', b"\xff", b"[" * 10_000):
        device.send(mqtt.publish("devices/sensor-2/time/request", payload))
    device.ping()


def test_nobody_asks_for_another(world: ProcessWorld) -> None:
    device = world.client("sensor-3").subscribed(("devices/sensor-3/time/answer", 1))
    device.send(mqtt.publish(REQUEST, TimeRequest(NONCE).to_bytes()))
    device.ping()


def test_nor_does_one_that_a_policy_lets_publish_there(world: ProcessWorld) -> None:
    told: list[tuple[str, bytes]] = []
    answers = TimeAnswers(lambda topic, payload: told.append((topic, payload)), lambda: 5.5)
    peer = check_peer(world.pki.device("sensor-3").der, Trust.from_pem(world.pki.issuing.pem), datetime.now(UTC))
    answers.asked(REQUEST, TimeRequest(NONCE).to_bytes(), peer)
    assert told == []
    answers.asked("devices/sensor-3/time/request", TimeRequest(NONCE).to_bytes(), peer)
    assert told == [("devices/sensor-3/time/answer", TimeAnswer(NONCE, 5.5).to_bytes())]
