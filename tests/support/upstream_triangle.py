"""Two gateways linked to each other and both to one broker above: what goes round would go round for ever.

Messages are published one after the other, and each is read by everybody whom it reaches before the next one: a
copy that came a longer way round would stand between two of them, or be there in the end.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from support import mqtt_client as mqtt
from support.mqtt_client import RawClient, client_context
from support.mqtt_gateway import running_gateway
from support.ports import steady_port
from support.upstreams import (
    DOWN,
    POLICY,
    ROLE,
    SHARED,
    UP,
    upstream_toml,
    upstreams,
    wait_until_up,
    write_credentials,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from support.pki import Pki

GATEWAYS = ("gw-a", "gw-b")
ABOVE = "collector"
"""Who takes and publishes at the broker above."""
ROUNDS = 20


def check_triangle(folder: Path, pki: Pki, ports: Sequence[int]) -> None:
    """Everything published anywhere arrives wherever it should, once."""
    first, second = steady_port(), steady_port()
    with ExitStack() as stack:
        gateways = []
        for name, own, other in ((GATEWAYS[0], first, second), (GATEWAYS[1], second, first)):
            own_folder = folder / name
            write_credentials(own_folder, pki, name)
            beside = upstream_toml(name, other, name="peer", up=[*UP, *DOWN, *SHARED], down=[], down_shared=[])
            tables = (upstream_toml(name, *ports), beside)
            gateways.append(
                stack.enter_context(
                    running_gateway(
                        own_folder,
                        pki,
                        policy_toml=POLICY,
                        upstreams=upstreams(own_folder, *tables),
                        listen_port=own,
                    )
                )
            )
        for gateway in gateways:
            wait_until_up(gateway)
            wait_until_up(gateway, "peer")
        (folder / "root.pem").write_bytes(pki.root.pem)
        trusted = client_context(pki.device(ABOVE, ROLE).write(folder / f"{ABOVE}.pem"), folder / "root.pem")
        above = stack.enter_context(RawClient.connect(ports[-1], trusted))
        above.handshake(mqtt.connect(ABOVE)).subscribed(("devices/+/telemetry/#", 1))
        seeing = [gateway.client(f"op-{n}", "operator") for n, gateway in enumerate(gateways)]
        for client in seeing:
            client.subscribed(("devices/+/telemetry/#", 1))
        devices = [gateway.client(f"sensor-{n}") for n, gateway in enumerate(gateways)]
        for number, device in enumerate(devices):
            device.subscribed((f"devices/sensor-{number}/commands/#", 1), ("fleet/announcements/#", 1))
        for number in range(1, ROUNDS + 1):
            for who, device in enumerate(devices):
                published = (f"devices/sensor-{who}/telemetry/t", b"%d" % number)
                _publish(device, number, *published)
                for client in (above, *seeing):
                    assert _taken(client) == published
            for who, device in enumerate(devices):
                published = (f"devices/sensor-{who}/commands/from-above", b"%d" % number)
                _publish(above, number, *published)
                assert _taken(device) == published
                published = (f"devices/sensor-{1 - who}/commands/from-beside", b"%d" % number)
                _publish(seeing[who], number, *published)
                assert _taken(devices[1 - who]) == published
            published = ("fleet/announcements/tea", b"%d" % number)
            _publish(above, number, *published)
            for device in devices:
                assert _taken(device) == published
        for gateway in gateways:
            gateway.wait_for(
                lambda gateway=gateway: all(  # type: ignore[misc]
                    not upstream.spool.session.waiting_count for upstream in gateway.broker.upstreams
                ),
                "nothing waits to go up",
            )
        forwarded = [
            {link.name: link.spool.forwarded for link in gateway.broker.upstreams} for gateway in gateways
        ]
        assert forwarded == [{"cloud": ROUNDS, "peer": 2 * ROUNDS}] * 2, (
            "each link has taken what is its gateway's own"
        )
        for client in (above, *seeing, *devices):
            client.ping()


def _publish(client: RawClient, packet_id: int, topic: str, payload: bytes) -> None:
    client.send(mqtt.publish(topic, payload, qos=1, pid=packet_id))
    assert client.read() == mqtt.Packet(0x40, packet_id.to_bytes(2, "big"))


def _taken(client: RawClient) -> tuple[str, bytes]:
    message = client.read_delivery()
    client.send(mqtt.puback(message.packet_id))
    return message.topic, message.payload
