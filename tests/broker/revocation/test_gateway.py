"""The gateway's watch: what arrives is judged, takes hold or not, and is answered with a receipt."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import hashlib
import logging
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import pytest
from support.pki import Authority, Pki, crl_pem, now
from support.waiting import until

from birthmark.broker.config import BrokerSettings, read_settings
from birthmark.broker.counters import Counters
from birthmark.broker.fleet.roamers import Roamers
from birthmark.broker.gateway import MAX_WAITING_CRLS, Gateway
from birthmark.broker.peer import Peer, PeerRefusedError, check_peer
from birthmark.broker.trust import Trust
from birthmark.broker.upstream.upstreams import Upstreams
from birthmark.device.errors import BirthmarkError, ConfigurationError, PolicyError
from birthmark.device.messages import ClosedIdentity, GatewayStatus, Receipt

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from birthmark.broker.policy import Policy

POLICY = '[roles.device]\npublish = ["devices/{id}/#"]\n[[assignments]]\ncn = "*"\nrole = "device"\n'
PKI = Pki.create()


@dataclass
class Recorder:
    """Stands where the broker stands; remembers what it was told."""

    peers: list[Peer] = field(default_factory=list)
    policies: list[Policy] = field(default_factory=list)
    contexts: list[ssl.SSLContext] = field(default_factory=list)
    published: list[tuple[str, bytes, int, bool]] = field(default_factory=list)
    hooks: dict[str, Callable[[str, bytes, Peer], None]] = field(default_factory=dict)
    connected_count: int = 3
    counters: Counters = field(default_factory=Counters)
    on_client: Callable[[Peer, str], None] | None = None
    retained: list[bytes] = field(default_factory=list)
    upstreams: Upstreams = field(default_factory=lambda: Upstreams((), cast(Any, None)))
    roamers: Roamers = field(default_factory=lambda: Roamers(cast(Any, None), peer_of()))

    def own_retained(self, topic_filter: str) -> list[bytes]:
        assert topic_filter == "gateway/gw-1/seen/+"
        return self.retained

    def publish(self, topic: str, payload: bytes, qos: int = 0, *, retain: bool = False) -> None:
        self.published.append((topic, payload, qos, retain))

    def on_gateway_message(self, topic_filter: str, callback: Callable[[str, bytes, Peer], None]) -> None:
        self.hooks[topic_filter] = callback

    def set_policy(self, policy: Policy) -> int:
        self.policies.append(policy)
        return 0

    def set_tls_context(self, context: ssl.SSLContext, renewal: ssl.SSLContext | None = None) -> None:
        assert renewal is None, "these gateways have no renewal listener"
        self.contexts.append(context)

    def close_identities(
        self, is_revoked: Callable[[Peer], bool], *, started_s: float | None = None
    ) -> list[ClosedIdentity]:
        closed = [peer for peer in self.peers if is_revoked(peer)]
        self.peers = [peer for peer in self.peers if peer not in closed]
        assert started_s is None or started_s > 0
        return [_closed(peer) for peer in closed]

    async def settle(self) -> bool:
        return True

    def end_connections(self, of: Callable[[Peer], bool], why: str) -> int:
        assert why
        ended = [peer for peer in self.peers if of(peer)]
        self.peers = [peer for peer in self.peers if peer not in ended]
        return len(ended)

    def receipts(self) -> list[Receipt]:
        return [
            Receipt.from_bytes(payload) for topic, payload, *_ in self.published if topic.endswith("/receipts")
        ]

    def statuses(self) -> list[GatewayStatus]:
        return [
            GatewayStatus.from_bytes(payload) for topic, payload, *_ in self.published if topic.endswith("/status")
        ]


def _closed(peer: Peer) -> ClosedIdentity:
    return ClosedIdentity(
        id=str(peer.device_id),
        cert_serial=f"{peer.cert_serial:x}",
        sessions_closed=1,
        elapsed_ms=0.5,
        will_suppressed=True,
        queued_messages_purged=2,
        retained_presence_purged=True,
    )


@pytest.fixture
def settings(tmp_path: Path) -> BrokerSettings:
    PKI.write_broker_files(tmp_path)
    (tmp_path / "policy.toml").write_text(POLICY)
    (tmp_path / "broker.toml").write_text('name = "gw-1"\n[revocation]\nwatch_interval_s = 0.02\n')
    return read_settings(tmp_path / "broker.toml")


def peer_of(name: str = "sensor-1", ca: Authority = PKI.issuing) -> Peer:
    return check_peer(ca.device(name).der, Trust.from_pem(ca.pem), now())


@asynccontextmanager
async def running(settings: BrokerSettings, *peers: Peer) -> AsyncIterator[tuple[Gateway, Recorder]]:
    gateway, recorder = Gateway.open(settings), Recorder(peers=list(peers))
    await gateway.start(recorder)
    try:
        yield gateway, recorder
    finally:
        await gateway.stop()


def receipt_in(settings: BrokerSettings) -> Receipt | None:
    try:
        return Receipt.from_bytes(settings.receipt_path.read_bytes())
    except FileNotFoundError:
        return None


def replace(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    part = path.with_name(path.name + ".new")
    part.write_bytes(content)
    part.chmod(mode)
    part.replace(path)


def started(settings: BrokerSettings, *peers: Peer) -> Receipt:
    """The receipt beside the file once a gateway has started, whose store brought these peers back."""

    async def main() -> None:
        async with running(settings, *peers) as (gateway, _recorder):
            assert gateway.admit(PKI.device().der).device_id.text == "sensor-1"

    asyncio.run(main())
    receipt = receipt_in(settings)
    assert receipt is not None
    return receipt


def test_the_start_installs_the_file_and_gives_a_receipt(settings: BrokerSettings) -> None:
    receipt = started(settings)
    assert (receipt.gateway, receipt.outcome, receipt.crl_number) == ("gw-1", "installed", 1)
    assert receipt.issuer == PKI.issuing.issuer_id
    assert started(settings).outcome == "current"


def test_the_receipt_of_a_start_tells_whose_stored_sessions_it_purged(settings: BrokerSettings) -> None:
    lost, kept = PKI.device("lost"), PKI.device("kept")
    peers = [check_peer(issued.der, Trust.from_pem(PKI.issuing.pem), now()) for issued in (lost, kept)]
    settings.crl_path.write_bytes(PKI.issuing.crl([lost.cert_serial], number=2))
    Gateway.open(settings)
    assert receipt_in(settings) is None, "nothing is purged before the broker runs"
    receipt = started(settings, *peers)
    assert [closed.id for closed in receipt.closed] == ["lost"]


def test_a_newer_file_closes_and_is_answered(settings: BrokerSettings) -> None:
    lost, kept = PKI.device("lost"), PKI.device("kept")

    async def main() -> None:
        peers = [check_peer(issued.der, Trust.from_pem(PKI.issuing.pem), now()) for issued in (lost, kept)]
        async with running(settings, *peers) as (gateway, recorder):
            crl_der = PKI.issuing.crl([lost.cert_serial], number=2)
            replace(settings.crl_path, crl_pem(crl_der))
            await until(lambda: (found := receipt_in(settings)) and found.crl_number == 2)
            receipt = receipt_in(settings)
            assert receipt is not None
            assert (receipt.outcome, receipt.revoked_count) == ("installed", 1)
            assert receipt.crl_sha256 == hashlib.sha256(crl_der).hexdigest()
            assert [(closed.id, closed.cert_serial) for closed in receipt.closed] == [
                ("lost", f"{lost.cert_serial:x}")
            ]
            assert recorder.peers == [peers[1]]
            assert recorder.receipts() == [receipt]
            with pytest.raises(PeerRefusedError, match="is revoked"):
                gateway.admit(lost.der)
            gateway.admit(kept.der)
            status = recorder.statuses()[-1]
            assert status.crl_numbers == {PKI.issuing.issuer_id: 2}
            assert status.sessions == 3

    asyncio.run(main())


def test_the_crl_in_force_is_told_whole_once_and_taken_back_when_it_is_too_long(
    settings: BrokerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = f"gateway/gw-1/crl-in-force/{PKI.issuing.issuer_id}"

    async def main() -> None:
        async with running(settings) as (gateway, recorder):

            def told() -> list[bytes]:
                return [payload for where, payload, qos, retain in recorder.published if where == topic and retain]

            in_force = gateway.revocations.crls[PKI.issuing.issuer_id]
            assert told() == [in_force.der]
            second = PKI.issuing.crl([7], number=2, this_update=now())
            replace(settings.crl_path, crl_pem(second))
            await until(lambda: len(told()) == 2)
            assert told()[1] == second
            gateway.reload()  # the same again says nothing new
            third = PKI.issuing.crl([7, 8], number=3, this_update=now())
            monkeypatch.setattr("birthmark.broker.fleet.member.MAX_TOLD_CRL_BYTES", len(third) - 1)
            replace(settings.crl_path, crl_pem(third))
            await until(lambda: len(told()) == 3)
            assert told()[2] == b""

    asyncio.run(main())


def test_one_file_with_two_lists_reports_each_cas_own(settings: BrokerSettings) -> None:
    second = Authority.create("Second Issuing CA", parent=PKI.root)
    settings.clients_ca_path.write_bytes(PKI.issuing.pem + second.pem)
    settings.crl_path.write_bytes(crl_pem(PKI.issuing.crl(number=1)) + crl_pem(second.crl(number=1)))

    async def main() -> None:
        one, other = peer_of("one"), peer_of("other", second)
        async with running(settings, one, other) as (_, recorder):
            lists = PKI.issuing.crl([one.cert_serial], number=2), second.crl([other.cert_serial], number=2)
            replace(settings.crl_path, b"".join(crl_pem(crl_der) for crl_der in lists))
            await until(lambda: len(recorder.receipts()) == 2)
            closed = {receipt.issuer: [entry.id for entry in receipt.closed] for receipt in recorder.receipts()}
            assert closed == {PKI.issuing.issuer_id: ["one"], second.issuer_id: ["other"]}

    asyncio.run(main())


def test_the_same_file_again_gets_a_receipt_again(settings: BrokerSettings) -> None:
    async def main() -> None:
        async with running(settings):
            settings.receipt_path.unlink()
            replace(settings.crl_path, settings.crl_path.read_bytes())
            await until(lambda: receipt_in(settings))
            receipt = receipt_in(settings)
            assert receipt is not None
            assert receipt.outcome == "current"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: b"", "unreadable"),
        (lambda: b"not a CRL", "unreadable"),
        (lambda: PKI.issuing.crl(number=0), "older"),
        (lambda: PKI.stranger.crl(number=9), "issuer"),
        (lambda: PKI.issuing.crl(number=9)[:-9], "malformed"),
    ],
)
def test_a_bad_file_changes_nothing_and_is_reported(
    settings: BrokerSettings, content: Callable[[], bytes], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with running(settings, peer_of()) as (gateway, recorder):
            replace(settings.crl_path, content())
            await until(lambda: (found := receipt_in(settings)) and found.outcome == "refused")
            receipt = receipt_in(settings)
            assert receipt is not None
            assert receipt.reason.startswith(reason)
            assert len(recorder.peers) == 1
            assert gateway.revocations.crls[PKI.issuing.issuer_id].number == 1
            # And the next good one is taken.
            replace(settings.crl_path, PKI.issuing.crl(number=10))
            await until(lambda: (found := receipt_in(settings)) and found.crl_number == 10)

    asyncio.run(main())
    assert "refused a CRL from" in caplog.text
    assert "crl_refused" in [getattr(record, "fields", {}).get("event") for record in caplog.records]
    assert "what was in force stays" in caplog.text


def test_a_crl_by_message(settings: BrokerSettings) -> None:
    lost, operator = peer_of("lost"), peer_of("alice")

    async def main() -> None:
        async with running(settings, lost, operator) as (_, recorder):
            bring = recorder.hooks["gateway/gw-1/crl"]
            crl_der = PKI.issuing.crl([lost.cert_serial], number=5)
            bring("gateway/gw-1/crl", crl_der, operator)
            bring("gateway/gw-1/crl", b"nonsense", operator)
            bring("gateway/gw-1/crl", crl_der, operator)
            await until(lambda: len(recorder.receipts()) == 3)
            assert [receipt.outcome for receipt in recorder.receipts()] == ["installed", "refused", "current"]
            assert [closed.id for closed in recorder.receipts()[0].closed] == ["lost"]
            assert recorder.peers == [operator]
            assert all(retain for *_, retain in recorder.published)
        # It is kept: a restart with the older file does not go back.
        assert Gateway.open(settings).revocations.crls[PKI.issuing.issuer_id].number == 5
        receipt = receipt_in(settings)
        assert receipt is not None
        assert (receipt.outcome, receipt.crl_number) == ("refused", 5)

    asyncio.run(main())


def test_a_file_from_before_is_no_error_at_a_start_and_any_other_that_is_refused_is(
    settings: BrokerSettings, caplog: pytest.LogCaptureFixture
) -> None:
    issuing, day = PKI.issuing, dt.timedelta(days=1)
    replace(settings.crl_path, issuing.crl(number=5))
    assert Gateway.open(settings).revocations.crls[issuing.issuer_id].number == 5
    told: list[tuple[str, bool]] = []
    for content in (
        issuing.crl(number=4, this_update=now() - day),
        issuing.crl(number=4, this_update=now() + day / 2000),  # signed later: by a station that was restored
        issuing.crl(number=6, this_update=now() - day),
    ):
        caplog.clear()
        replace(settings.crl_path, content)
        assert Gateway.open(settings).revocations.crls[issuing.issuer_id].number == 5
        receipt = receipt_in(settings)
        assert receipt is not None
        fields = [getattr(record, "fields", {}).get("event") for record in caplog.records]
        told.append((receipt.outcome, "crl_refused" in fields))
    assert told == [("refused", False), ("refused", True), ("refused", True)]


def test_messages_beyond_what_can_wait_are_refused_with_a_receipt(
    settings: BrokerSettings, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with running(settings) as (_, recorder):
            for _number in range(MAX_WAITING_CRLS + 5):
                recorder.hooks["gateway/gw-1/crl"]("gateway/gw-1/crl", b"nonsense", peer_of("alice"))
            busy = recorder.receipts()
            assert len(busy) == 5, "at once, before those that wait"
            assert {receipt.outcome for receipt in busy} == {"refused"}
            assert {receipt.crl_sha256 for receipt in busy} == {hashlib.sha256(b"nonsense").hexdigest()}
            assert all(receipt.reason.startswith("busy: 8 others wait") for receipt in busy)
            await until(lambda: len(recorder.receipts()) == MAX_WAITING_CRLS + 5)
            assert not recorder.receipts()[-1].reason.startswith("busy")

    asyncio.run(main())
    assert "others wait" in caplog.text


@pytest.mark.parametrize("fail_closed", [False, True])
def test_a_crl_too_old_to_go_by_ends_what_it_let_in(
    settings: BrokerSettings,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    *,
    fail_closed: bool,
) -> None:
    """The grace over, or none granted: live connections fare like new ones, and the status says so first."""
    second = Authority.create("Second CA", parent=PKI.root)
    settings.clients_ca_path.write_bytes(PKI.issuing.pem + second.pem)
    in_an_hour = now() + dt.timedelta(hours=1)
    expiring = PKI.issuing.crl(number=4, next_update=in_an_hour)
    settings.crl_path.write_bytes(crl_pem(expiring) + crl_pem(second.crl(number=1)))
    rules = dataclasses.replace(settings.revocation, fail_closed=fail_closed, grace_days=0)
    settings = dataclasses.replace(settings, revocation=rules)
    mine, other = peer_of("sensor-1"), peer_of("sensor-2", second)

    async def main() -> None:
        async with running(settings, mine, other) as (gateway, recorder):
            assert gateway.admit(PKI.device().der)
            assert "crl-refusing" not in recorder.statuses()[-1].alarms
            monkeypatch.setattr("birthmark.broker.gateway.now", lambda: in_an_hour + dt.timedelta(seconds=1))
            await until(lambda: mine not in recorder.peers)
            assert recorder.peers == [other], "the other CA's CRL is good"
            last = recorder.statuses()[-1]
            assert "crl-refusing" in last.alarms
            assert last.counters["unchecked_closed"] == 1
            assert last.counters["alarms"] >= 1
            with pytest.raises(PeerRefusedError, match="expired"):
                gateway.admit(PKI.device().der)
            # A new one, by file: everything is as before.
            recorder.peers.append(mine)
            fresh = PKI.issuing.crl(number=5, this_update=now())
            replace(settings.crl_path, crl_pem(fresh) + crl_pem(second.crl(number=1)))
            await until(lambda: recorder.statuses()[-1].crl_numbers[PKI.issuing.issuer_id] == 5)
            assert recorder.statuses()[-1].alarms == ()
            assert recorder.peers == [other, mine]

    with caplog.at_level(logging.INFO):
        asyncio.run(main())
    assert "ALARM crl-refusing" in caplog.text
    assert "ended 1 connections" in caplog.text
    assert "alarm crl-refusing is over" in caplog.text


def test_past_half_its_life_a_crl_is_an_alarm_in_log_counter_and_status(
    settings: BrokerSettings, caplog: pytest.LogCaptureFixture
) -> None:
    began, ends = now() - dt.timedelta(days=16), now() + dt.timedelta(days=14)
    settings.crl_path.write_bytes(PKI.issuing.crl(number=3, this_update=began, next_update=ends))

    async def main() -> None:
        async with running(settings, peer_of()) as (_, recorder):
            (status,) = recorder.statuses()
            assert status.alarms == ("crl-due",)
            assert status.counters["alarms"] == 1
            assert len(recorder.peers) == 1

    asyncio.run(main())
    assert "ALARM crl-due" in caplog.text


def test_a_new_policy_applies_and_a_bad_one_does_not(
    settings: BrokerSettings, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with running(settings) as (gateway, recorder):
            replace(settings.policy_path, POLICY.replace("publish", "publsh").encode())
            await until(lambda: "publsh" in caplog.text)
            assert recorder.policies == []
            replace(settings.policy_path, POLICY.replace("devices", "things").encode())
            await until(lambda: recorder.policies)
            (policy,) = recorder.policies
            assert policy is gateway.policy
            assert policy.roles[0].publish == ("things/{id}/#",)
            assert recorder.statuses()[-1].policy_sha256 == policy.sha256

    asyncio.run(main())
    assert "policy.toml, line 2, roles.device.publsh: unknown key" in caplog.text


def test_a_policy_written_in_place_is_taken_when_it_rests(settings: BrokerSettings) -> None:
    async def main() -> None:
        async with running(settings) as (_, recorder):
            settings.policy_path.write_text(POLICY.replace("devices", "things"))
            await until(lambda: recorder.policies)
            assert recorder.policies[-1].roles[0].publish == ("things/{id}/#",)

    asyncio.run(main())


def test_a_file_that_vanishes_changes_nothing(settings: BrokerSettings) -> None:
    async def main() -> None:
        async with running(settings) as (gateway, recorder):
            settings.crl_path.unlink()
            settings.policy_path.unlink()
            gateway.reload()  # even when asked to read them
            replace(settings.clients_ca_path, PKI.issuing.pem + b"\n")
            await until(lambda: recorder.contexts)
            gateway.admit(PKI.device().der)
            assert recorder.policies == []

    asyncio.run(main())


def test_hup_takes_everything_up_again(settings: BrokerSettings) -> None:
    async def main() -> None:
        async with running(settings) as (gateway, recorder):
            settings.receipt_path.unlink()
            gateway.reload()
            await until(lambda: recorder.contexts and receipt_in(settings))
            assert recorder.policies == []

    asyncio.run(main())


def test_a_rollover_trusts_a_second_ca_and_then_drops_the_first(settings: BrokerSettings) -> None:
    second = Authority.create("Second Issuing CA", parent=PKI.root)

    async def main() -> None:
        old, new = peer_of("old"), peer_of("new", second)
        async with running(settings, old) as (gateway, recorder):
            with pytest.raises(PeerRefusedError, match="unknown CA"):
                gateway.admit(second.device().der)
            replace(settings.crl_path, crl_pem(PKI.issuing.crl(number=2)) + crl_pem(second.crl(number=1)))
            await until(lambda: (found := receipt_in(settings)) and found.crl_number == 2)
            replace(settings.clients_ca_path, PKI.issuing.pem + second.pem)
            await until(lambda: second.issuer_id in gateway.revocations.crls)
            gateway.admit(second.device().der)
            recorder.peers.append(new)
            gateway.admit(PKI.device().der)
            await until(lambda: len(list(settings.crl_path.parent.glob("crl.pem.*.receipt"))) == 2)
            replace(settings.clients_ca_path, second.pem)
            await until(lambda: recorder.peers == [new])
            with pytest.raises(PeerRefusedError, match="unknown CA"):
                gateway.admit(PKI.device().der)

    asyncio.run(main())


def test_a_rollover_goes_on_where_there_is_no_crl_file(
    settings: BrokerSettings, caplog: pytest.LogCaptureFixture
) -> None:
    """CRLs may come by message alone, and those of the new CA are asked for only once it is known."""
    second = Authority.create("Second Issuing CA", parent=PKI.root)

    async def main() -> None:
        async with running(settings) as (gateway, _recorder):
            settings.crl_path.unlink()
            followed: list[str] = []
            gateway._member.follow_trust = lambda: followed.extend(ca.name for ca in gateway._trust)  # type: ignore[method-assign]
            replace(settings.clients_ca_path, PKI.issuing.pem + second.pem)
            await until(lambda: "no CRL of" in caplog.text)
            assert any("Second Issuing CA" in name for name in followed)
            gateway.admit(PKI.device().der)

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    assert f"could not read the CRL file {settings.crl_path}: No such file" in caplog.text


def test_a_file_that_is_refused_over_a_clock_is_judged_again_when_it_is_set(
    settings: BrokerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = PKI.device("lost")
    Gateway.open(settings)
    settings.crl_path.write_bytes(PKI.issuing.crl([lost.cert_serial], number=2))
    monkeypatch.setattr("birthmark.broker.gateway.STATUS_INTERVAL_S", 0.02)
    monkeypatch.setattr("birthmark.broker.gateway.now", lambda: dt.datetime(1970, 1, 1, tzinfo=dt.UTC))

    async def main() -> None:
        peer = check_peer(lost.der, Trust.from_pem(PKI.issuing.pem), now())
        async with running(settings, peer) as (gateway, recorder):
            refused = receipt_in(settings)
            assert refused is not None
            assert (refused.outcome, refused.reason[:13]) == ("refused", "not-yet-valid")
            written = settings.receipt_path.stat().st_mtime_ns
            said = len(recorder.statuses())
            await until(lambda: len(recorder.statuses()) > said + 5)
            assert settings.receipt_path.stat().st_mtime_ns == written, "that it is refused was said before"
            assert len(recorder.receipts()) == 0
            monkeypatch.setattr("birthmark.broker.gateway.now", now)
            await until(lambda: (found := receipt_in(settings)) and found.outcome == "installed")
            assert recorder.peers == []
            with pytest.raises(PeerRefusedError, match="is revoked"):
                gateway.admit(lost.der)

    asyncio.run(main())


def test_a_file_that_is_to_be_judged_again_may_be_gone(
    settings: BrokerSettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Gateway.open(settings)
    crl_der = PKI.issuing.crl([], number=2)
    settings.crl_path.write_bytes(crl_der)
    monkeypatch.setattr("birthmark.broker.gateway.STATUS_INTERVAL_S", 0.02)
    monkeypatch.setattr("birthmark.broker.gateway.now", lambda: dt.datetime(1970, 1, 1, tzinfo=dt.UTC))

    async def main() -> None:
        async with running(settings) as (_gateway, recorder):
            settings.crl_path.unlink()
            said = len(recorder.statuses())
            await until(lambda: len(recorder.statuses()) > said + 5)
            await until(lambda: f"{settings.crl_path} is gone" in caplog.text)
            monkeypatch.setattr("birthmark.broker.gateway.now", now)
            replace(settings.crl_path, crl_der)
            await until(lambda: (found := receipt_in(settings)) and found.outcome == "installed")

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    assert "could not be said" not in caplog.text


def test_bad_credentials_change_nothing(settings: BrokerSettings, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with running(settings) as (gateway, recorder):
            replace(settings.credentials_path, b"no key")
            await until(lambda: "server.pem" in caplog.text)
            assert recorder.contexts == []
            gateway.admit(PKI.device().der)

    asyncio.run(main())


def test_new_credentials_that_others_may_read_change_nothing(
    settings: BrokerSettings, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with running(settings) as (_, recorder):
            replace(settings.credentials_path, PKI.issuing.server("localhost").pem, mode=0o644)
            await until(lambda: f"chmod 600 {settings.credentials_path}" in caplog.text)
            assert recorder.contexts == []
            settings.credentials_path.chmod(0o600)
            await until(lambda: recorder.contexts)

    asyncio.run(main())
    assert "others than its owner may read it; what was in force stays" in caplog.text


def test_its_own_certificate_is_an_alarm_as_it_expires_and_no_obstacle(
    settings: BrokerSettings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, ends = now() - dt.timedelta(days=200), now() + dt.timedelta(hours=1)
    PKI.issuing.server("gw-1", not_before=began, not_after=ends).write(settings.credentials_path)

    async def main() -> None:
        async with running(settings, peer_of()) as (gateway, recorder):
            assert recorder.statuses()[-1].alarms == ("certificate-due",)
            monkeypatch.setattr("birthmark.broker.gateway.now", lambda: ends + dt.timedelta(seconds=1))
            await until(lambda: recorder.statuses()[-1].alarms == ("certificate-expired",))
            assert recorder.statuses()[-1].counters["alarms"] == 2
            gateway.admit(PKI.device().der)
            assert len(recorder.peers) == 1
        async with running(settings) as (gateway, recorder):  # and it starts with it, too
            assert recorder.statuses()[-1].alarms == ("certificate-expired",)
            replace(settings.credentials_path, PKI.issuing.server("gw-1").pem)
            await until(lambda: recorder.statuses()[-1].alarms == ())
            assert recorder.contexts == [gateway.tls_context]

    with caplog.at_level(logging.INFO):
        asyncio.run(main())
    levels = [(record.levelname, record.getMessage().split(":")[0]) for record in caplog.records]
    assert levels.count(("WARNING", "ALARM certificate-due")) == 1
    assert levels.count(("ERROR", "ALARM certificate-expired")) == 2
    assert "`birthmark issue-broker gw-1 --renew`" in caplog.text
    assert "alarm certificate-expired is over" in caplog.text


def test_the_status_says_when_the_gateway_goes(settings: BrokerSettings) -> None:
    async def main() -> Recorder:
        async with running(settings) as (_, recorder):
            pass
        return recorder

    statuses = asyncio.run(main()).statuses()
    assert [status.online for status in statuses] == [True, False]
    assert statuses[0].gateway == "gw-1"
    assert statuses[0].crl_next_update > statuses[0].clock


def test_a_receipt_that_cannot_be_written_is_logged(
    settings: BrokerSettings, caplog: pytest.LogCaptureFixture
) -> None:
    settings.receipt_path.mkdir()

    async def main() -> None:
        async with running(settings) as (gateway, _recorder):
            assert gateway.admit(PKI.device().der)

    asyncio.run(main())
    assert "could not write the receipt" in caplog.text


def test_an_expired_crl_is_an_alarm_at_the_start(
    settings: BrokerSettings, caplog: pytest.LogCaptureFixture
) -> None:
    past = now() - dt.timedelta(minutes=1)
    settings.crl_path.write_bytes(PKI.issuing.crl(number=3, next_update=past))
    with caplog.at_level(logging.WARNING):
        gateway = Gateway.open(settings)
    assert "ALARM crl-expired" in caplog.text
    gateway.admit(PKI.device().der)


def opened_with(settings: BrokerSettings, **files: bytes | None) -> BirthmarkError:
    for name, content in files.items():
        path: Any = getattr(settings, name)
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    with pytest.raises(BirthmarkError) as caught:
        Gateway.open(settings)
    return caught.value


def test_a_start_without_a_crl_says_what_to_do(settings: BrokerSettings) -> None:
    error = opened_with(settings, crl_path=None)
    assert isinstance(error, ConfigurationError)
    assert "without a CRL" in error.message
    assert "crl.pem: No such file" in error.message
    assert "birthmark crl" in error.hint


def test_a_start_with_a_bad_crl_says_why(settings: BrokerSettings) -> None:
    error = opened_with(settings, crl_path=PKI.stranger.crl())
    assert "no trusted issuing CA" in error.message


def test_a_start_with_a_bad_crl_goes_by_the_one_that_is_kept(settings: BrokerSettings) -> None:
    Gateway.open(settings)
    settings.crl_path.write_bytes(b"damaged")
    assert Gateway.open(settings).admit(PKI.device().der)
    settings.crl_path.unlink()
    assert Gateway.open(settings).admit(PKI.device().der)


def test_a_start_with_a_bad_policy_or_ca_says_where(settings: BrokerSettings) -> None:
    assert isinstance(opened_with(settings, policy_path=b"[roles.x"), PolicyError)
    settings.policy_path.write_text(POLICY)
    assert "clients-ca.pem" in opened_with(settings, clients_ca_path=None).message
