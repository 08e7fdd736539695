"""Two attempts under one name at once: one of them makes the identity, and the other one is told so."""

from __future__ import annotations

from threading import Event, Thread
from typing import TYPE_CHECKING

import pytest
from support.patience import PATIENCE_S
from support.station import PASSPHRASE

from birthmark.device.errors import BirthmarkError, EnrollmentRefusedError
from birthmark.device.pem import CERTIFICATE, read_blocks
from birthmark.provisioning.issuing import issue_broker, issue_operator
from birthmark.provisioning.registry.model import State
from birthmark.provisioning.station import Station, utc_now

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path


def test_an_attempt_at_work_is_not_taken_for_a_killed_one(living: Station, tmp_path: Path) -> None:
    signing, go_on = Event(), Event()
    refusals: list[BirthmarkError] = []

    def clock() -> datetime:
        signing.set()  # its row is in KEYED by now
        assert go_on.wait(PATIENCE_S)
        return utc_now()

    def attempt(station: Station) -> None:
        try:
            issue_operator(station, "alice", tmp_path)
        except BirthmarkError as error:
            refusals.append(error)

    slow = Station(living.folder, living.settings, living.registry, passphrase=PASSPHRASE, clock=clock)
    first = Thread(target=attempt, args=[slow])
    second = Thread(target=attempt, args=[Station.open(living.folder, passphrase=PASSPHRASE)])
    first.start()
    assert signing.wait(PATIENCE_S)
    second.start()
    second.join(0.3)
    assert second.is_alive(), "it does not wait for the first"
    go_on.set()
    first.join(PATIENCE_S)
    second.join(PATIENCE_S)
    with living.registry.view() as view:
        (row,) = view.named("alice")
    assert not row.is_revoked
    assert [type(refusal) for refusal in refusals] == [EnrollmentRefusedError]
    blocks = read_blocks((tmp_path / "alice.pem").read_bytes())
    assert next(der for label, der in blocks if label == CERTIFICATE) == row.certificate_der


def test_a_gateway_counts_as_issued_once_all_its_files_are_there(living: Station, tmp_path: Path) -> None:
    out = tmp_path / "gateway"
    (out / "crl.pem").mkdir(parents=True)  # in the way
    with pytest.raises(IsADirectoryError):
        issue_broker(living, ["localhost"], out)
    with living.registry.view() as view:
        (row,) = view.named("localhost")
    assert row.state is State.ISSUED
    (out / "crl.pem").rmdir()
    finished = issue_broker(living, ["localhost"], out)
    assert (finished.row.number, finished.row.state) == (row.number, State.ATTESTED)
    assert all(path.is_file() for path in finished.paths)
    assert sorted(path.name for path in out.iterdir()) == ["clients-ca.pem", "crl.pem", "server.pem"]
