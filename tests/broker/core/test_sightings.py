"""What a gateway remembers of who connected: said when something is new, seldom otherwise, kept over a restart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from support import mqtt_client as mqtt
from support.mqtt_client import RawClient, client_context
from support.mqtt_process import BROKER_TOML, broker_process, write_files
from support.patience import PATIENCE_S
from support.pki import now

from birthmark.broker.peer import Peer
from birthmark.broker.sightings import (
    DAY_S,
    FORGOTTEN_AFTER_S,
    MAX_ADDRESSES,
    MAX_TOLD_AT_ONCE,
    MIN_INTERVAL_S,
    Sightings,
)
from birthmark.device.identity import BrokerName, DeviceId, Role
from birthmark.device.messages import AddressSeen, Sighting

if TYPE_CHECKING:
    from pathlib import Path

    from support.pki import Pki

NOW_S = 1_800_000_000.0


class Told:
    """Sightings whose messages are kept as a broker retains them."""

    def __init__(self) -> None:
        self.retained: dict[str, bytes] = {}
        self.count = 0
        self.sightings = Sightings(BrokerName("gw-1"), self._publish)

    def _publish(self, topic: str, payload: bytes) -> None:
        self.count += 1
        self.retained[topic] = payload

    def of(self, name: str = "sensor-1") -> Sighting:
        return Sighting.from_bytes(self.retained[f"gateway/gw-1/seen/{name}"])


def peer(name: str = "sensor-1", cert_serial: int = 0x5A) -> Peer:
    return Peer(DeviceId(name), Role("sensor"), False, "ab", cert_serial, now(), now())  # noqa: FBT003


def test_a_newcomer_is_told_of_at_once_and_then_once_a_day() -> None:
    told = Told()
    told.sightings.saw(peer(), "192.0.2.7:1000", NOW_S)
    assert told.count == 0, "said on the connection's own time"
    told.sightings.tell(NOW_S)
    first = Sighting("sensor-1", "5a", NOW_S, NOW_S, (AddressSeen("192.0.2.7", NOW_S, NOW_S),))
    assert told.of() == first
    for later_s in (1, MIN_INTERVAL_S, DAY_S - 1):
        told.sightings.saw(peer(), "192.0.2.7:2000", NOW_S + later_s)
        told.sightings.tell(NOW_S + later_s)
    assert told.count == 1
    told.sightings.saw(peer(), "192.0.2.7:3000", NOW_S + DAY_S)
    told.sightings.tell(NOW_S + DAY_S)
    assert told.count == 2
    assert (told.of().first_seen, told.of().last_seen) == (NOW_S, NOW_S + DAY_S)


def test_a_new_address_is_told_of_but_never_more_than_once_a_minute() -> None:
    told = Told()
    for turn in range(200):  # a copy and its original, throwing each other out
        at_s = NOW_S + turn
        told.sightings.saw(peer(), ("192.0.2.7:1", "[2001:db8::1]:1")[turn % 2], at_s)
        told.sightings.tell(at_s)
    assert told.count == 4
    assert {seen.address for seen in told.of().addresses} == {"192.0.2.7", "2001:db8::1"}
    one, other = sorted(told.of().addresses, key=lambda seen: seen.first_seen)
    assert one.first_seen < other.first_seen < one.last_seen, "the two do not show to be used by turns"


def test_addresses_are_bounded_and_those_of_the_certificate_in_use() -> None:
    told = Told()
    for host in range(50):
        told.sightings.saw(peer(), f"192.0.2.{host}:1", NOW_S)
    told.sightings.tell(NOW_S)
    last = [f"192.0.2.{host}" for host in range(50 - MAX_ADDRESSES, 50)]
    assert [seen.address for seen in told.of().addresses] == last
    told.sightings.saw(peer(cert_serial=0x5B), "192.0.2.49:1", NOW_S + 60)
    told.sightings.tell(NOW_S + 60)
    assert told.of().cert_serial == "5b"
    assert [seen.address for seen in told.of().addresses] == ["192.0.2.49"]


def test_a_crowd_is_told_of_by_and_by() -> None:
    told = Told()
    for number in range(MAX_TOLD_AT_ONCE + 1):
        told.sightings.saw(peer(f"sensor-{number}"), "192.0.2.7:1", NOW_S)
    told.sightings.tell(NOW_S)
    assert told.count == MAX_TOLD_AT_ONCE
    told.sightings.tell(NOW_S + 1)
    assert told.count == MAX_TOLD_AT_ONCE + 1


def test_what_was_said_is_taken_up_again_and_rubbish_is_not() -> None:
    told = Told()
    told.sightings.saw(peer(), "192.0.2.7:1", NOW_S)
    told.sightings.tell(NOW_S)
    again = Told()
    again.sightings.take_up([b"rubbish", *told.retained.values()])
    again.sightings.saw(peer(), "192.0.2.7:1", NOW_S + 100)
    again.sightings.tell(NOW_S + 100)
    assert again.count == 0, "a restart has everybody said again"
    again.sightings.saw(peer(), "192.0.2.8:1", NOW_S + 200)
    again.sightings.tell(NOW_S + 200)
    assert again.of().first_seen == NOW_S


def test_a_clock_that_went_back_silences_nobody() -> None:
    told = Told()
    told.sightings.saw(peer(), "192.0.2.7:1", NOW_S)
    told.sightings.tell(NOW_S)
    told.sightings.saw(peer(), "192.0.2.7:1", NOW_S - 10 * DAY_S)
    told.sightings.tell(NOW_S - 10 * DAY_S)
    assert told.count == 2


def test_a_stop_says_everything_and_the_long_gone_are_forgotten() -> None:
    told = Told()
    told.sightings.saw(peer(), "192.0.2.7:1", NOW_S)
    told.sightings.tell(NOW_S)
    told.sightings.saw(peer(), "192.0.2.8:1", NOW_S + 1)
    told.sightings.tell(NOW_S + 1, at_once=True)
    assert len(told.of().addresses) == 2
    assert told.sightings.forget(NOW_S + FORGOTTEN_AFTER_S) == 0
    assert told.sightings.forget(NOW_S + FORGOTTEN_AFTER_S + 2) == 1
    assert told.retained == {"gateway/gw-1/seen/sensor-1": b""}


def test_an_operator_reads_it_and_a_killed_gateway_still_knows(tmp_path: Path, pki: Pki) -> None:
    config = write_files(tmp_path, pki, broker_toml=BROKER_TOML)
    issued = pki.device("sensor-1", "device")
    device = client_context(issued.write(tmp_path / "sensor-1.pem"), tmp_path / "root.pem")
    operator = client_context(pki.operator().write(tmp_path / "alice.pem"), tmp_path / "root.pem")
    seen = "gateway/localhost/seen/sensor-1"
    with broker_process(config) as broker:
        with RawClient.connect(broker.port, operator) as alice, RawClient.connect(broker.port, device) as client:
            alice.handshake(mqtt.connect("alice")).subscribed((seen, 1))
            client.handshake(mqtt.connect("sensor-1"))
            told = Sighting.from_bytes(alice.read_delivery().payload)
            # Its acknowledgement comes when this, and all that was retained before, is on disk.
            alice.send(mqtt.publish("devices/sensor-2/commands/x", b"1", qos=1, retain=True, pid=9))
            assert alice.read() == mqtt.Packet(0x40, b"\0\x09")
        assert (told.id, told.cert_serial) == ("sensor-1", f"{issued.cert_serial:x}")
        assert [place.address for place in told.addresses] == ["127.0.0.1"]
        broker.process.kill()
        broker.process.wait(PATIENCE_S)
    with broker_process(config) as broker:
        with RawClient.connect(broker.port, operator) as alice:
            alice.handshake(mqtt.connect("alice")).subscribed((seen, 1))
            assert Sighting.from_bytes(alice.read_delivery().payload) == told
        with RawClient.connect(broker.port, device) as client:
            client.handshake(mqtt.connect("sensor-1"))
        broker.process.terminate()  # says all that is new, and this is not: it goes on from what it knew
        broker.process.wait(PATIENCE_S)
    with broker_process(config) as broker, RawClient.connect(broker.port, operator) as alice:
        alice.handshake(mqtt.connect("alice")).subscribed((seen, 1))
        assert Sighting.from_bytes(alice.read_delivery().payload) == told
