"""The station's machine and the device's own agent, back to back in virtual time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.board import Noise
from support.board_agent import AgentBoard
from support.board_line import VirtualLine
from support.board_station import open_desk

from birthmark.device.link.messages import MessageType
from birthmark.provisioning.enrollment.enrol import Reached, Step, Stored, UnitRefusedError
from birthmark.provisioning.enrollment.exchange import DeviceRefusalError, NoAnswerError
from birthmark.provisioning.enrollment.journal import Action
from birthmark.provisioning.registry.model import KeyMode, Kind, State

if TYPE_CHECKING:
    from pathlib import Path

    from support.board_station import Desk

    from birthmark.provisioning.registry.model import Row

HWID = bytes.fromhex("a1b2c3d4e5f60718293a4b5c")
MODES = pytest.mark.parametrize("keys", list(KeyMode))


class AgentLine(VirtualLine):
    """A line in virtual time with the agent at its end."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(**options)
        self.agent = AgentBoard(folder, HWID, self.clock)
        self.board = self.agent


@MODES
@pytest.mark.parametrize("byte_by_byte", [False, True])
def test_enrolled(desk: Desk, tmp_path: Path, keys: KeyMode, byte_by_byte: bool) -> None:
    row = desk.enrol(AgentLine(tmp_path / "board", byte_by_byte=byte_by_byte), keys=keys)
    assert row.state is State.ATTESTED
    assert desk.authority.signed == [row.cert_serial]


@MODES
@pytest.mark.parametrize(
    "after", [*(s for s in Step if s is not Step.UNLOCK), State.RESERVED, State.KEYED, State.ISSUED]
)
def test_the_device_reboots_and_the_station_too(
    desk: Desk, tmp_path: Path, keys: KeyMode, after: Step | State
) -> None:
    line = AgentLine(tmp_path / "board")

    class GoneError(Exception):
        pass

    def both(effect: object) -> None:
        if (isinstance(effect, Reached) and effect.step is after) or (
            isinstance(effect, Stored) and effect.row.state is after
        ):
            raise GoneError

    with pytest.raises(GoneError):
        desk.enrol(line, keys=keys, watch=both)
    line.agent.reboot()
    row = desk.enrol(line, keys=keys)
    assert desk.states() == [State.ATTESTED]
    assert set(desk.authority.signed) == {row.cert_serial}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32), loss=st.sampled_from([1e-4, 1e-3, 5e-3]), flips=st.sampled_from([0, 1e-5, 1e-4])
)
def test_noise(tmp_path_factory: pytest.TempPathFactory, seed: int, loss: float, flips: float) -> None:
    """Enrolled within four attempts, with one certificate."""
    folder = tmp_path_factory.mktemp("noise")
    desk = open_desk(folder / "station")
    line = AgentLine(
        folder / "board",
        to_board=Noise(seed, loss=loss, flips=flips),
        to_station=Noise(seed + 1, loss=loss, flips=flips),
    )
    for attempt in range(4):
        try:
            desk.enrol(line)
            break
        except NoAnswerError:
            assert attempt < 3
    assert desk.states() == [State.ATTESTED]
    assert len(set(desk.authority.signed)) == 1


class TestProvisionedAgain:
    """A row that replaces another one opens the device's lock with the CA's signature."""

    def replacing(self, desk: Desk, old: Row) -> None:
        with desk.registry.transaction() as transaction:
            transaction.insert(
                kind=Kind.DEVICE,
                name=old.name,
                role=old.role,
                key_mode=old.key_mode,
                hwid=old.hwid,
                txn=b"second txn 4 it.",
                replaces=old.number,
            )

    def made(self, desk: Desk, line: AgentLine) -> Row:
        old = desk.enrol(line)
        with pytest.raises(UnitRefusedError) as caught:
            desk.enrol(line)
        assert caught.value.action is Action.DUPLICATE
        self.replacing(desk, old)
        return old

    @MODES
    def test_it_gets_a_new_identity(self, desk: Desk, tmp_path: Path, keys: KeyMode) -> None:
        line = AgentLine(tmp_path / "board")
        old = self.made(desk, line)
        seen: list[object] = []
        new = desk.enrol(line, keys=keys, watch=seen.append)
        assert Step.UNLOCK in [effect.step for effect in seen if isinstance(effect, Reached)]
        assert new.state is State.ATTESTED
        assert new.cert_serial != old.cert_serial
        rows = desk.rows()
        assert rows[0].state is State.VOID
        assert rows[0].is_revoked
        assert not rows[-1].is_revoked

    @pytest.mark.parametrize(
        "after", [Step.UNLOCK, State.KEYED, State.ISSUED, State.PREPARED, Step.COMMIT, State.COMMITTED]
    )
    def test_cut_in_between(self, desk: Desk, tmp_path: Path, after: Step | State) -> None:
        line = AgentLine(tmp_path / "board")
        old = self.made(desk, line)

        class GoneError(Exception):
            pass

        def cut(effect: object) -> None:
            if (isinstance(effect, Reached) and effect.step is after) or (
                isinstance(effect, Stored) and effect.row.state is after
            ):
                raise GoneError

        with pytest.raises(GoneError):
            desk.enrol(line, watch=cut)
        assert not desk.rows()[0].is_revoked, "the old identity works until the new one attests"
        line.agent.reboot()
        new = desk.enrol(line)
        assert new.state is State.ATTESTED
        assert new.number == old.number + 1

    def test_a_reboot_between_the_phases(self, desk: Desk, tmp_path: Path) -> None:
        line = AgentLine(tmp_path / "board")
        self.made(desk, line)
        sign, reboots = desk.journal.sign_unlock, [2]

        def rebooting(row: Row, old_txn: bytes, signed: bytes) -> tuple[bytes, bytes]:
            if reboots[0]:
                reboots[0] -= 1
                line.agent.reboot()
            return sign(row, old_txn, signed)

        desk.journal.sign_unlock = rebooting  # type: ignore[method-assign]
        assert desk.enrol(line).state is State.ATTESTED

    def test_another_ca_opens_nothing(self, desk: Desk, tmp_path: Path) -> None:
        line = AgentLine(tmp_path / "board")
        self.made(desk, line)
        rogue = open_desk(tmp_path / "rogue")
        desk.journal.sign_unlock = rogue.journal.sign_unlock  # type: ignore[method-assign]
        with pytest.raises(DeviceRefusalError) as caught:
            desk.enrol(line)
        assert caught.value.request is MessageType.UNLOCK
        assert desk.states() == [State.ATTESTED, State.RESERVED]
