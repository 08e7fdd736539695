"""A gateway below a Mosquitto: faults under load, presence, and what the docs tell an operator to set there."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from support import mqtt_client as mqtt
from support.mosquitto import Mosquitto, mosquitto
from support.mqtt_client import RawClient, client_context
from support.mqtt_gateway import running_gateway
from support.upstream_load import COLLECTOR, COMMANDER, GATEWAY, PREFIX, Loaded
from support.upstream_triangle import ABOVE, GATEWAYS, check_triangle
from support.upstreams import POLICY, upstream_toml, upstreams, wait_until_up, write_credentials

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.pki import Pki

ACL = f"""\
pattern readwrite sites/%u/#
user {COLLECTOR}
topic read {PREFIX}#
user {COMMANDER}
topic write {PREFIX}#
"""

ROUNDS = 10 if os.environ.get("BIRTHMARK_PROOF") == "whole" else 1


@pytest.fixture
def engine(tmp_path: Path, pki: Pki) -> Iterator[Mosquitto]:
    with mosquitto(tmp_path / "mosquitto", pki, ACL) as running:
        yield running


@pytest.mark.proof
def test_nothing_acknowledged_is_lost_whatever_breaks(
    engine: Mosquitto, tmp_path: Path, pki: Pki, proven: Callable[[str], None]
) -> None:
    with Loaded(tmp_path / GATEWAY, pki, [engine.port]) as load:
        for _ in range(ROUNDS):
            load.both_ways(50)
            load.cut_link()
            load.both_ways(50)
            load.kill_gateway()
            load.both_ways(50)
            engine.stop()
            engine.start()
        load.both_ways(50)
        load.see_through()
    proven(f"{ROUNDS} rounds of link cut, gateway killed and Mosquitto stopped: {load.counted}")


def test_presence_is_right_above_and_comes_again_to_one_that_forgot(
    engine: Mosquitto, tmp_path: Path, pki: Pki
) -> None:
    folder = tmp_path / GATEWAY
    write_credentials(folder, pki, GATEWAY)
    tables = upstreams(folder, upstream_toml(GATEWAY, engine.port, prefix=PREFIX, down_shared=[]))
    (tmp_path / "root.pem").write_bytes(pki.root.pem)
    trusted = client_context(pki.device(COLLECTOR).write(tmp_path / "collector.pem"), tmp_path / "root.pem")

    def seen(topic_filter: str) -> RawClient:
        return (
            RawClient.connect(engine.port, trusted)
            .handshake(mqtt.connect(COLLECTOR))
            .subscribed((topic_filter, 1))
        )

    status = f"{PREFIX}devices/sensor-1/status"
    with running_gateway(folder, pki, policy_toml=POLICY, upstreams=tables) as gateway:
        wait_until_up(gateway)
        with seen(status) as live:
            will = ("devices/sensor-1/status", b"offline", 1, True)
            device = gateway.client("sensor-1", will=will)
            device.send(mqtt.publish(will[0], b"online", qos=1, retain=True, pid=1))
            assert _taken(live) == (b"online", False)
            device.close()
            assert _taken(live) == (b"offline", False)
        with seen(status) as late:
            assert _taken(late) == (b"offline", True)
        engine.kill()
        engine.start()
        with seen(status) as again:
            # It comes with the link, as retained if that was there first.
            assert _taken(again)[0] == b"offline"
            gateway.client("sensor-1").send(
                mqtt.publish("devices/sensor-1/status", b"", qos=1, retain=True, pid=1)
            )
            assert _taken(again) == (b"", False)
        with seen(status) as late:
            late.ping()


def _taken(client: RawClient) -> tuple[bytes, bool]:
    message = client.read_delivery()
    client.send(mqtt.puback(message.packet_id))
    return message.payload, message.retain


def test_two_gateways_and_it_in_a_triangle_pass_each_message_on_once(tmp_path: Path, pki: Pki) -> None:
    acl = "".join(f"user {name}\ntopic readwrite #\n" for name in (*GATEWAYS, ABOVE))
    with mosquitto(tmp_path / "mosquitto", pki, acl) as engine:
        check_triangle(tmp_path, pki, [engine.port])
