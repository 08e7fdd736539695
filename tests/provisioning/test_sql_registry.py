"""The registry in a database: what can happen to it, and to the station's other half, the audit log."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
import threading
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, insert, text, update
from support.patience import PATIENCE_S
from support.postgres import running
from support.station import NOON, Clock

from birthmark.device.errors import ConfigurationError, RegistryError
from birthmark.provisioning import audit_check
from birthmark.provisioning.registry import sql_schema as schema
from birthmark.provisioning.registry import sql_views
from birthmark.provisioning.registry.grouped import GroupedRegistry
from birthmark.provisioning.registry.interface import RegistryAwayError
from birthmark.provisioning.registry.model import Kind, Row, State
from birthmark.provisioning.registry.sql import SqlRegistry
from birthmark.provisioning.registry.sql_database import Database, has_password, shown_url
from birthmark.provisioning.registry.sql_schema import META, ROWS, row_record
from birthmark.provisioning.registry.sql_views import SqlView

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from support.postgres import Server

    from birthmark.provisioning.registry.interface import Transaction

SQLITE = "sqlite:///registry.db"
ADDER = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from birthmark.provisioning.registry.model import Kind
from birthmark.provisioning.registry.sql import SqlRegistry
folder, url, log, who, count = sys.argv[1:]
registry = SqlRegistry(Path(folder), url, clock=lambda: datetime.now(UTC), actor="test@host", log=log)
for each in range(int(count)):
    name = f"d-{who}-{each}"
    with registry.transaction() as transaction:
        transaction.set_counter("n", transaction.counter("n") + 1)
        transaction.insert(kind=Kind.DEVICE, name=name, role="sensor", hwid=name.encode(), txn=bytes(16))
        transaction.record("reserve", name)
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "sqlite":
        return SQLITE
    made: str = request.getfixturevalue("postgres").new_schema()
    return made


@pytest.fixture
def opened(tmp_path: Path, clock: Clock) -> Iterator[Callable[..., SqlRegistry]]:
    """Opens registries, and closes them in the end."""
    registries: list[SqlRegistry] = []

    def open_registry(url: str, folder: str = "station", *, log: str = "", make: bool = False) -> SqlRegistry:
        (tmp_path / folder).mkdir(exist_ok=True)
        open_or_create = SqlRegistry.create if make else SqlRegistry
        registries.append(open_or_create(tmp_path / folder, url, clock=clock, actor="test@host", log=log))
        return registries[-1]

    yield open_registry
    for registry in registries:
        registry.close()


@pytest.fixture
def registry(url: str, opened: Callable[..., SqlRegistry]) -> SqlRegistry:
    return opened(url, make=True)


def insert_device(transaction: Transaction, name: str) -> Row:
    transaction.record("reserve", name)
    return transaction.insert(
        kind=Kind.DEVICE, name=name, role="sensor", hwid=name.encode().ljust(4), txn=bytes(16)
    )


def add(registry: SqlRegistry, name: str = "sensor-1") -> Row:
    with registry.transaction() as transaction:
        return insert_device(transaction, name)


def names(registry: SqlRegistry) -> list[str]:
    with registry.view() as view:
        return [row.name for row in view.rows()]


def outside(registry: SqlRegistry, statement: Any) -> None:
    """Run a statement as another program would, past every rule of ours."""
    with registry._database.connect() as connection:
        connection.execute(statement)


def verdict_of(registry: SqlRegistry) -> audit_check.Verdict:
    return audit_check.check(registry)


def test_processes_of_two_folders_at_once_lose_nothing(
    url: str, registry: SqlRegistry, tmp_path: Path, opened: Callable[..., SqlRegistry]
) -> None:
    if url == SQLITE:
        url = f"sqlite:///{tmp_path / 'station' / 'registry.db'}"
    other = opened(url, "other", log="line-2")
    command = [sys.executable, "-c", ADDER]
    at_work = [
        subprocess.Popen([*command, str(one.audit_path.parent), url, log, f"{log}-", "20"])
        for one, log in ((registry, ""), (other, "line-2"))
    ]
    assert [process.wait(timeout=90) for process in at_work] == [0] * 2
    with other.view() as view:
        assert view.counter("n") == 40
        assert len({row.name for row in view.rows()}) == 40
        assert [row.number for row in view.rows()] == list(range(1, 41))
    for one in (registry, other):
        verdict = verdict_of(one)
        assert (verdict.entries, verdict.problems, verdict.restored) == (20, (), ())
    assert registry.shares()


def test_a_registry_that_is_held_open_keeps_its_log_between_transactions(
    opened: Callable[..., SqlRegistry], tmp_path: Path
) -> None:
    registry = opened(SQLITE, make=True)
    log = tmp_path / "station" / "registry.db-wal"
    with registry.held_open():
        add(registry)
        begun = log.stat().st_ino
        assert names(registry) == ["sensor-1"]
        add(registry, "sensor-2")
        assert log.stat().st_ino == begun
    assert not log.exists()
    assert names(registry) == ["sensor-1", "sensor-2"]
    (tmp_path / "station" / "registry.db").write_bytes(b"not a database" * 100)
    with pytest.raises(RegistryError, match="not a database"), registry.held_open():
        pass


def test_a_restarted_server_ends_a_transaction_and_not_the_next(
    tmp_path: Path, opened: Callable[..., SqlRegistry]
) -> None:
    with running(durable=True) as server:
        registry = opened(server.new_schema(), make=True)
        add(registry, "before")

        def interrupted() -> None:
            with registry.transaction() as transaction:
                insert_device(transaction, "lost")
                server.restart()
                insert_device(transaction, "never")

        with pytest.raises(RegistryError, match="could not use the registry") as caught:
            interrupted()
        assert "PostgreSQL" in caught.value.hint
        assert names(registry) == ["before"]
        assert add(registry, "after").number == 2

        def interrupted_at_its_end() -> None:
            with registry.transaction() as transaction:
                insert_device(transaction, "lost")
                server.restart()

        with pytest.raises(RegistryError):
            interrupted_at_its_end()
        assert names(registry) == ["before", "after"]
        server.stop()
        with pytest.raises(RegistryError, match="could not reach the registry"), registry.view():
            pass
        server.start()
        with registry.view() as view:
            server.restart()
            with pytest.raises(RegistryError, match="could not use the registry"):
                view.rows()
        assert names(registry) == ["before", "after"]
        assert not verdict_of(registry).problems
        assert registry._database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        registry.close()


def test_a_connection_that_breaks_at_any_statement_is_said_to_be_away(
    opened: Callable[..., SqlRegistry], postgres: Server
) -> None:
    registry = opened(postgres.new_schema(), make=True)
    engine = registry._database.engine
    grouped = GroupedRegistry(registry)
    known = ["before"]
    add(registry, *known)
    left = 0

    def cut(connection: Any, *_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            pid = connection.connection.driver_connection.info.backend_pid
            assert postgres.psql(f"SELECT pg_terminate_backend({pid}, 10000)").strip() == "t"

    event.listen(engine, "before_cursor_execute", cut)
    statements = 0
    while left <= 0:
        statements += 1
        left = statements
        try:
            with grouped.transaction() as transaction:
                insert_device(transaction, f"d-{statements}")
            known.append(f"d-{statements}")
        except RegistryAwayError:
            assert names(registry) == known
    event.remove(engine, "before_cursor_execute", cut)
    assert names(registry) == known == ["before", f"d-{statements}"], "only what was not cut is there"
    assert statements > 8
    assert not verdict_of(registry).problems


def test_a_share_that_the_database_refuses_is_undone_alone(registry: SqlRegistry) -> None:
    grouped = GroupedRegistry(registry)
    with grouped.transaction() as transaction:
        insert_device(transaction, "first")
    begun, go_on = threading.Event(), threading.Event()

    def lead() -> None:
        with grouped.transaction() as transaction:
            begun.set()
            assert go_on.wait(PATIENCE_S)
            insert_device(transaction, "leader")

    leader = threading.Thread(target=lead)
    leader.start()
    assert begun.wait(PATIENCE_S)

    def fails() -> None:
        with grouped.transaction() as transaction:
            row = insert_device(transaction, "member")
            assert isinstance(transaction, SqlView)
            transaction.run(insert(ROWS), row_record(row.changed(number=99)))

    failures: list[BaseException] = []

    def join() -> None:
        try:
            fails()
        except RegistryError as error:
            failures.append(error)

    member = threading.Thread(target=join)
    member.start()
    go_on.set()
    for thread in (leader, member):
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert [str(error) for error in failures if "the database refuses it" in str(error)]
    assert names(registry) == ["first", "leader"]
    assert verdict_of(registry).entries == 2


def test_what_failed_outside_of_a_share_is_not_committed(registry: SqlRegistry) -> None:
    row = add(registry)

    def goes_on_all_the_same() -> None:
        with registry.transaction() as transaction:
            insert_device(transaction, "other")
            with pytest.raises(RegistryError, match="the database refuses it"):
                transaction.run(insert(ROWS), row_record(row.changed(number=99)))

    with pytest.raises(RegistryError, match="the database refuses it"):
        goes_on_all_the_same()
    assert names(registry) == ["sensor-1"]


@pytest.mark.parametrize(
    "clash",
    [
        {"name": "SENSOR-1"},
        {"hwid": b"sensor-1"},
        {"public_key_der": b"key", "state": State.VOID, "void_reason": "x"},
        {"cert_serial": 1 << 158, "state": State.VOID, "void_reason": "x"},
    ],
    ids=lambda clash: next(iter(clash)),
)
def test_uniqueness_holds_in_the_database_too(registry: SqlRegistry, clash: dict[str, Any]) -> None:
    with registry.transaction() as transaction:
        row = insert_device(transaction, "sensor-1")
        row = transaction.update(row.changed(state=State.KEYED, public_key_der=b"key", cert_serial=1 << 158))
    apart: dict[str, Any] = {"name": "b", "hwid": b"bbbb", "public_key_der": b"b", "cert_serial": 2, "number": 2}
    free = row.changed(**{**apart, "state": State.RESERVED, **clash})
    with pytest.raises(Exception, match=r"(?i)unique"):
        outside(registry, insert(ROWS).values(row_record(free)))
    gone = {"name": "sensor-1", "hwid": b"sensor-1", "state": State.VOID, "void_reason": "x"}
    outside(
        registry, insert(ROWS).values(row_record(row.changed(**{**apart, **gone})))
    )  # what is VOID holds nothing
    assert names(registry) == ["sensor-1", "sensor-1"]


def test_questions_at_size_are_answered_by_an_index(opened: Callable[..., SqlRegistry]) -> None:
    """On SQLite, which says so of any table; PostgreSQL takes an index when there are enough rows."""
    registry = opened(SQLITE, make=True)
    assert registry._database.path is not None
    asked: list[str] = []
    with registry.transaction() as work:
        row = insert_device(work, "sensor-1")
        work._connection.connection.dbapi_connection.set_trace_callback(asked.append)  # type: ignore[union-attr]
        work.live_by_name("a")
        work.live_by_hwid(b"aaaa")
        work.by_cert_serial(7)
        work.by_public_key(b"key")
        work.row(1)
        work.rows(revoked=True)
        work.revocations()
        work.rows(name_glob="pump-*")
        work.rows(batch="W47")
        work.rows(expires_before=NOON)
        work.update(row.changed(state=State.KEYED, public_key_der=b"key", cert_serial=7))
        insert_device(work, "sensor-2")
        work._connection.connection.dbapi_connection.set_trace_callback(None)  # type: ignore[union-attr]
    assert len(asked) > 12
    with closing(sqlite3.connect(registry._database.path)) as connection:
        for statement in asked:
            if statement.startswith(("SELECT", "UPDATE")):
                plan = [line[3] for line in connection.execute(f"EXPLAIN QUERY PLAN {statement}")]
                assert not [
                    line for line in plan if line.startswith("SCAN birthmark_rows") and "INDEX" not in line
                ]


def test_rows_come_as_they_are_asked_for(registry: SqlRegistry, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither are they made at once, nor has the server sent them all."""
    for number in range(3):
        add(registry, f"sensor-{number}")
    made: list[Row] = []

    def making(record: Sequence[Any]) -> Row:
        made.append(schema.row_from(record))
        return made[-1]

    monkeypatch.setattr(sql_views, "row_from", making)
    with registry.view() as view:
        rows = view.stream()
        assert next(rows).name == "sensor-0"
        assert len(made) == 1
        if url.startswith("postgresql"):
            assert view.run(text("SELECT count(*) FROM pg_cursors")).scalar_one() == 1
        assert [row.name for row in rows] == ["sensor-1", "sensor-2"]


