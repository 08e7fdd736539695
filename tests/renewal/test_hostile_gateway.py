"""A gateway that lies: it drops, changes, repeats and makes up what passes between a device and its station.

The gateway, its TLS and the device are real; in the place of the renewal service stands `Between`, which does with
requests, and with the station's answers to them, what a hostile gateway can do.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import pytest
from support.renewal_stand import Stand
from support.renewing_client import Renewing, client, client_started
from support.waiting import eventually

from birthmark.device import topics
from birthmark.device.client import Client
from birthmark.device.credentials import BrokerAddress, Credentials
from birthmark.device.errors import RemoteProtocolError
from birthmark.device.identity import DeviceId
from birthmark.device.renewal.messages import MAX_WAIT_S, RenewalAnswer, RenewalRequest
from birthmark.device.renewal.store import RenewalStore
from birthmark.provisioning.registry.model import State
from birthmark.provisioning.renewal import Asked, Renewals
from birthmark.provisioning.renewal_seal import Seals

if TYPE_CHECKING:
    from collections.abc import Iterator

    from birthmark.device.received import Message


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    """No renewal service runs here."""
    with Stand(tmp_path_factory.mktemp("stand")) as stand:
        yield stand


Station = Callable[[], RenewalAnswer]
Lie = Callable[[RenewalRequest, Station], list[RenewalAnswer]]


def honest(_request: RenewalRequest, station: Station) -> list[RenewalAnswer]:
    return [station()]


class Between:
    """What a hostile gateway does: `lie` may ask the station, and returns what the device hears."""

    def __init__(self, stand: Stand, lie: Lie) -> None:
        self.lie = lie
        self.asked: list[RenewalRequest] = []
        self._stand = stand
        files = (stand.folder / "renewd.pem", stand.folder / "ca.pem")
        credentials = Credentials.from_files(*files, BrokerAddress("localhost", stand.port))
        self._client = Client(credentials, client_suffix=secrets.token_hex(4))

    def __enter__(self) -> Self:
        self._client.connect()
        self._client.subscribe(topics.RENEWAL_REQUESTS, self._take, wait=20)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.stop()

    def _take(self, message: Message) -> None:
        device_id = DeviceId(message.topic.split("/")[1])
        request = RenewalRequest.from_bytes(message.payload)
        for told in self.lie(
            request, lambda: Renewals(self._stand.station).answer([Asked(device_id, request)])[0]
        ):
            self._client.publish(topics.renewal_answer(device_id), told.to_bytes())
        self.asked.append(request)

    def count(self, kind: str) -> int:
        return sum(request.kind == kind for request in self.asked)


def only_to(kind: str, *told: dict[str, Any]) -> Lie:
    """Lie about one kind of request: each `told` changes the station's answer."""

    def lie(request: RenewalRequest, station: Station) -> list[RenewalAnswer]:
        answer = station()
        return [answer.changed(**one) for one in told] if request.kind == kind else [answer]

    return lie


REFUSED = {"outcome": "refused", "reason": "no such renewal"}


@pytest.mark.parametrize(
    "told",
    [(), (REFUSED,), ({**REFUSED, "signature": b""},), ({**REFUSED, "retry": True, "retry_after_s": 1},)],
    ids=["swallowed", "refused", "refused, unsigned", "put off"],
)
def test_a_confirmed_certificate_is_kept_whatever_is_said_of_it(
    stand: Stand, told: tuple[dict[str, Any], ...]
) -> None:
    """The station has confirmed it, and revokes the old one: who gives the new one up has nothing left."""
    name = f"sensor-{secrets.token_hex(4)}"
    state, watching = stand.device(name), Renewing()
    with Between(stand, only_to("confirm", *told)) as between, client(state, watching) as device:
        device.renew()
        eventually(lambda: between.count("confirm") >= 2, f"it asks again; there was {watching.events}")
        watching.wait_for_state("failed")
    assert "rolled-back" not in watching.states
    stand.retire_now()
    with Between(stand, honest), client_started(state, back := Renewing()) as device:
        back.wait_for_state("renewed")
        device.publish(device.telemetry("x"), b"1", wait=20)
    assert Credentials.from_folder(state).leaf_der == stand.live(name).certificate_der


