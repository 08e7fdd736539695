"""What can be wrong with an upstream: each is said, stands as an alarm while it lasts, and stops nothing here."""

from __future__ import annotations

import datetime as dt
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from support import mqtt_client as mqtt
from support.loopback_proxy import LoopbackProxy
from support.mqtt_gateway import POLICY_TOML, RunningGateway, policy, running_gateway
from support.patience import PATIENCE_S
from support.pki import now
from support.upstreams import (
    ACCEPTED,
    POLICY,
    ROLE,
    linked,
    publish,
    said,
    speaking,
    upstream_of,
    upstream_toml,
    upstreams,
    wait_until_up,
    write_credentials,
)

from birthmark.broker import packets
from birthmark.broker.config import Limits
from birthmark.broker.packet_reader import PacketReader
from birthmark.broker.packets import Connect, PingReq, Publish, PublishRun, Subscribe, Will
from birthmark.broker.retained import Retained
from birthmark.broker.upstream.upstream import FIRST_WAIT_S
from birthmark.device.errors import ConfigurationError, UnreachableError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable
    from pathlib import Path

    from support.pki import Pki

    from birthmark.broker.alarms import Alarm
    from birthmark.broker.policy import Policy
    from birthmark.broker.upstream.upstream import Upstream

TOPIC = "devices/sensor-1/telemetry/t"


def codes(gateway: RunningGateway) -> list[str]:
    return [alarm.code for alarm in gateway.broker.upstreams.alarms(dt.datetime.now(dt.UTC))]


def wait_until_down(gateway: RunningGateway, words: str) -> Upstream:
    """Wait for an alarm that gives a reason; devices are served meanwhile."""
    upstream = upstream_of(gateway)
    gateway.wait_for(lambda: bool(upstream.reason), "a reason")
    assert words in upstream.reason
    assert "upstream-down" in codes(gateway)
    publish(gateway.client(), TOPIC, b"kept")
    assert upstream.spool.session.waiting_count == 1
    return upstream


def test_a_foreign_upstream_is_never_connected_to(above: RunningGateway, tmp_path: Path, pki: Pki) -> None:
    values = linked(tmp_path, pki, above.port)
    write_credentials(tmp_path, pki, "gw-1", trust=pki.stranger.pem)
    with running_gateway(tmp_path, pki, **values) as gateway:
        wait_until_down(gateway, "is not from a CA that this identity trusts")
        assert above.broker.counters.clients_connected == 0


def test_an_upstream_of_another_name_is_never_connected_to(tmp_path: Path, pki: Pki) -> None:
    heard: list[bytes] = []
    with (
        speaking(tmp_path, pki, lambda secured: heard.append(secured.recv(1)), "elsewhere.example.com") as port,
        running_gateway(tmp_path, pki, **linked(tmp_path, pki, port)) as gateway,
    ):
        wait_until_down(gateway, "the broker's certificate is not for 127.0.0.1")
    assert not any(heard), "it was spoken to"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda pki: pki.stranger.device("gw-1", ROLE), "does not know the CA of our certificate"),
        (lambda pki: pki.device("gw-2", ROLE), "does not accept our client id"),
        (
            lambda pki: pki.issuing.issue(cns=["gw-1"], ous=[ROLE], usages=None),
            "saw our certificate and does not let us in",
        ),
        (
            lambda pki: pki.issuing.issue(
                cns=["gw-1"], ous=[ROLE], not_before=now() - dt.timedelta(9), not_after=now() - dt.timedelta(1)
            ),
            "it is expired",
        ),
    ],
    ids=["unknown CA", "another identity", "not a client's", "expired"],
)
def test_who_is_refused_says_why_and_serves_its_devices(
    above: RunningGateway, tmp_path: Path, pki: Pki, change: Callable[[Pki], Any], words: str
) -> None:
    values = linked(tmp_path, pki, above.port, client_id="gw-1")
    write_credentials(tmp_path, pki, "gw-1", issued=change(pki))
    with running_gateway(tmp_path, pki, **values) as gateway:
        upstream = wait_until_down(gateway, "127.0.0.1")
        if words != "it is expired":
            assert words in upstream.reason
        else:
            assert "certificate" in upstream.reason
            assert "upstream-certificate-due" in codes(gateway)
        # The right certificate is taken up without a restart, and at once.
        operator = above.client("alice", "operator").subscribed(("devices/#", 1))
        write_credentials(tmp_path, pki, "gw-1")
        gateway.call(gateway.broker.upstreams.reload, upstream.settings.name)
        assert said(operator, 1) == [(TOPIC, b"kept", 1, False)]
        assert codes(gateway) == []