def test_what_is_no_text_is_a_clear_error(registry: SqlRegistry) -> None:
    with registry.view() as view:
        for ask in (lambda: view.named("sensor-\udcff"), lambda: view.count(role="\udcff")):
            with pytest.raises(RegistryError, match="it was asked for is no text"):
                ask()


def test_a_newer_format_is_refused_and_left_alone(registry: SqlRegistry) -> None:
    add(registry)
    outside(registry, update(META).where(META.c.name == "format").values(value="2"))
    for attempt in (registry.view, registry.transaction):
        with pytest.raises(RegistryError, match="it has format 2, this birthmark knows 1") as caught, attempt():
            pass
        assert "update this one" in caught.value.hint
    outside(registry, update(META).where(META.c.name == "format").values(value="1"))
    assert names(registry) == ["sensor-1"]


@pytest.mark.parametrize("value", ["", "x", "0", "-1"])
def test_a_damaged_format_is_refused(registry: SqlRegistry, value: str) -> None:
    outside(registry, update(META).where(META.c.name == "format").values(value=value))
    with pytest.raises(RegistryError, match="no registry of birthmark"), registry.view():
        pass


@pytest.mark.parametrize(
    ("field", "value"),
    [("name_folded", "other"), ("state", "MADE"), ("cert_serial", "zz"), ("created_at", 1 << 62), ("role", "#")],
)
def test_a_damaged_row_is_a_clear_error(registry: SqlRegistry, field: str, value: object) -> None:
    add(registry)
    outside(registry, update(ROWS).values({field: value}))
    with pytest.raises(RegistryError, match="could not read row 1") as caught, registry.view() as view:
        view.rows()
    assert "backup" in caught.value.hint


