"""A registry moved to another back end: everything that was in it, whole or not at all, and nobody left behind."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import pytest
from support.patience import PATIENCE_S
from support.station import Clock, Command, enrolled_row, keyed_row, new_station

from birthmark.device.errors import ConfigurationError, RegistryError
from birthmark.provisioning import audit, audit_check, migration, registry_commands
from birthmark.provisioning.gateway_settings import Gateway
from birthmark.provisioning.line.batches import open_batch
from birthmark.provisioning.migration import Migration, migrate
from birthmark.provisioning.registry.content import META, UNFINISHED
from birthmark.provisioning.registry.line import Quarantined
from birthmark.provisioning.registry.model import Kind, State
from birthmark.provisioning.registry.opening import setting_from
from birthmark.provisioning.registry.sql import SqlRegistry
from birthmark.provisioning.settings import RegistrySetting, read_settings
from birthmark.provisioning.settings_edit import add_gateway, put_registry
from birthmark.provisioning.station import Station

if TYPE_CHECKING:
    from pathlib import Path

    from support.postgres import Server

    from birthmark.provisioning.registry.interface import StoredRegistry

SQLITE = "sqlite:///registry.db"


BY: dict[str, Any] = {"clock": Clock(), "actor": "test@host"}


def silent(_what: str, _rows: int) -> None:
    pass


def furnish(station: Station) -> None:
    """Put one of everything into the registry."""
    made = enrolled_row(station, "made")
    keyed_row(station, "keyed")
    open_batch(station, "W47")
    with station.registry.transaction() as transaction:
        begun = transaction.insert(
            kind=Kind.DEVICE,
            name="again",
            role="camera",
            hwid=b"another unit",
            txn=bytes(16),
            bundle_sha256=bytes(32),
            batch="W47",
            label="colour: blue",
        )
        transaction.update(begun.changed(state=State.VOID, void_reason="given up"))
        made = transaction.update(made.changed(revoked_at=station.clock(), revocation_reason="superseded"))
        transaction.insert(
            kind=Kind.DEVICE,
            name="made",
            role="sensor",
            hwid=made.hwid,
            txn=bytes(range(16)),
            replaces=made.number,
            replaces_reason="keyCompromise",
        )
        transaction.quarantine(Quarantined(b"odd one", station.clock(), "", "is locked", bytes(16)))
        transaction.quarantine(Quarantined(b"odd two", station.clock(), "made", "is locked", bytes(16)))
        transaction.clear_quarantine(b"odd one")
        transaction.put_note("topic", "key", {"deep": {"n": [1, None, "ä\u0000"]}})
        transaction.set_counter("big", 1 << 158)
        transaction.record("furnish", "station")


def held(registry: StoredRegistry) -> list[Any]:
    """Everything in a registry, but for what every move adds: the head of the audit log and its outbox."""
    with registry.documents() as documents:
        found = [
            (placed.table, placed.number, placed.document) for placed in documents if placed.table != "outbox"
        ]
    assert found[0][0] == META
    for name in ("audit_seq", "audit_hash"):
        del found[0][2][name]
    return found


def moved(station: Station, to: str) -> Station:
    """Move a station's registry and open it again."""
    setting = setting_from(to)
    counted: list[tuple[str, int]] = []
    migration = migrate(station, setting, tell=lambda what, rows: counted.append((what, rows)))
    assert counted == [(what, n) for what in ("copied", "verified") for n in range(1, migration.rows + 1)]
    assert migration.trouble == ""
    station.close()
    again = Station.open(station.folder, passphrase=b"never asked for", clock=station.clock)
    assert again.settings.registry == setting
    with pytest.raises(RegistryError, match="there is one already"):  # whoever comes now finds it in use
        again.registry.make()
    return again


