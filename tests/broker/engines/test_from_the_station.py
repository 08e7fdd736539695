"""From a station to another engine, by the commands that a person would type: enrolled, exported, revoked.

The boards are simulated, with the device's own agent and client; Mosquitto is the real one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support import mqtt_client as mqtt
from support.engine_bench import Bench
from support.engines import mosquitto_process
from support.programs import needs
from support.simulator import Simulator

if TYPE_CHECKING:
    from pathlib import Path

FOREIGN, OWN = "devices/sensor-1/telemetry/hoax", "devices/sensor-2/telemetry/own"


@needs("mosquitto")
@pytest.mark.proof
@pytest.mark.timeout(600)
def test_devices_of_a_station_live_on_mosquitto_until_they_are_revoked(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    made(bench)
    exported(bench)
    with mosquitto_process(bench.gateway, bench.exported) as mosquitto:
        with Simulator(bench.boards, "--online", "--interval", "0.2") as boards:
            assert boards.next("online")["id"] == "sensor-1"
            with bench.client("alice") as alice:
                alice.subscribed(("devices/#", 1))
                heard = {alice.read_delivery().topic for _ in range(2)}
                assert heard == {"devices/sensor-1/status", "devices/sensor-1/telemetry/temperature"}
        with bench.client("alice") as alice, bench.client("sensor-2") as device:
            alice.subscribed(("devices/+/telemetry/#", 0))
            device.send(mqtt.publish(FOREIGN, b"I am sensor-1") + mqtt.publish(OWN, b"1"))
            # One after the other on one connection: what is not delivered before this was not let through.
            assert alice.read_delivery().topic == OWN

        pending = bench.run("birthmark", "revoke", "sensor-1", "--reason", "lost", "--timeout", "1", code=1)
        assert [one["outcome"] for one in pending[-1]["gateways"]] == ["PENDING"], "Mosquitto gives no receipt"
        assert bench.lets_in("sensor-1"), "it goes by what it has read, until it is told to read again"
        bench.identities()
        mosquitto.reload()

        assert not bench.lets_in("sensor-1")
        assert bench.lets_in("sensor-2")
        with Simulator(bench.boards, "--online") as boards:
            assert boards.next("attempt_failed")["check"] == "revoked"
    acl = (bench.exported / "acl").read_text()
    assert "CN=sensor-2," in acl
    assert "CN=sensor-1," not in acl


def made(bench: Bench) -> None:
    """Found a station, enrol two boards, and give a gateway its files and an operator hers."""
    bench.run("birthmark", "init", "--organization", "Acme")
    with Simulator(bench.boards, "--count", "2") as boards:
        ports = [word for _ in range(2) for word in ("--port", boards.next("ready")["link"])]
        broker = ("--broker", f"localhost:{bench.port}")
        # By their names: board 1 is to be sensor-1.
        for number, port in enumerate(sorted(ports[1::2]), start=1):
            bench.run("birthmark", "flash", "--port", port, "--id", f"sensor-{number}", *broker)
    bench.gateway_files()
    bench.run("birthmark", "gateway", "add", "localhost", "--path", bench.gateway / "crl.pem")
    bench.identities()


def exported(bench: Bench) -> None:
    """Export what `birthmark-broker init` wrote: refused first, with everything that is to be decided."""
    refused = bench.export(code=1)
    assert not bench.exported.exists()
    in_the_policy = [record["reason"] for record in refused if record["refused"] == "policy"]
    assert len(in_the_policy) == bench.without_what_is_not_there() == 2, in_the_policy
    (record,) = bench.export(*{record["refused"] for record in refused} - {"policy"})
    assert record["identities"] == 3