def test_a_registry_is_made_once(url: str, registry: SqlRegistry, opened: Callable[..., SqlRegistry]) -> None:
    add(registry)
    with pytest.raises(RegistryError, match="there is one already"):
        opened(url, make=True)
    assert names(registry) == ["sensor-1"]


def test_where_no_registry_is_none_is_made_by_looking(
    postgres: Server, opened: Callable[..., SqlRegistry], tmp_path: Path
) -> None:
    with pytest.raises(RegistryError, match="there is none in this database") as caught:
        add(opened(postgres.new_schema()))
    assert "migrate" in caught.value.hint
    with pytest.raises(RegistryError, match="it is not there"):
        add(opened(SQLITE))
    assert not (tmp_path / "station" / "registry.db").exists()
    (tmp_path / "station" / "registry.db").write_bytes(b"something else entirely, and long enough to be read" * 20)
    with pytest.raises(RegistryError, match="not a database"):
        add(opened(SQLITE))
    with pytest.raises(RegistryError, match="not a database"):
        opened(SQLITE, make=True)
    assert (tmp_path / "station" / "registry.db").stat().st_size == 1020


def test_files_are_for_the_owner_alone(opened: Callable[..., SqlRegistry], tmp_path: Path) -> None:
    registry = opened(SQLITE, make=True)
    with registry.transaction() as transaction:
        insert_device(transaction, "one")
        found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "station").iterdir()}
    assert found.keys() == {"registry.db", "registry.db-wal", "registry.db-shm", "registry.lock"}
    assert set(found.values()) == {0o600}