@pytest.mark.parametrize("signature", [b"", b"0" * 70])
def test_nothing_counts_as_confirmed_that_the_station_did_not_confirm(stand: Stand, signature: bytes) -> None:
    name = f"sensor-{secrets.token_hex(4)}"
    state, watching = stand.device(name), Renewing()

    def lie(request: RenewalRequest, station: Station) -> list[RenewalAnswer]:
        if request.kind == "renew":
            return [station()]
        return [RenewalAnswer("confirmed", request.nonce, signature=signature)]  # only the gateway has heard of it

    with Between(stand, lie), client(state, watching) as device:
        device.renew()
        watching.wait_for_state("confirming", 2)
    assert "renewed" not in watching.states
    assert Credentials.from_folder(state).pem_path.name == "active"
    with Between(stand, honest), client(state, back := Renewing()):
        back.wait_for_state("renewed")
    assert Credentials.from_folder(state).leaf_der == stand.live(name).certificate_der


def test_lies_about_a_request_cost_attempts_and_no_certificates(stand: Stand) -> None:
    """Each new key would be one more certificate on the CRL, and one renewal less for today."""
    name = f"sensor-{secrets.token_hex(4)}"
    state, watching = stand.device(name), Renewing()
    lies: list[dict[str, Any]] = [
        {"outcome": "refused", "leaf_der": b"", "chain_der": ()},
        {"leaf_der": b"junk"},
        {"leaf_der": stand.live(name).certificate_der},
        {"chain_der": ()},
        {"outcome": "refused", "leaf_der": b"", "retry": True, "signature": b"1" * 70},
    ]

    def lie(request: RenewalRequest, station: Station) -> list[RenewalAnswer]:
        answer = station()
        return [answer.changed(**lies.pop(0))] if lies and request.kind == "renew" else [answer]

    with Between(stand, lie) as between, client(state, watching) as device:
        device.renew()
        watching.wait_for_state("renewed")
        assert between.count("renew") == 6
    old, new = stand.rows(name)
    assert (old.state, new.state, old.replaced_by) == (State.ATTESTED, State.ATTESTED, new.number)


def test_a_word_to_renew_is_the_stations_and_holds_for_one_certificate(stand: Stand) -> None:
    name = f"sensor-{secrets.token_hex(4)}"
    state, watching = stand.device(name), Renewing()
    genuine = Seals(stand.station).sealed(RenewalAnswer("renew-now"), stand.live(name))
    other = stand.device(f"{name}-2")
    for_another = Seals(stand.station).sealed(RenewalAnswer("renew-now"), stand.live(f"{name}-2"))
    with Between(stand, honest) as between, client(state, watching) as device:
        for forged in (RenewalAnswer("renew-now"), RenewalAnswer("renew-now", signature=b"0" * 70), for_another):
            stand.answer_as_service(name, forged.to_bytes())
        device.publish(device.telemetry("x"), b"1", wait=20)
        assert between.asked == []
        stand.answer_as_service(name, genuine.to_bytes())
        watching.wait_for_state("renewed")
        stand.answer_as_service(name, genuine.to_bytes())
        device.renew()  # the control: after the word was repeated, this is the only other renewal
        watching.wait_for_state("renewed", 2)
        assert between.count("renew") == 2
    assert RenewalStore(other).asked() is None


LONGEST = (
    RenewalAnswer("refused", retry=True, retry_after_s=MAX_WAIT_S),
    RenewalAnswer("renew-now", b"", retry_after_s=MAX_WAIT_S),
)


@pytest.mark.parametrize("longest", LONGEST, ids=lambda answer: answer.outcome)
def test_one_word_puts_nothing_off_for_good(longest: RenewalAnswer) -> None:
    assert RenewalAnswer.from_bytes(longest.to_bytes()) == longest
    for longer, cause in ((MAX_WAIT_S + 1, "more than 86400"), (10**400, "out of range")):
        with pytest.raises(RemoteProtocolError, match=f"'retry_after_s' is {cause}"):
            RenewalAnswer.from_bytes(longest.changed(retry_after_s=longer).to_bytes())


def test_requests_that_were_kept_back_undo_nothing(stand: Stand) -> None:
    """They are good signatures for ever; what was confirmed meanwhile stands."""
    name = f"sensor-{secrets.token_hex(4)}"
    state, watching, seen = stand.device(name), Renewing(), list[RenewalRequest]()

    def note(request: RenewalRequest, station: Station) -> list[RenewalAnswer]:
        seen.append(request)
        return [station()]

    with Between(stand, note), client(state, watching) as device:
        for count in (1, 2):
            device.renew()
            watching.wait_for_state("renewed", count)
        before = stand.rows(name)
        for request in seen:
            Renewals(stand.station).answer([Asked(DeviceId(name), request)])
        assert stand.rows(name) == before
        device.publish(device.telemetry("x"), b"1", wait=20)
    assert len(seen) == 4
