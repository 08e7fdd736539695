"""A station whose registry is in a database: backed up, destroyed, brought back, looked at by the doctor."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from support.station import PASSPHRASE, Command, enrolled_row, new_station

from birthmark.device.errors import AuthorityError, RegistryError
from birthmark.provisioning import audit_check
from birthmark.provisioning.backup import back_up, read_backup
from birthmark.provisioning.checkup import gather
from birthmark.provisioning.crl_store import current_crl
from birthmark.provisioning.registry.opening import setting_from
from birthmark.provisioning.restore import ROWS_JUMP, Restored, restore
from birthmark.provisioning.revocation import revoke
from birthmark.provisioning.settings import RegistrySetting
from birthmark.provisioning.station import Station

if TYPE_CHECKING:
    from pathlib import Path

    from support.postgres import Server

SECRET = b"the backup's own passphrase"
LOST = x509.ReasonFlags.key_compromise


@pytest.fixture(params=["sqlite", "postgresql"])
def station(request: pytest.FixtureRequest, tmp_path: Path) -> Station:
    url = "sqlite:///registry.db"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").new_schema()
    return new_station(tmp_path / "station", registry=url)


def backed_up(station: Station, path: Path) -> Path:
    back_up(station, path, SECRET, cost_log2=2)
    return path


def brought_back(backup: Path, folder: Path, to: str | None = None, passphrase: bytes = PASSPHRASE) -> Restored:
    setting = None if to is None else setting_from(to)
    return restore(backup, folder, backup_passphrase=SECRET, passphrase=passphrase, registry=setting)


def test_a_destroyed_station_goes_on_and_repeats_nothing(
    station: Station, tmp_path: Path, postgres: Server
) -> None:
    for number in (1, 2, 3):
        enrolled_row(station, f"sensor-{number}")
    revoke(station, "sensor-1", LOST)
    backup = backed_up(station, tmp_path / "backup.age")
    found = read_backup(backup, SECRET)
    assert (found.rows, "registry.db" in found.manifest.files) == (3, False)
    late = revoke(station, "sensor-2", LOST).crls.current
    station.close()
    shutil.rmtree(station.folder)
    on_a_server = station.settings.registry.url.startswith("postgresql")
    for number, to in enumerate((postgres.new_schema() if on_a_server else None, "tinydb", "sqlite:///other.db")):
        restored = brought_back(backup, tmp_path / f"restored-{number}", to)
        again = restored.station
        assert again.settings.registry == (station.settings.registry if to is None else setting_from(to))
        assert restored.audit_problems == ()
        assert restored.crls.current.number > late.number
        with again.registry.view() as view:
            assert [(row.name, row.is_revoked) for row in view.rows()] == [
                ("sensor-1", True),
                ("sensor-2", False),
                ("sensor-3", False),
            ]
        assert enrolled_row(again, "sensor-4").number > ROWS_JUMP
        assert not audit_check.check(again.registry).problems
        last = current_crl(again)
        assert last is not None
        assert len(last.cert_serials) == 1
        again.close()


def test_a_restore_overwrites_no_registry_and_leaves_none_behind(
    station: Station, tmp_path: Path, postgres: Server
) -> None:
    enrolled_row(station, "sensor-1")
    backup = backed_up(station, tmp_path / "backup.age")
    enrolled_row(station, "sensor-2")
    occupied = station.settings.registry.url
    if occupied.startswith("sqlite"):
        occupied = f"sqlite:///{station.folder / 'registry.db'}"
    with pytest.raises(RegistryError, match="there is one already"):
        brought_back(backup, tmp_path / "restored", occupied)
    with station.registry.view() as view:
        assert [row.name for row in view.rows()] == ["sensor-1", "sensor-2"]
    free = postgres.new_schema()
    with pytest.raises(AuthorityError):
        brought_back(backup, tmp_path / "restored", free, passphrase=b"not this one")
    assert not (tmp_path / "restored").exists()
    restored = brought_back(backup, tmp_path / "restored", free)
    with restored.station.registry.view() as view:
        assert [row.name for row in view.rows()] == ["sensor-1"]
    restored.station.close()
    station.close()


def test_others_go_on_while_a_backup_is_written(station: Station) -> None:
    enrolled_row(station, "before")
    other = Station.open(station.folder, passphrase=PASSPHRASE)
    with station.registry.snapshot() as snapshot:
        snapshot.release()
        enrolled_row(other, "meanwhile")
        found = [placed.document.get("name") for placed in snapshot.documents if placed.table == "rows"]
        audit_bytes = station.registry.audit_path.stat().st_size
    assert found == ["before"]
    assert snapshot.audit_bytes <= audit_bytes
    other.close()
    station.close()


def test_the_doctor_looks_at_the_files_of_a_registry(station: Station) -> None:
    files = station.registry.files()
    for path in files:
        if path.exists():
            path.chmod(0o644)
    facts = {file.path: file for file in gather(station, timeout_s=None).files}
    assert files & facts.keys() == {path for path in files if path.exists()}
    assert all(facts[path].mode & ~facts[path].allowed for path in files if path.exists())
    assert facts[station.settings_path].allowed == 0o644
    station.close()


@pytest.mark.parametrize("password", ["plain", "sl/ash", "br[acket", "ha#sh"])
def test_settings_with_the_registry_s_password_are_a_secret(
    postgres: Server, tmp_path: Path, password: str
) -> None:
    url = postgres.new_schema().replace("@", f":{password}@", 1)
    station = new_station(tmp_path / "station", registry=url)
    facts = {file.path: file for file in gather(station, timeout_s=None).files}
    assert (facts[station.settings_path].allowed, facts[station.settings_path].is_secret) == (0o600, True)
    station.close()


def test_a_founding_that_fails_leaves_no_registry_behind(postgres: Server, tmp_path: Path) -> None:
    url = postgres.new_schema()
    (tmp_path / "station").mkdir()
    from birthmark.provisioning.founding import found_station
    from birthmark.provisioning.settings import Settings

    with pytest.raises(AuthorityError):
        found_station(tmp_path / "station", Settings("Acme", registry=RegistrySetting(url)), passphrase=b"")
    station = new_station(tmp_path / "station", registry=url)
    with pytest.raises(RegistryError, match="there is one already"):
        new_station(tmp_path / "other", registry=url)
    with station.registry.view() as view:
        assert view.rows() == []
    assert not (tmp_path / "other").exists()
    station.close()


def test_the_commands(station: Station, birthmark: Command) -> None:
    birthmark.folder = station.folder
    enrolled_row(station, "pump-1")
    enrolled_row(station, "valve-1")
    for words in (
        ["list", "--name", "pump-*"],
        ["show", "PUMP-1"],
        ["batch", "open", "W47"],
        ["batch", "report"],
        ["issue-operator", "alice"],
        ["revoke", "pump-1", "--reason", "lost"],
        ["crl"],
        ["audit", "verify"],
        ["doctor", "--offline"],
        ["ca", "rollover", "status"],
        ["quarantine", "list"],
    ):
        answer = birthmark(*words, "--json")
        assert answer.exit_code == (1 if words[0] == "doctor" else 0), (words, answer.stderr)
    assert [row["name"] for row in birthmark("list", "--name", "pump-*", "--json").records] == ["pump-1"]
    station.close()