def test_a_transaction_is_on_disk_when_it_is_over(registry: SqlRegistry, url: str) -> None:
    with registry.transaction() as work:
        if url == SQLITE:
            assert work.run(text("PRAGMA synchronous")).scalar() == 2
            assert work.run(text("PRAGMA journal_mode")).scalar() == "wal"
        else:
            assert work.run(text("SHOW synchronous_commit")).scalar() == "on"
            assert work.run(text("SHOW idle_in_transaction_session_timeout")).scalar() == "1min"


def test_an_unwritable_audit_log_stops_the_next_transaction_not_this_one(registry: SqlRegistry) -> None:
    log = registry.audit_path
    log.mkdir()  # whoever runs the tests may be root, whom permissions do not stop
    add(registry)
    with pytest.raises(RegistryError, match="audit log") as caught, registry.transaction():
        pass
    assert "nothing was changed" in caught.value.hint
    log.rmdir()
    verdict = verdict_of(registry)
    assert (verdict.entries, verdict.problems, len(verdict.restored)) == (2, (), 1)
    assert names(registry) == ["sensor-1"]


@pytest.mark.parametrize(
    ("url", "cause"),
    [
        ("nonsense", "no URL of a database"),
        ("", "no URL of a database"),
        ("mysql://host/name", "mysql is not supported"),
        ("postgresql+asyncpg://host/name", "is not supported"),
        ("sqlite+aiosqlite:///registry.db", "is not supported"),
        ("sqlite://", "needs the path of a file"),
        ("sqlite:///:memory:", "needs the path of a file"),
        ("sqlite:///registry.db?mode=ro", "needs the path of a file"),
        ("sqlite://host/registry.db", "needs the path of a file"),
        ("postgresql://host", "names no database"),
        ("postgresql://host/name?password=verysecret", "its password stands among the options"),
        ("postgresql://user:verysecret@host:port/name", "no URL of a database"),
    ],
)
def test_a_url_that_cannot_be_used_is_a_clear_error(url: str, cause: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=cause) as caught:
        Database(url, tmp_path)
    assert caught.value.hint
    assert "verysecret" not in str(caught.value)


