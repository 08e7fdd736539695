"""Which of two certificates a client goes by, where neither leads anywhere: by turns, with growing pauses."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from support.waiting import eventually

from birthmark.device.backoff import Backoff
from birthmark.device.clock import Clock
from birthmark.device.connection_checks import Check
from birthmark.device.credentials import Credentials
from birthmark.device.errors import RefusedError, UnreachableError
from birthmark.device.identity import DeviceId
from birthmark.device.renewal import making
from birthmark.device.renewal.messages import RenewalAnswer, RenewalRequest
from birthmark.device.renewal.renewer import TRIALS, UNREACHED, Renewer
from birthmark.device.renewal.schedule import Pace
from birthmark.device.renewal.store import RenewalStore
from birthmark.provisioning.renewal import Asked, Renewals

if TYPE_CHECKING:
    from pathlib import Path

    from support.renewal_stand import Stand

    from birthmark.device.errors import ConnectionFailedError
    from birthmark.device.events import RenewalChanged
    from birthmark.provisioning.station import Station

PACE = Pace(answered_within_s=30.0, repeat=Backoff(0.01, 0.08))


class Connection:
    """A client that never gets anywhere: each certificate ends in what `fate` says."""

    def __init__(self, fate: dict[bytes, ConnectionFailedError]) -> None:
        self.fate = fate
        self.renewer: Renewer
        self.device_id: DeviceId
        self.station: Station | None = None
        self.asked: list[RenewalRequest] = []
        self.used: list[bytes] = []
        self.told: list[RenewalChanged] = []

    def attempt(self, credentials: Credentials) -> None:
        """One attempt, as the client's worker reports it."""
        self.renewer.settled(credentials, self.fate.get(credentials.leaf_der))

    def use(self, credentials: Credentials) -> None:
        self.used.append(credentials.leaf_der)
        for _ in range(UNREACHED):
            self.attempt(credentials)

    def keep(self, credentials: Credentials) -> None:
        pass

    def publish_request(self, payload: bytes) -> None:
        self.asked.append(RenewalRequest.from_bytes(payload))
        self.answer(self.asked[-1])

    def answer(self, request: RenewalRequest) -> None:
        """Have the station answer, if there is one."""
        if self.station is not None:
            (answer,) = Renewals(self.station).answer([Asked(self.device_id, request)])
            self.renewer.answered(answer.to_bytes())

    def ask_apart(self, *_: object) -> RenewalAnswer | None:
        raise AssertionError("nothing has expired")

    def tell(self, event: RenewalChanged) -> None:
        self.told.append(event)

    def waits(self) -> list[float]:
        return [event.retry_in_s for event in self.told if event.retry_in_s is not None]


def renewer(state: Path, fate: dict[bytes, ConnectionFailedError]) -> tuple[Renewer, Connection, Credentials]:
    connection = Connection(fate)
    made = Renewer(
        RenewalStore(state),
        connection,
        clock=Clock(),
        pace=PACE,
        uniform=lambda _low, high: high,
    )
    connection.renewer = made
    return made, connection, made.prepare(Credentials.from_folder(state))


@pytest.mark.parametrize("error", [RefusedError("no"), UnreachableError("nobody")])
def test_neither_leads_anywhere(stand: Stand, error: ConnectionFailedError) -> None:
    name = f"nowhere-{type(error).__name__}".lower().replace("error", "")
    state = stand.device(name)
    stand.grant(state)
    candidate, current = RenewalStore(state).candidate(), Credentials.from_folder(state)
    assert candidate is not None
    made, connection, first = renewer(state, {candidate.leaf_der: error, current.leaf_der: error})
    assert first == candidate
    made.start()
    try:
        for _ in range(UNREACHED):
            connection.attempt(first)
        eventually(lambda: len(connection.used) >= 8, f"turns; there were {connection.told}")
    finally:
        made.stop(timeout_s=20)
    turns = [current.leaf_der, candidate.leaf_der] * 20
    assert connection.used == turns[: len(connection.used)]
    waits = connection.waits()
    assert waits == sorted(waits), "each pause is at least as long as the one before"
    assert len(waits) >= 4, "there is one for each failure of the new one"
    assert waits[3] == 0.08
    assert RenewalStore(state).candidate() is not None, "it may be the one that the station counts on"


def half_way(stand: Stand, name: str) -> tuple[Renewer, Connection, Credentials, Path]:
    """A device with a new certificate that the gateways refuse, while they let the old one in."""
    state = stand.device(name)
    stand.grant(state)
    candidate = RenewalStore(state).candidate()
    assert candidate is not None
    made, connection, first = renewer(state, {candidate.leaf_der: RefusedError("no")})
    assert first == candidate
    connection.device_id = DeviceId(name)
    return made, connection, candidate, state


