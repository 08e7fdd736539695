"""amqtt's own side: plug-ins, their events and their view of the broker, `$SYS`, and the paths that are closed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from amqtt.adapters import BufferReader
from amqtt.errors import BrokerError
from support import mqtt_client as mqtt
from support.mqtt_gateway import running_gateway
from support.mqtt_plugin import Recorder
from support.patience import PATIENCE_S

from birthmark.broker.server import DEFAULT_PLUGINS

if TYPE_CHECKING:
    from pathlib import Path

    from support.mqtt_gateway import RunningGateway
    from support.pki import Pki

RECORDER: dict[str, dict[str, Any]] = {"support.mqtt_plugin.Recorder": {}}


def test_a_plugin_is_told_and_sees_the_broker(tmp_path: Path, pki: Pki) -> None:
    with running_gateway(tmp_path, pki, plugins=RECORDER) as gateway:
        device = gateway.client("free-1", clean=False).subscribed(("a/#", 1))
        device.send(mqtt.publish("a/b", b"x", qos=1, retain=True, pid=1))
        assert {device.read().first, device.read().first} == {0x40, 0x32}
        context = Recorder.contexts[0]
        assert [s.client_id for s in gateway.call(lambda: list(context.sessions))] == ["free-1"]
        session = gateway.call(context.get_session, "free-1")
        assert session is not None
        assert session.inflight_out_count == 1
        assert gateway.call(context.get_session, "free-2") is None
        assert gateway.call(lambda: {f: [q for _, q in subs] for f, subs in context.subscriptions.items()}) == {
            "a/#": [1]
        }
        assert gateway.call(lambda: context.retained_messages["a/b"].data) == b"x"
        device.send(mqtt.publish("b", b"1") + mqtt.publish("b", b"2"))
        device.send(mqtt.unsubscribe(2, "a/#") + mqtt.DISCONNECT)
        device.read_end()
        gateway.wait_for(lambda: ("disconnected", "free-1") in Recorder.events, "it is told of the end")
    assert Recorder.events == [
        ("started", None),
        ("connected", "free-1"),
        ("subscribed", ("free-1", "a/#", 1)),
        ("message", ("free-1", "a/b", b"x", 1)),
        ("message", ("free-1", "b", b"1", 0)),
        ("message", ("free-1", "b", b"2", 0)),
        ("unsubscribed", ("free-1", "a/#")),
        ("disconnected", "free-1"),
        ("stopped", None),
    ]


def test_sys_topics_go_to_whom_the_policy_allows(tmp_path: Path, pki: Pki) -> None:
    (name,) = DEFAULT_PLUGINS
    with running_gateway(tmp_path, pki, plugins={name: {"sys_interval": 1}}) as gateway:
        operator = gateway.client("alice", "operator").subscribed(("$SYS/#", 0))
        version = operator.read_delivery()
        assert (version.topic, version.retain) == ("$SYS/broker/version", True)
        seen: dict[str, bytes] = {}
        while "$SYS/broker/messages/subscriptions/count" not in seen:
            message = operator.read_delivery()
            seen[message.topic] = message.payload
        assert seen["$SYS/broker/messages/subscriptions/count"] == b"1"
        assert seen["$SYS/broker/clients/connected"] == b"1"
        device = gateway.client("sensor-1")
        device.send(mqtt.subscribe(1, ("$SYS/#", 0)))
        assert device.read() == mqtt.suback(1, 0x80)


def test_amqtts_own_ways_in_are_closed(gateway: RunningGateway) -> None:
    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, gateway.loop).result(PATIENCE_S)

    with pytest.raises(BrokerError):
        run(gateway.broker._client_connected("default", BufferReader(mqtt.connect("x")), None))
    with pytest.raises(BrokerError):
        run(gateway.broker.add_subscription(("#", 0), None))
    with pytest.raises(BrokerError):
        gateway.broker.create_offline_session("sensor-1")
    assert gateway.broker._sessions == {}


def test_a_broker_may_start_again_after_a_stop(tmp_path: Path, pki: Pki) -> None:
    with running_gateway(tmp_path, pki) as gateway:
        gateway.client("sensor-1", clean=False).subscribed(("devices/sensor-1/commands/#", 1))

        async def again() -> int:
            await gateway.broker.shutdown()
            await gateway.broker.start()
            return gateway.broker.addresses[0][1]

        gateway.port = asyncio.run_coroutine_threadsafe(again(), gateway.loop).result(PATIENCE_S)
        gateway.client("sensor-1", clean=False, present=True).ping()