def test_a_password_is_shown_to_nobody(postgres: Server, tmp_path: Path, clock: Clock) -> None:
    url = postgres.new_schema().replace("birthmark@", "birthmark:verysecret@").replace("/postgres?", "/nowhere?")
    assert has_password(url)
    assert not has_password(SQLITE)
    assert "verysecret" not in shown_url(url)
    registry = SqlRegistry(tmp_path, url, clock=clock, actor="test@host")
    with pytest.raises(RegistryError, match="could not reach the registry") as caught, registry.view():
        pass
    told = [caught.value, caught.value.__cause__, registry._database.engine.url, registry.shown]
    assert not [said for said in map(str, told) if "verysecret" in said]
    assert "nowhere" in str(caught.value)


@pytest.mark.parametrize(
    ("module", "url", "extra"),
    [
        ("sqlalchemy", SQLITE, "sql"),
        ("psycopg", "postgresql://localhost/x", "sql"),
        ("tinydb", "tinydb", "station"),
    ],
)
def test_a_missing_library_is_named_with_what_installs_it(
    module: str, url: str, extra: str, tmp_path: Path
) -> None:
    program = f"""
import sys
sys.modules[{module!r}] = None
from birthmark.provisioning.__main__ import main
sys.argv = ["birthmark", "init", "--station", {str(tmp_path / "station")!r}, "--registry", {url!r}]
main()
"""
    environment = {"BIRTHMARK_PASSPHRASE": "a long passphrase", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment, timeout=60
    )
    assert done.returncode == 1, done.stderr
    assert "is not installed" in done.stderr
    assert f"pip install 'birthmark[{extra}]'" in done.stderr
    assert not (tmp_path / "station").exists()