def test_new_credentials_that_cannot_be_used_change_nothing(
    above: RunningGateway, tmp_path: Path, pki: Pki
) -> None:
    with running_gateway(tmp_path, pki, **linked(tmp_path, pki, above.port)) as gateway:
        upstream = wait_until_up(gateway)
        link = upstream.link
        (tmp_path / "gw-1.pem").write_bytes(pki.device("gw-1", ROLE).pem.replace(b"PRIVATE KEY", b"PRIVATE"))
        with pytest.raises(ConfigurationError, match=r"could not use .*gw-1\.pem for the upstream cloud"):
            gateway.call(gateway.broker.upstreams.reload, upstream.settings.name)
        assert upstream.link is link
        assert above.broker.counters.clients_connected == 1


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "gw-1.pem").unlink(), "No such file"),
        (lambda folder: (folder / "gw-1.pem").chmod(0o640), "others than its owner may read the key"),
        (lambda folder: (folder / "gw-1.pem").write_text("nothing"), "no PEM of the kind expected"),
        (lambda folder: (folder / "gw-1-ca.pem").write_text("nothing"), "no PEM of the kind expected"),
        (lambda folder: (folder / "gw-1-ca.pem").unlink(), "No such file"),
    ],
)
def test_without_usable_files_it_does_not_start(
    tmp_path: Path, pki: Pki, spoil: Callable[[Path], Any], words: str
) -> None:
    values = linked(tmp_path, pki, 1)
    spoil(tmp_path)
    with (
        pytest.raises(ConfigurationError, match="for the upstream cloud") as caught,
        running_gateway(tmp_path, pki, **values),
    ):
        pass
    assert words in caught.value.message


def test_a_filter_that_is_not_granted_is_an_alarm_and_the_rest_works(
    above: RunningGateway, tmp_path: Path, pki: Pki
) -> None:
    above.call(above.broker.set_policy, policy_of(subscribe='["devices/+/commands/#"]'))
    operator = above.client("alice", "operator")
    with running_gateway(tmp_path, pki, **linked(tmp_path, pki, above.port)) as gateway:
        upstream = wait_until_up(gateway)
        assert upstream.link is not None
        assert upstream.link.refused == ("fleet/announcements/#",)
        assert codes(gateway) == ["upstream-refuses"]
        device = gateway.client().subscribed(("devices/sensor-1/commands/#", 1))
        publish(operator, "devices/sensor-1/commands/a", b"x")
        assert said(device, 1) == [("devices/sensor-1/commands/a", b"x", 1, False)]


def policy_of(*, subscribe: str = '["#"]') -> Policy:
    rights = f"\n[roles.service-gateway]\npublish = ['#']\nsubscribe = {subscribe}\n"
    assigned = '\n[[assignments]]\nou = "service-gateway"\nrole = "service-gateway"\n'
    return policy(POLICY_TOML + (rights + assigned).encode())