@pytest.mark.parametrize("is_confirmed", [True, False])
def test_a_new_one_that_is_refused_is_kept_for_as_long_as_the_station_keeps_it(
    stand: Stand, *, is_confirmed: bool
) -> None:
    """Also by a gateway that lags, or lies: who gives up what the station counts on has nothing in the end."""
    made, connection, candidate, state = half_way(stand, f"half-way-{is_confirmed}")
    connection.station = stand.station
    if is_confirmed:
        confirmation = making.confirmation(RenewalStore(state).candidate_slot())
        Renewals(stand.station).answer([Asked(connection.device_id, confirmation)])
    made.start()
    try:
        connection.attempt(candidate)
        eventually(lambda: len(connection.asked) >= 2, f"two questions; there was {connection.told}")
    finally:
        made.stop(timeout_s=20)
    assert RenewalStore(state).candidate() == candidate
    assert "rolled-back" not in [event.state for event in connection.told]
    waits = connection.waits()
    assert max(waits) == waits[-1] == 0.08, "with growing pauses"


def test_a_confirmation_that_comes_by_the_old_one_has_the_client_go_by_the_new_one(stand: Stand) -> None:
    """The gateway fell over meanwhile, and the question went out again once somebody was reached."""
    state = stand.device("overtaken")
    stand.grant(state)
    made, connection, candidate = renewer(state, {})
    connection.device_id = DeviceId("overtaken")
    made._settled(candidate, None)
    made._step()
    (confirmation,) = connection.asked
    for _ in range(1 + UNREACHED):
        made._settled(candidate, UnreachableError("nobody"))
    assert connection.used == [Credentials.from_slot(state / "active").leaf_der]
    (answer,) = Renewals(stand.station).answer([Asked(connection.device_id, confirmation)])
    made._read(answer.to_bytes())
    assert connection.told[-1].state == "renewed"
    assert connection.used[-1] == candidate.leaf_der == Credentials.from_folder(state).leaf_der


def test_a_new_one_that_is_refused_is_given_up_when_the_station_gives_it_up(stand: Stand) -> None:
    made, connection, candidate, state = half_way(stand, "half-void")
    made.start()
    try:
        connection.attempt(candidate)
        eventually(lambda: len(connection.asked) >= 1, f"a question; there was {connection.told}")
        assert connection.used.count(candidate.leaf_der) < TRIALS
        nonce = connection.asked[0].nonce
        made.answered(RenewalAnswer("refused", nonce, reason="forged").to_bytes())
        eventually(lambda: len(connection.asked) >= 2, f"another question; there was {connection.told}")
        assert RenewalStore(state).candidate() == candidate
        stand.revoke_open_renewal("half-void")
        connection.station = stand.station
        connection.answer(connection.asked[-1])
        eventually(
            lambda: (
                [event.state for event in connection.told][-1:] == ["rolled-back"]
                and RenewalStore(state).candidate() is None
            ),
            f"the end; there was {connection.told}",
        )
    finally:
        made.stop(timeout_s=20)
    assert connection.used[-1] == Credentials.from_folder(state).leaf_der


def test_a_clock_past_its_end_makes_nothing_due_while_the_gateway_lets_it_in(stand: Stand) -> None:
    """It is the clock that is wrong, and not the certificate; and nothing is looked at in a loop."""
    state, at = stand.device("jumping"), [datetime.now(UTC)]
    made = Renewer(RenewalStore(state), Connection({}), clock=Clock(system=lambda: at[0]), pace=PACE)
    current = made.prepare(Credentials.from_folder(state))
    made._settled(current, None)
    assert not made._is_due()
    at[0] = current.facts.not_after - timedelta(days=1)
    assert made._is_due()
    at[0] = current.facts.not_after + timedelta(days=9999)
    assert not made._is_due()
    assert made._nap_s() > 60
    made._settled(current, UnreachableError("nobody"))
    assert made._is_due()


def test_the_listener_for_what_has_expired_is_asked_for_nothing_else(stand: Stand) -> None:
    state = stand.device("sound")
    stand.grant(state)
    made, _, _ = renewer(state, {})
    expired = RefusedError("no", check=Check.EXPIRED)
    assert not made.asks_apart_after(expired), "what was granted is tried first"
    made._candidate = None
    assert made.asks_apart_after(expired)
    assert not made.asks_apart_after(RefusedError("no", check=Check.REVOKED))
    assert not made.asks_apart_after(UnreachableError("nobody"))
