"""What a device takes from an answer, and how it finds its way when something went wrong between two steps."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from support.patience import PATIENCE_S
from support.pki import Authority, Pki, now
from support.renewing_client import Renewing, client, client_started
from support.waiting import eventually

from birthmark.device import topics
from birthmark.device.agent.keys import key_from_der, key_to_der
from birthmark.device.agent.slots import Slot
from birthmark.device.certificate_facts import certificate_facts
from birthmark.device.clock import Moment
from birthmark.device.credentials import Credentials
from birthmark.device.durable import write_durably
from birthmark.device.errors import ProtocolError
from birthmark.device.events import AttemptFailed, Connected, Disconnected
from birthmark.device.identity import DeviceId, Role
from birthmark.device.link.bundle import Bundle, BundleConfig
from birthmark.device.link.transcript import sign
from birthmark.device.renewal import making
from birthmark.device.renewal import store as store_module
from birthmark.device.renewal.messages import AnchorUpdate, RenewalAnswer
from birthmark.device.renewal.proofs import anchors_transcript
from birthmark.device.renewal.schedule import due_at
from birthmark.device.renewal.store import RenewalStore
from birthmark.provisioning.renewal import Renewals

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from support.renewal_stand import Renewd, Stand

    from birthmark.device.renewal.messages import RenewalRequest
    from birthmark.device.renewal.store import AskedKey

PKI = Pki.create()
NEXT = Authority.create("Next Root CA")
DEVICE = DeviceId("sensor-1")


def slot() -> Slot:
    issued = PKI.device("sensor-1")
    bundle = Bundle(
        leaf_der=issued.der,
        issuing_der=(PKI.issuing.der,),
        anchors_der=(PKI.root.der,),
        config=BundleConfig("localhost", 8883, DEVICE, Role("device")),
        issued_at=int(time.time()) - 60,
    )
    return Slot(bytes(16), key_to_der(cast("EllipticCurvePrivateKey", issued.key)), bundle)


class Exchange:
    """One request, and answers to it, right and wrong."""

    def __init__(self) -> None:
        self.current: Slot = slot()
        self.asked: AskedKey = making.new_key(DEVICE)
        self.request: RenewalRequest = making.renewal_request(self.current, self.asked)

    def answer(
        self, *, by: Authority = PKI.issuing, cn: str = "sensor-1", key: Any = None, **more: Any
    ) -> RenewalAnswer:
        key = key or key_from_der(self.asked.key_der)
        leaf = by.issue(cns=[cn], key=key)
        fields: dict[str, Any] = {"leaf_der": leaf.der, "chain_der": (by.der,), **more}
        return RenewalAnswer("issued", self.request.nonce, **fields)

    def taken(self, answer: RenewalAnswer) -> Slot:
        return making.granted(answer, self.request, current=self.current, asked=self.asked, moment=Moment(now()))

    def anchors(self, *anchors: bytes, signer: Authority = PKI.issuing) -> AnchorUpdate:
        signed = anchors_transcript(DEVICE, nonce=self.request.nonce, anchors_der=anchors)
        return AnchorUpdate(anchors, signer.der, sign(cast("EllipticCurvePrivateKey", signer.key), signed))


def test_a_right_answer_becomes_a_slot_of_the_same_enrollment() -> None:
    exchange = Exchange()
    answer = exchange.answer()
    taken = exchange.taken(answer)
    assert (taken.txn, taken.key_der) == (exchange.current.txn, exchange.asked.key_der)
    assert taken.bundle.leaf_der == answer.leaf_der
    assert taken.bundle.config == exchange.current.bundle.config
    assert taken.bundle.anchors_der == exchange.current.bundle.anchors_der
    assert taken.bundle.issued_at >= exchange.current.bundle.issued_at, "a clock does not go back"


def test_new_anchors_come_along_if_they_are_vouched_for() -> None:
    exchange = Exchange()
    both = (PKI.root.der, NEXT.der)
    assert exchange.taken(exchange.answer(anchors=exchange.anchors(*both))).bundle.anchors_der == both
    new_issuing = Authority.create("New Issuing CA", parent=NEXT)
    told = exchange.answer(by=new_issuing, anchors=exchange.anchors(*both))
    assert exchange.taken(told).bundle.issuing_der == (new_issuing.der,), "issued by a CA under a new anchor"


def wrong_answers() -> dict[str, Any]:
    rogue = Authority.create("Test Issuing CA", parent=Authority.create("Test Root CA"))
    return {
        "another request's": lambda e: e.answer().changed(nonce=b"x" * 16),
        "for another key": lambda e: e.answer(key=key_from_der(making.new_key(DEVICE).key_der)),
        "for the key in use": lambda e: e.answer(key=key_from_der(e.current.key_der)),
        "for another name": lambda e: e.answer(cn="sensor-2"),
        "by a stranger": lambda e: e.answer(by=PKI.stranger),
        "by a stranger of the same name": lambda e: e.answer(by=rogue),
        "by a stranger, with our chain": lambda e: e.answer(by=PKI.stranger, chain_der=(PKI.issuing.der,)),
        "by a stranger, without a chain": lambda e: e.answer(by=PKI.stranger, chain_der=()),
        "no certificate": lambda e: e.answer(leaf_der=b"junk"),
        "a CA's": lambda e: e.answer(leaf_der=PKI.issuing.der, chain_der=(PKI.root.der,)),
        "with a stranger's anchors": lambda e: e.answer(anchors=e.anchors(NEXT.der, signer=NEXT)),
        "a stranger's, under its own anchors": lambda e: e.answer(
            by=PKI.stranger, anchors=e.anchors(cast("Authority", PKI.stranger.parent).der, signer=PKI.stranger)
        ),
        "with anchors of another request": lambda e: e.answer(anchors=Exchange().anchors(NEXT.der)),
        "confirmed": lambda e: RenewalAnswer("confirmed", e.request.nonce),
    }


@pytest.mark.parametrize("which", list(wrong_answers()))
def test_nothing_is_taken_from_an_answer_that_is(which: str) -> None:
    exchange = Exchange()
    with pytest.raises(ProtocolError):
        exchange.taken(wrong_answers()[which](exchange))


def test_a_fleet_is_spread_over_a_part_of_the_life() -> None:
    moments = []
    for number in range(50):
        leaf = PKI.device(f"sensor-{number}")
        certificate = leaf.certificate
        life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
        due = due_at(certificate_facts(leaf.der), leaf.der)
        assert due == due_at(certificate_facts(leaf.der), leaf.der), "a restart changes nothing"
        moments.append((due - certificate.not_valid_before_utc) / life)
    assert all(2 / 3 <= moment < 2 / 3 + 1 / 24 for moment in moments)
    assert max(moments) - min(moments) > 1 / 48


# --- between two steps, on a real gateway ------------------------------------------------------------------


def test_cut_off_after_the_station_confirmed_and_away_until_the_old_one_is_revoked(
    stand: Stand, renewd: Renewd
) -> None:
    state, watching = stand.device("away"), Renewing()
    (answer,) = Renewals(stand.station).answer([stand.grant(state)])
    assert answer.outcome == "confirmed"
    stand.retire_now()
    with client(state, watching) as device:
        watching.wait_for_state("renewed")
        device.publish(device.telemetry("x"), b"1", wait=20)
    assert Credentials.from_folder(state).leaf_der == stand.live("away").certificate_der
    assert not any(isinstance(event, AttemptFailed) for event in watching.events), "the new one is tried first"


def test_what_was_granted_and_revoked_while_it_was_away_is_given_up(stand: Stand, renewd: Renewd) -> None:
    state, watching = stand.device("unlucky-2"), Renewing()
    before = Credentials.from_folder(state)
    stand.grant(state)
    stand.revoke_open_renewal("unlucky-2")
    with client_started(state, watching) as device:
        watching.wait_for_state("rolled-back")
        eventually(lambda: device.is_connected, "a connection with the old certificate")
        device.publish(device.telemetry("x"), b"1", wait=20)
    assert Credentials.from_folder(state) == before
    assert RenewalStore(state).candidate() is None


@pytest.mark.parametrize("damage", [b"", b"-----BEGIN PRIVATE KEY-----\n", bytes(range(64))])
def test_a_damaged_record_is_no_obstacle(stand: Stand, renewd: Renewd, damage: bytes) -> None:
    name = f"damaged-{len(damage)}"
    state, watching = stand.device(name), Renewing()
    stand.grant(state)
    (state / "renewal").write_bytes(damage)
    with client(state, watching) as device:
        device.renew()
        watching.wait_for_state("renewed")
    assert Credentials.from_folder(state).leaf_der == stand.live(name).certificate_der


@pytest.mark.parametrize("fault", ["no descriptor left", "others may read it"])
def test_a_record_that_cannot_be_read_is_kept(
    stand: Stand, renewd: Renewd, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The station has confirmed it, and will retire the old one: another key must not take its place."""
    name = f"unread-{fault.split(maxsplit=1)[0]}"
    state, watching = stand.device(name), Renewing()
    (answer,) = Renewals(stand.station).answer([stand.grant(state)])
    assert answer.outcome == "confirmed"
    record, open_file = (state / "renewal"), Path.open
    before = record.stat()
    is_out = [True]

    def opened(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == record and is_out[0]:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return open_file(path, *arguments, **options)

    if fault == "no descriptor left":
        monkeypatch.setattr(Path, "open", opened)
    else:
        record.chmod(0o644)
    with client(state, watching) as device:
        device.renew()
        watching.wait_for_state("failed", 2)
        assert device.credentials.pem_path.name == "active", "meanwhile it goes by what it can read"
        assert (record.stat().st_ino, record.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        assert len(stand.rows(name)) == 2
        is_out[0] = False
        record.chmod(0o600)
        watching.wait_for_state("renewed")
    assert Credentials.from_folder(state).leaf_der == stand.live(name).certificate_der
    assert len(stand.rows(name)) == 2


def test_a_record_of_an_enrollment_before_does_not_count(stand: Stand) -> None:
    state, other = stand.device("again-1"), stand.device("again-2")
    stand.grant(other)
    (other / "renewal").rename(state / "renewal")
    store = RenewalStore(state)
    assert (store.candidate(), store.asked()) == (None, None)


def test_a_full_disk_costs_the_renewal_and_nothing_else(
    stand: Stand, renewd: Renewd, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, watching = stand.device("full"), Renewing()
    write, is_full = write_durably, [True]

    def full(path: Path, content: bytes, *, mode: int) -> None:
        if is_full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content, mode=mode)

    monkeypatch.setattr(store_module, "write_durably", full)
    with client(state, watching) as device:
        device.renew()
        watching.wait_for_state("failed")
        device.publish(device.telemetry("x"), b"1", wait=20)
        assert len(stand.rows("full")) == 1, "nothing was asked for that could not be kept"
        is_full[0] = False
        watching.wait_for_state("renewed")
        assert not any(isinstance(event, Disconnected) for event in watching.events)


def test_answers_that_nobody_asked_for_change_nothing(stand: Stand, renewd: Renewd) -> None:
    """From whoever may publish there: junk, somebody else's answers, retained ones, a flood of them."""
    state, watching = stand.device("calm"), Renewing()
    with client(state, watching) as device:
        watching.wait_for(Connected)
        for payload in (b"junk", Exchange().answer().to_bytes(), RenewalAnswer("confirmed", bytes(16)).to_bytes()):
            stand.answer_as_service("calm", payload)
        device.publish(device.telemetry("x"), b"1", wait=20)
        device.renew()
        watching.wait_for_state("renewed")
    assert len(stand.rows("calm")) == 2
    assert sorted(path.name for path in state.iterdir()) == [
        "active",
        "clock",
        "renewal.lock",
        "renewed",
        "status",
    ]


def test_what_is_retained_there_asks_for_nothing(stand: Stand, renewd: Renewd) -> None:
    state, watching = stand.device("deaf"), Renewing()
    stand.answer_as_service("deaf", RenewalAnswer("renew-now").to_bytes(), retain=True)
    with client(state, watching) as device:
        heard = threading.Event()
        device.subscribe(topics.renewal_answer(device.device_id), lambda _message: heard.set(), wait=20)
        assert heard.wait(PATIENCE_S), "the gateway keeps it, and gives it to whoever subscribes"
        device.publish(device.telemetry("x"), b"1", wait=20)
    assert watching.states == []
