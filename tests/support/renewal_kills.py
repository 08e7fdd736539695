"""SIGKILL at every step of a renewal, on either side: run as `python renewal_kills.py SCENARIO FOLDER STRIDE`.

Device and station work in one process that is killed at its n-th line in what touches a disk or decides: at every
point between two writes of either, and of both. After each kill both sides start anew, and finish.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.killing_ground import check_registry, survive
from support.renewal_stand import state_folder
from support.renewing import PaperDevice
from support.station import PASSPHRASE, new_station

from birthmark.device.clock import Moment
from birthmark.device.credentials import Credentials
from birthmark.device.renewal import making
from birthmark.device.renewal.store import RenewalStore
from birthmark.device.tls import device_context
from birthmark.provisioning.registry.model import State
from birthmark.provisioning.renewal import Asked, Renewals
from birthmark.provisioning.retirement import RETIREMENTS, retire_due
from birthmark.provisioning.station import Station

if TYPE_CHECKING:
    from support.killing_ground import Scenario

    from birthmark.device.renewal.messages import RenewalAnswer, RenewalRequest
    from birthmark.provisioning.registry.model import Row

NAME = "sensor-17"


def opened(folder: Path) -> Station:
    return Station.open(folder / "station", passphrase=PASSPHRASE)


def rows(station: Station) -> list[Row]:
    with station.registry.view() as view:
        return view.named(NAME)


def answered(station: Station, store: RenewalStore, request: RenewalRequest) -> RenewalAnswer:
    asked = Asked(store.current_slot().bundle.config.device_id, request)
    (answer,) = Renewals(station).answer([asked])
    return answer


def renew(station: Station, store: RenewalStore) -> None:
    """Go on from wherever the device is, as its client does."""
    if store.candidate() is None:
        current = store.current_slot()
        asked = store.asked()
        if asked is None:
            asked = making.new_key(current.bundle.config.device_id)
            store.keep_asked(asked)
        request = making.renewal_request(current, asked)
        answer = answered(station, store, request)
        slot = making.granted(answer, request, current=current, asked=asked, moment=Moment(datetime.now(UTC)))
        store.keep_candidate(slot)
    answer = answered(station, store, making.confirmation(store.candidate_slot()))
    assert answer.outcome == "confirmed", answer.reason
    store.confirm()


class Renew:
    """The device always has an identity that is let in; in the end there are one certificate and the old one."""

    def prepare(self, folder: Path) -> None:
        station = new_station(folder / "station")
        state_folder(folder / "device", station, PaperDevice.made(station, NAME), 8883)

    def act(self, folder: Path) -> None:
        renew(opened(folder), RenewalStore(folder / "device"))

    def check(self, folder: Path, *, finished: bool) -> None:
        check_registry(folder / "station")
        station, store = opened(folder), RenewalStore(folder / "device")
        in_use = Credentials.from_folder(folder / "device")
        device_context(in_use)  # key and certificate fit
        found = rows(station)
        (mine,) = [row for row in found if row.certificate_der == in_use.leaf_der]
        assert not mine.is_revoked, "the gateways let it in with what it holds"
        candidate = store.candidate()
        live = next(row for row in found if row.is_live)
        assert live.certificate_der in {in_use.leaf_der, candidate and candidate.leaf_der}
        if not finished:
            was_renewed = in_use.pem_path.name == "renewed"
            if not was_renewed:
                renew(station, store)
        old, new = rows(station)
        assert (old.state, new.state, old.replaced_by) == (State.ATTESTED, State.ATTESTED, new.number)
        assert new.is_live
        assert old.cert_serial != new.cert_serial
        assert Credentials.from_folder(folder / "device").leaf_der == new.certificate_der
        with station.registry.view() as view:
            assert list(view.notes(RETIREMENTS)) == [str(old.number)]
        check_registry(folder / "station")


class Retire:
    """What is due is revoked once, and what is noted is forgotten with it."""

    def prepare(self, folder: Path) -> None:
        Renew().prepare(folder)
        Renew().act(folder)
        with opened(folder).registry.transaction() as transaction:
            for key, note in transaction.notes(RETIREMENTS).items():
                transaction.put_note(RETIREMENTS, key, {**note, "due": 0})

    def act(self, folder: Path) -> None:
        retire_due(opened(folder))

    def check(self, folder: Path, *, finished: bool) -> None:
        station = opened(folder)
        retired = retire_due(station)
        assert not (finished and retired)
        old, new = rows(station)
        assert (old.revocation_reason, new.is_revoked) == ("superseded", False)
        with station.registry.view() as view:
            assert view.notes(RETIREMENTS) == {}
        check_registry(folder / "station")


SCENARIOS: dict[str, Scenario] = {"renew": Renew(), "retire": Retire()}

if __name__ == "__main__":
    print(survive(SCENARIOS[sys.argv[1]], Path(sys.argv[2]), *map(int, sys.argv[3:])))