def test_everything_arrives_wherever_it_goes(station: Station, postgres: Server) -> None:
    furnish(station)
    add_gateway(station.settings_path, Gateway("gw-1", crl_path=station.folder / "gw.pem"))
    before, settings = held(station.registry), station.settings_path.read_text()
    assert {table for table, _, _ in before} == {"meta", "rows", "batches", "quarantine", "notes"}
    url = postgres.new_schema()
    for to in (SQLITE, url, "sqlite:///other.db", "tinydb", url, "tinydb", SQLITE, "tinydb"):
        station = moved(station, to)
        assert held(station.registry) == before
        verdict = audit_check.check(station.registry)
        assert (verdict.problems, verdict.restored) == ((), ())
        (*_, entry) = audit.read(station.registry.audit_path)
        assert (entry["action"], entry["details"]["rows"]) == ("registry-migrate", 4)
        assert entry["details"]["after"] == station.registry.shown
    assert station.settings_path.read_text() == settings
    with station.registry.transaction() as transaction:
        row = transaction.insert(kind=Kind.DEVICE, name="new", role="sensor", hwid=b"new one", txn=bytes(16))
        assert row.number == 5
    station.close()


@pytest.mark.parametrize("to", [SQLITE, "postgresql"])
def test_the_old_one_is_not_opened_by_mistake(station: Station, to: str, postgres: Server) -> None:
    old = station.settings.registry
    station = moved(station, postgres.new_schema() if to == "postgresql" else to)
    put_registry(station.settings_path, old)
    with pytest.raises(RegistryError, match="was moved elsewhere") as caught:
        Station.open(station.folder)
    assert "station.toml" in caught.value.hint
    put_registry(station.settings_path, station.settings.registry)
    back = moved(station, "tinydb")
    put_registry(back.settings_path, station.settings.registry)
    with pytest.raises(RegistryError, match="was moved elsewhere"):
        Station.open(station.folder)


def test_who_works_with_the_old_one_is_told_and_loses_nothing(station: Station) -> None:
    station.close()
    acknowledged: list[str] = []
    told: list[RegistryError] = []
    some = threading.Event()

    def work(who: int) -> None:
        registry = Station.open(station.folder, clock=station.clock).registry
        for each in range(10_000):
            name = f"d-{who}-{each}"
            try:
                with registry.transaction() as transaction:
                    transaction.insert(
                        kind=Kind.DEVICE, name=name, role="sensor", hwid=name.encode(), txn=bytes(16)
                    )
                    transaction.record("reserve", name)
            except RegistryError as error:
                told.append(error)
                with pytest.raises(RegistryError, match="moved"), registry.view():
                    pass
                return
            acknowledged.append(name)
            if len(acknowledged) > 20:
                some.set()

    workers = [threading.Thread(target=work, args=(who,)) for who in range(3)]
    for worker in workers:
        worker.start()
    assert some.wait(PATIENCE_S)
    after = moved(station, SQLITE)
    for worker in workers:
        worker.join(PATIENCE_S)
        assert not worker.is_alive()
    assert [error.message for error in told if "this station has moved to another one meanwhile" in error.message]
    assert len(told) == 3
    with after.registry.view() as view:
        assert sorted(row.name for row in view.rows()) == sorted(acknowledged)
    assert not audit_check.check(after.registry).problems


def test_what_cannot_be_carried_over_stays_where_it_is(station: Station) -> None:
    keyed_row(station, "sensor-1")
    path = station.folder / "registry.json"
    tables = json.loads(path.read_text())
    tables["rows"]["1"]["colour"] = "blue"
    path.write_text(json.dumps(tables))
    station.close()  # what it read before is kept for as long as the file is the same one
    with pytest.raises(RegistryError, match="1 rows were sent, 1 arrived, and not all") as caught:
        migrate(station, RegistrySetting(SQLITE), tell=silent)
    assert "newer birthmark" in caught.value.hint
    with pytest.raises(RegistryError, match="there is none"), SqlRegistry(station.folder, SQLITE, **BY).view():
        pass
    with Station.open(station.folder).registry.view() as view:
        assert view.live_by_name("sensor-1")


def test_another_registry_is_never_overwritten(station: Station, tmp_path: Path, postgres: Server) -> None:
    elsewhere = f"sqlite:///{tmp_path / 'other.db'}"
    for url in (elsewhere, postgres.new_schema()):
        registry = SqlRegistry.create(tmp_path, url, clock=station.clock, actor="other@host")
        with registry.transaction() as transaction:
            transaction.set_counter("mine", 7)
        with pytest.raises(RegistryError, match="there is one already"):
            migrate(station, RegistrySetting(url), tell=silent)
        with registry.view() as view:
            assert view.counter("mine") == 7
        registry.close()
    assert not read_settings(station.settings_path).registry.url
    with pytest.raises(ConfigurationError, match="that is where it is"):
        migrate(station, RegistrySetting(), tell=silent)