def test_a_message_that_ends_every_connection_is_set_aside_and_the_others_arrive(
    tmp_path: Path, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "above"
    folder.mkdir()
    with (
        running_gateway(folder, pki, policy_toml=POLICY, limits=Limits(max_packet_bytes=2_000)) as above,
        LoopbackProxy(1) as proxy,
        running_gateway(tmp_path, pki, **linked(tmp_path, pki, proxy.port)) as gateway,
    ):
        operator = above.client("alice", "operator").subscribed(("devices/#", 1))
        device = gateway.client()
        payloads = [b"1", b"2", b"x" * 3_000, b"3", b"y" * 3_000, b"4"]
        for number, payload in enumerate(payloads, start=1):
            publish(device, TOPIC, payload, pid=number)
        proxy.target_port = above.port
        arrived = [payload for _, payload, _, _ in said(operator, 4)]
        # The first two were sent more than once before it was known over which message the connections end.
        while b"4" not in arrived:
            arrived += [payload for _, payload, _, _ in said(operator, 1)]
        assert list(dict.fromkeys(arrived)) == [b"1", b"2", b"3", b"4"]
        upstream = upstream_of(gateway)
        gateway.wait_for(lambda: not upstream.spool.session.waiting_count, "acknowledged")
        assert gateway.broker.counters.upstream_refused == upstream.spool.dropped == 2
        assert codes(gateway) == ["upstream-refused-message"]
        assert f"over a message on {TOPIC} of 3000 bytes: dropped" in caplog.text
        (alarm,) = gateway.call(upstream.alarms, now())
        assert f"2 messages were dropped, the last on {TOPIC} of 3000 bytes" in alarm.message
        assert not upstream.spool.is_careful
        gateway.call(upstream.reload)
        assert "upstream-refused-message" not in codes(gateway)


def test_what_the_other_end_would_not_take_can_be_kept_from_it(
    above: RunningGateway, tmp_path: Path, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    operator = above.client("alice", "operator").subscribed(("devices/#", 1))
    values = linked(tmp_path, pki, above.port, max_topic_bytes=len(TOPIC), max_payload_bytes=16)
    with running_gateway(tmp_path, pki, **values) as gateway:
        upstream = wait_until_up(gateway)
        device = gateway.client()
        publish(device, f"{TOPIC}t", b"1")
        publish(device, TOPIC, b"x" * 17)
        publish(device, TOPIC, b"x" * 16)
        assert said(operator, 1) == [(TOPIC, b"x" * 16, 1, False)]
        assert upstream.spool.dropped == 1
        assert f"dropping messages for cloud: more than max_topic_bytes (now on {TOPIC}t)" in caplog.text
        assert "dropping messages for cloud: more than max_payload_bytes" in caplog.text


def test_only_a_connection_that_the_upstream_ended_speaks_against_a_message(tmp_path: Path, pki: Pki) -> None:
    with running_gateway(tmp_path, pki, **linked(tmp_path, pki, 1, longest_wait_s=30)) as gateway:
        upstream = upstream_of(gateway)
        publish(gateway.client(), TOPIC, b"1")
        spool = upstream.spool

        def judge(count: int, **facts: bool) -> int:
            link = cast(Any, SimpleNamespace(**facts))
            for _ in range(count):
                upstream._look_for_stumbling(link)
            return spool.dropped

        def send() -> None:
            spool.session.inflight[1] = spool.session.queue.popleft()
            spool.be_careful(careful=True)

        def set_aside_after_long_waits() -> tuple[float, float]:
            lost = UnreachableError("lost")
            waits_s = [upstream._retry.wait_s(lost) for _ in range(9)]
            judge(1, has_settled=True, was_closed=True, has_survived=False)
            return waits_s[-1], upstream._retry.wait_s(lost)

        gateway.call(send)
        assert gateway.call(judge, 9, has_settled=True, was_closed=False, has_survived=False) == 0
        assert gateway.call(judge, 9, has_settled=False, was_closed=True, has_survived=False) == 0
        assert gateway.call(judge, 9, has_settled=True, was_closed=True, has_survived=True) == 0
        assert gateway.call(judge, 2, has_settled=True, was_closed=True, has_survived=False) == 0
        long_s, wait_s = gateway.call(set_aside_after_long_waits)
        assert spool.dropped == 1
        assert wait_s <= FIRST_WAIT_S < long_s, "the next one is looked for at once"


def test_an_upstream_that_acknowledges_nothing_costs_no_message(tmp_path: Path, pki: Pki) -> None:
    """A queue without its majority: pings are answered, messages are not, and at some time the connection ends."""
    ended = 0

    def talk(secured: ssl.SSLSocket) -> None:
        nonlocal ended
        reader, has_come = PacketReader(1_000_000), False
        while data := secured.recv(16_384):
            for packet in reader.feed(data):
                has_come |= isinstance(packet, Publish | PublishRun)
                if isinstance(packet, Connect):
                    secured.sendall(ACCEPTED)
                elif isinstance(packet, Subscribe):
                    secured.sendall(packets.suback(packet.packet_id, bytes(1 for _ in packet.filters)))
                elif isinstance(packet, PingReq):
                    secured.sendall(packets.PINGRESP)
                    if has_come:
                        ended += 1
                        return

    with (
        speaking(tmp_path, pki, talk) as port,
        running_gateway(tmp_path, pki, **linked(tmp_path, pki, port, keepalive_s=1)) as gateway,
    ):
        upstream = wait_until_up(gateway)
        publish(gateway.client(), TOPIC, b"1")
        publish(gateway.client(), TOPIC, b"2")
        gateway.wait_for(lambda: ended > 8, "many connections in vain")
        spool = upstream.spool
        assert spool.is_careful
        assert (spool.session.waiting_count, spool.dropped) == (2, 0)
        found: list[Alarm] = []  # it comes and goes: between two looks, the link may be up again

        def is_down() -> bool:
            found[:] = [each for each in upstream.alarms(now()) if each.code == "upstream-down"]
            return bool(found)

        gateway.wait_for(is_down, "an alarm")
        (alarm,) = found
        assert "each time before it took what was sent: one message alone is tried at a time" in alarm.message


def test_an_upstream_that_only_accepts_and_closes_costs_no_message(tmp_path: Path, pki: Pki) -> None:
    connections = 0

    def talk(secured: ssl.SSLSocket) -> None:
        nonlocal connections
        connections += 1
        secured.recv(4_096)
        secured.sendall(ACCEPTED)
        secured.recv(4_096)

    with (
        speaking(tmp_path, pki, talk) as port,
        running_gateway(tmp_path, pki, **linked(tmp_path, pki, port)) as gateway,
    ):
        upstream = wait_until_down(gateway, "the broker closed it")
        gateway.wait_for(lambda: connections > 12, "many connections in vain")
        assert upstream.spool.session.waiting_count == 1
        assert "it may not allow one of them" in upstream.alarms(now())[0].message


def test_a_link_that_fell_silent_is_given_up_and_made_anew(
    above: RunningGateway, tmp_path: Path, pki: Pki
) -> None:
    operator = above.client("alice", "operator").subscribed(("devices/#", 1))
    with LoopbackProxy(above.port) as proxy:
        values = linked(tmp_path, pki, proxy.port, keepalive_s=1)
        with running_gateway(tmp_path, pki, **values) as gateway:
            wait_until_up(gateway)
            proxy.stalls = True
            publish(gateway.client(), TOPIC, b"into the void")
            gateway.wait_for(lambda: gateway.broker.counters.upstream_lost >= 1, "the silence is noticed")
            proxy.stalls = False
            proxy.cut_all()  # an attempt that began in the silence would wait for its whole time-out
            wait_until_up(gateway)
            assert said(operator, 1) == [(TOPIC, b"into the void", 1, False)]


@pytest.mark.parametrize("topic", [b"devices/+/commands/a", b"devices/#", b"", b"devices/\xff", b"a\0b"])
def test_a_message_on_what_is_no_topic_is_acknowledged_and_dropped(
    tmp_path: Path, pki: Pki, topic: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    acknowledged = threading.Event()

    def talk(secured: ssl.SSLSocket) -> None:
        secured.recv(4_096)
        secured.sendall(ACCEPTED + mqtt.packet(0x32, len(topic).to_bytes(2, "big") + topic + b"\x00\x07x"))
        heard = b""
        while data := secured.recv(4_096):
            heard += data
            if b"\x40\x02\x00\x07" in heard:
                acknowledged.set()

    with (
        speaking(tmp_path, pki, talk) as port,
        running_gateway(tmp_path, pki, **linked(tmp_path, pki, port)) as gateway,
    ):
        assert acknowledged.wait(PATIENCE_S)
        gateway.wait_for(lambda: gateway.broker.counters.upstream_echoes == 1, "counted")
        assert gateway.broker.counters.upstream_lost == 0
        assert "on a topic that MQTT does not allow" in caplog.text


def test_a_message_that_is_too_long_for_us_does_not_come_again_for_ever(
    above: RunningGateway, tmp_path: Path, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    values = linked(tmp_path, pki, above.port) | {"limits": Limits(max_packet_bytes=2_000)}
    with running_gateway(tmp_path, pki, **values) as gateway:
        wait_until_up(gateway)
        operator = above.client("alice", "operator").subscribed(("devices/+/telemetry/#", 1))
        device = gateway.client().subscribed(("devices/sensor-1/commands/#", 1))
        publish(operator, "devices/sensor-1/commands/firmware", b"x" * 3_000)
        publish(operator, "devices/sensor-1/commands/reboot", b"now", pid=2)
        assert said(device, 1) == [("devices/sensor-1/commands/reboot", b"now", 1, False)]
        publish(device, TOPIC, b"21")
        assert said(operator, 1) == [(TOPIC, b"21", 1, False)]
        counters = gateway.broker.counters
        assert (counters.upstream_too_long, counters.upstream_lost) == (1, 0)
        link_session = next(one for one in above.broker.exchange.sessions if one.client_id == "gw-1")
        above.wait_for(lambda: not link_session.waiting_count, "acknowledged")
        assert "on devices/sensor-1/commands/firmware: 30" in caplog.text


def test_pings_keep_a_link_and_silence_ends_it(tmp_path: Path, pki: Pki) -> None:
    pings = 0

    def talk(secured: ssl.SSLSocket) -> None:
        nonlocal pings
        secured.recv(4_096)
        secured.sendall(ACCEPTED)
        while data := secured.recv(4_096):
            pings += data.count(mqtt.PINGREQ)
            if pings < 8:
                secured.sendall(b"\xd0\x00")

    with (
        speaking(tmp_path, pki, talk) as port,
        running_gateway(tmp_path, pki, **linked(tmp_path, pki, port, keepalive_s=1)) as gateway,
    ):
        upstream = wait_until_down(gateway, "nothing was heard for 2 s")
        assert pings >= 8, "it was ended before"
        assert upstream.spool.forwarded == 0


def test_an_upstream_that_forgot_us_gets_everything_again(
    above: RunningGateway, tmp_path: Path, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    with running_gateway(tmp_path, pki, **linked(tmp_path, pki, above.port)) as gateway:
        upstream = wait_until_up(gateway)
        device = gateway.client().subscribed(("devices/sensor-1/commands/#", 1))
        publish(device, "devices/sensor-1/status", b"online", retain=True)
        gateway.wait_for(lambda: not upstream.spool.session.waiting_count, "acknowledged")

        def forget() -> None:
            session = above.broker.exchange.sessions.get("gw-1")
            assert session is not None
            assert session.connection is not None
            above.broker.exchange.retain(Retained("devices/sensor-1/status", b"", 0, None))
            session.connection.cut(with_will=False)
            above.broker.exchange.forget(session)

        above.call(forget)
        gateway.wait_for(lambda: "has forgotten our session" in caplog.text, "it is said")
        wait_until_up(gateway)
        operator = above.client("alice", "operator")
        publish(operator, "devices/sensor-1/commands/a", b"x")
        assert said(device, 1) == [("devices/sensor-1/commands/a", b"x", 1, False)]
        gateway.wait_for(lambda: not upstream.spool.session.waiting_count, "acknowledged")
        operator.subscribed(("devices/+/status", 1))
        assert said(operator, 1) == [("devices/sensor-1/status", b"online", 1, True)]


def test_filters_that_are_taken_out_are_not_subscribed_to_any_more(
    above: RunningGateway, tmp_path: Path, pki: Pki
) -> None:
    with running_gateway(tmp_path, pki, **linked(tmp_path, pki, above.port)) as gateway:
        wait_until_up(gateway)
    session = above.broker.exchange.sessions.get("gw-1")
    assert session is not None
    assert set(session.subscriptions) == {"devices/+/commands/#", "fleet/announcements/#"}
    with running_gateway(tmp_path, pki, **linked(tmp_path, pki, above.port, down_shared=[])) as gateway:
        wait_until_up(gateway)
        above.wait_for(lambda: set(session.subscriptions) == {"devices/+/commands/#"}, "unsubscribed")


def test_the_next_server_is_tried_at_once_and_stayed_with(above: RunningGateway, tmp_path: Path, pki: Pki) -> None:
    with LoopbackProxy(1) as first:
        write_credentials(tmp_path, pki, "gw-1")
        settings = upstreams(tmp_path, upstream_toml("gw-1", first.port, above.port))
        with running_gateway(tmp_path, pki, policy_toml=POLICY, upstreams=settings) as gateway:
            upstream = wait_until_up(gateway)
            assert upstream.state().server == f"127.0.0.1:{above.port}"
            first.target_port = above.port
            tried = first.connections
            gateway.call(upstream.link.cut)  # type: ignore[union-attr]
            gateway.wait_for(lambda: gateway.broker.counters.upstream_lost == 1, "lost")
            wait_until_up(gateway)
            assert upstream.state().server == f"127.0.0.1:{above.port}"
            assert first.connections == tried


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x20\x02\x00\x07",
        b"\x20\x02\x01\x01",
        b"\x90\x03\x00\x01\x00",
        b"\x20\x02\x00\x00\x20\x02\x00\x00",
        b"\x20\x02\x00\x00\x34\x07\x00\x01a\x00\x01xx",
        b"\x20\x02\x00\x00\x90\x03\x00\x63\x00",
        b"\x20\x02\x00\x00\x50\x02\x00\x01",
        b"\x20\x02\x00\x00\xff\xff\xff\xff",
        b"",
    ],
)
def test_what_is_no_broker_is_said_to_be_none(tmp_path: Path, pki: Pki, answer: bytes) -> None:
    def talk(secured: ssl.SSLSocket) -> None:
        secured.recv(4_096)
        if answer:
            secured.sendall(answer)
            secured.recv(4_096)

    with (
        speaking(tmp_path, pki, talk) as port,
        running_gateway(tmp_path, pki, **linked(tmp_path, pki, port)) as gateway,
    ):
        wait_until_down(gateway, f"127.0.0.1:{port}")


def test_the_will_of_one_of_a_fleet_is_published_when_it_is_lost_and_not_when_it_stops(
    above: RunningGateway, tmp_path: Path, pki: Pki
) -> None:
    above.call(above.broker.set_policy, policy_of())
    operator = above.client("free-1").subscribed(("lost/#", 1))
    values = linked(tmp_path, pki, above.port)
    with running_gateway(tmp_path, pki, **values) as gateway:
        upstream = wait_until_up(gateway)
        upstream.make_will = lambda: Will("lost/gw-1", b"gone", 1, retain=True)
        gateway.call(upstream.reload)
        gateway.wait_for(lambda: gateway.broker.counters.upstream_lost == 1, "made anew")
        wait_until_up(gateway)
        gateway.call(upstream.link.cut)  # type: ignore[union-attr]
        assert said(operator, 1) == [("lost/gw-1", b"gone", 1, False)]
        gateway.wait_for(lambda: gateway.broker.counters.upstream_lost == 2, "lost")
        wait_until_up(gateway)
    operator.ping()