def test_who_overtakes_is_found_out(station: Station, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another station brings its registry to the same place, after this one's was verified."""
    url = f"sqlite:///{tmp_path / 'both.db'}"
    other = new_station(tmp_path / "other")
    real = SqlRegistry.arrive

    def overtaken(self: SqlRegistry, *arguments: Any, **details: Any) -> list[str]:
        monkeypatch.setattr(SqlRegistry, "arrive", real)
        migrate(other, RegistrySetting(url), tell=silent)
        return real(self, *arguments, **details)

    monkeypatch.setattr(SqlRegistry, "arrive", overtaken)
    with pytest.raises(RegistryError, match="another station has begun to do the same"):
        migrate(station, RegistrySetting(url), tell=silent)
    assert not read_settings(station.settings_path).registry.url
    with Station.open(other.folder).registry.view():
        pass


@pytest.mark.parametrize("to", [SQLITE, "tinydb"])
def test_one_that_was_killed_after_the_switch_is_taken_up(station: Station, to: str) -> None:
    station = moved(station, SQLITE)
    if to == "tinydb":
        station = moved(station, to)
    station.registry.stand(f"{UNFINISHED} by somebody who was killed")
    with station.registry.transaction() as transaction:
        transaction.set_counter("mine", 7)
    with pytest.raises(RegistryError, match="there is one already"):
        station.registry.make()
    with station.registry.view() as view:
        assert view.counter("mine") == 7


def test_a_shared_registry_is_not_moved_from_under_the_others(
    station: Station, tmp_path: Path, clock: Clock, postgres: Server
) -> None:
    station = moved(station, postgres.new_schema())
    (tmp_path / "line-2").mkdir()
    url = station.settings.registry.url
    other = SqlRegistry(tmp_path / "line-2", url, clock=clock, actor="other@host", log="line-2")
    with other.transaction() as transaction:
        transaction.record("look", "station")
    with pytest.raises(RegistryError, match="other stations share it"):
        migrate(station, RegistrySetting(), tell=silent)
    assert held(other)[0] == held(station.registry)[0]
    other.close()
    station.close()


def test_the_command(birthmark: Command, living: Station) -> None:
    enrolled_row(living, "sensor-1")
    done = birthmark("registry", "migrate", SQLITE, "--json")
    assert done.exit_code == 0, done.stderr
    assert done.records[0]["rows"] == 1
    assert birthmark("show", "sensor-1").exit_code == 0
    assert birthmark("revoke", "sensor-1", "--reason", "lost").exit_code == 0
    refused = birthmark("registry", "migrate", "postgresql://me:verysecret@localhost/x")
    assert refused.exit_code == 2
    assert "everybody can read arguments" in refused.stderr
    assert "verysecret" not in refused.stderr
    assert birthmark("registry", "migrate", "tinydb").exit_code == 0
    listed = birthmark("list", "--json").records
    assert [(row["name"], row["revoked"]) for row in listed] == [("sensor-1", "keyCompromise")]


@pytest.mark.parametrize("stage", ["copied", "verified", "moved"])
def test_who_interrupts_a_move_is_told_where_the_registry_is(
    birthmark: Command, living: Station, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    furnish(living)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    def until(what: str, _rows: int) -> None:
        if what == stage:
            stopped()

    def interrupted(station: Station, to: RegistrySetting, **_: object) -> Migration:
        return migrate(station, to, tell=until)

    with monkeypatch.context() as patch:
        if stage == "moved":
            patch.setattr(migration, "append_missing", stopped)
        else:
            patch.setattr(registry_commands, "migrate", interrupted)
        answer = birthmark("registry", "migrate", SQLITE, "--json")
    assert (answer.exit_code, answer.records) == (130, [{"event": "interrupted", "moved": stage == "moved"}])
    with Station.open(living.folder).registry.view() as view:
        assert view.live_by_name("made") is not None
    again = birthmark("registry", "migrate", SQLITE)
    assert again.exit_code == (1 if stage == "moved" else 0)
