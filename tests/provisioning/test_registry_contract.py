"""What every registry must do, whichever back end keeps it."""

from __future__ import annotations

import threading
from datetime import timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
from support.patience import PATIENCE_S
from support.station import NOON, Clock, public_key_der

from birthmark.device.durable import private_folder
from birthmark.device.errors import IdentityError, RegistryError
from birthmark.provisioning.registry.interface import LAST_ISSUED_AT, DuplicateError
from birthmark.provisioning.registry.model import Kind, RevokedCertificate, Row, State
from birthmark.provisioning.registry.sql import SqlRegistry
from birthmark.provisioning.registry.tiny import TinyRegistry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from birthmark.provisioning.registry.interface import RowFilters, StoredRegistry, Transaction

SERIAL = 1 << 158
BACK_ENDS = ["tinydb", "sqlite", "postgresql"]


@pytest.fixture(params=BACK_ENDS)
def registry(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[StoredRegistry]:
    folder = private_folder(tmp_path / "station")
    made: StoredRegistry
    if request.param == "tinydb":
        made = TinyRegistry.create(folder, clock=clock, actor="test@host")
    else:
        url = "sqlite:///registry.db"
        if request.param == "postgresql":
            url = request.getfixturevalue("postgres").new_schema()
        made = SqlRegistry.create(folder, url, clock=clock, actor="test@host")
    yield made
    made.close()


def device(transaction: Transaction, name: str = "sensor-1", **fields: Any) -> Row:
    facts: dict[str, Any] = {"role": "sensor", "hwid": name.encode().ljust(4, b"."), "txn": bytes(16), **fields}
    return transaction.insert(kind=Kind.DEVICE, name=name, **facts)


def keyed(transaction: Transaction, row: Row, serial: int = SERIAL, key: bytes = b"key") -> Row:
    return transaction.update(row.changed(state=State.KEYED, public_key_der=key, cert_serial=serial))


def attested(transaction: Transaction, row: Row, **fields: Any) -> Row:
    return transaction.update(row.changed(state=State.ATTESTED, certificate_der=b"certificate", **fields))


def test_a_row_comes_back_as_it_was_stored(registry: StoredRegistry, clock: Clock) -> None:
    key = public_key_der()
    with registry.transaction() as transaction:
        row = keyed(transaction, device(transaction), key=key)
        clock.advance(seconds=1.5)
        stored = transaction.update(
            row.changed(
                state=State.ISSUED,
                certificate_der=b"\x30\x00",
                bundle=b"bundle",
                bundle_sha256=bytes(32),
                not_before=NOON,
                not_after=NOON + timedelta(days=1),
            )
        )
    with registry.view() as view:
        assert view.row(row.number) == stored
        assert view.live_by_name("SENSOR-1") == stored
        assert view.live_by_hwid(b"sensor-1") == stored
        assert view.by_cert_serial(SERIAL) == stored
        assert view.by_public_key(key) == stored
        assert view.rows() == [stored]
    assert stored.created_at == NOON
    assert stored.changed_at == NOON + timedelta(seconds=1.5)


def test_what_is_not_there_is_none(registry: StoredRegistry) -> None:
    with registry.view() as view:
        assert view.row(1) is None
        assert view.live_by_name("sensor-1") is None
        assert view.live_by_hwid(b"1234") is None
        assert view.by_cert_serial(1) is None
        assert view.by_public_key(b"key") is None
        assert view.named("sensor-1") == view.rows() == view.revoked() == []
        assert view.counter("anything") == 0


def test_rows_are_found_by_kind_state_and_role(registry: StoredRegistry) -> None:
    with registry.transaction() as transaction:
        one = device(transaction, "one")
        two = keyed(transaction, device(transaction, "two", role="camera"))
        broker = transaction.insert(kind=Kind.BROKER, name="gateway.example")
    with registry.view() as view:
        assert view.rows(kind=Kind.DEVICE) == [one, two]
        assert view.rows(kind=Kind.BROKER) == [broker]
        assert view.rows(states={State.KEYED}) == [two]
        assert view.rows(states=set()) == []
        assert view.rows(role="camera") == [two]
        assert view.rows(kind=Kind.DEVICE, states=[State.RESERVED], role="camera") == []


def test_rows_one_after_the_other_and_counted_are_those_at_once(registry: StoredRegistry) -> None:
    with registry.transaction() as transaction:
        device(transaction, "one", batch="W47")
        two = keyed(transaction, device(transaction, "two", role="camera"))
        transaction.update(two.changed(revoked_at=NOON, revocation_reason="superseded"))
        transaction.insert(kind=Kind.BROKER, name="gateway.example")
        assert [row.name for row in transaction.stream()] == ["one", "two", "gateway.example"]
    chosen: list[RowFilters] = [
        {},
        {"kind": Kind.DEVICE, "role": None},
        {"states": {State.KEYED}},
        {"states": set()},
        {"role": "camera", "revoked": True},
        {"revoked": False},
        {"batch": "W47", "name_glob": "O*"},
        {"expires_before": NOON},
    ]
    with registry.view() as view:
        for filters in chosen:
            rows = view.rows(**filters)
            assert list(view.stream(**filters)) == rows
            assert view.count(**filters) == len(rows)
        both = zip(view.stream(), view.stream(kind=Kind.DEVICE), strict=False)
        assert [(one.name, other.name) for one, other in both] == [("one", "one"), ("two", "two")]
        assert next(view.stream()).name == "one"
        assert view.row(2) is not None, "one that was not taken to its end is in nobody's way"


def test_rows_are_found_by_batch_name_expiry_and_revocation(registry: StoredRegistry) -> None:
    def made(transaction: Transaction, name: str, serial: int, days: int, **fields: Any) -> Row:
        row = keyed(transaction, device(transaction, name, **fields), serial, name.encode())
        return attested(transaction, row, not_before=NOON, not_after=NOON + timedelta(days=days))

    with registry.transaction() as transaction:
        one = made(transaction, "Pump-1", SERIAL + 1, 10, batch="W47")
        two = made(transaction, "pump-12", SERIAL + 2, 20)
        three = made(transaction, "valve-1", SERIAL + 3, 30, batch="w47")
        bare = device(transaction, "pump", batch="W47")
        two = transaction.update(two.changed(revoked_at=NOON, revocation_reason="superseded"))
    with registry.view() as view:
        assert view.rows(batch="W47") == [one, bare]
        assert view.rows(batch="") == [two]
        assert view.rows(name_glob="PUMP-*") == [one, two]
        assert view.rows(name_glob="pump-?") == [one]
        assert view.rows(name_glob="pump") == [bare]
        assert view.rows(name_glob="*-1") == [one, three]
        assert view.rows(name_glob="*") == view.rows(name_glob="*?*") == [one, two, three, bare]
        assert view.rows(name_glob="pump-[12]") == view.rows(name_glob="pump_1") == view.rows(name_glob="p%") == []
        assert view.rows(name_glob="*_1") == view.rows(name_glob="*%1") == view.rows(name_glob="?%") == []
        assert view.rows(name_glob="") == view.rows(name_glob="pum.") == view.rows(name_glob="\\") == []
        assert view.rows(expires_before=NOON + timedelta(days=20)) == [one], "the end itself is not before it"
        assert view.rows(expires_before=NOON + timedelta(days=20, microseconds=1)) == [one, two]
        elsewhere = timezone(timedelta(hours=-11))
        assert view.rows(expires_before=(NOON + timedelta(days=20, hours=1)).astimezone(elsewhere)) == [one, two]
        assert view.rows(revoked=True) == view.revoked() == [two]
        assert view.rows(revoked=False) == [one, three, bare]
        assert view.rows(revoked=False, name_glob="pump*", expires_before=NOON + timedelta(days=99)) == [one]


def test_live_rows_are_found_by_many_names_at_once(registry: StoredRegistry) -> None:
    with registry.transaction() as transaction:
        one, two = device(transaction, "One"), device(transaction, "two")
        gone = device(transaction, "gone")
        transaction.update(gone.changed(state=State.VOID, void_reason="test"))
        new = device(transaction, "TWO", replaces=two.number, hwid=two.hwid)
        assert transaction.live_by_names(["ONE", "tWo", "gone", "never"]) == {"one": one, "two": new}
    with registry.view() as view:
        assert view.live_by_names(["one"]) == {"one": one}
        assert view.live_by_names([]) == {}


def test_rows_are_found_by_many_serial_numbers_at_once(registry: StoredRegistry) -> None:
    with registry.transaction() as transaction:
        rows = [keyed(transaction, device(transaction, f"d-{n}"), SERIAL + n, b"%d" % n) for n in range(3)]
        gone = transaction.update(rows[1].changed(state=State.VOID, void_reason="test"))
        device(transaction, "bare")
    with registry.view() as view:
        assert view.numbered([3, rows[0].number, 99]) == {1: rows[0], 3: rows[2]}
        assert view.numbered([]) == {}
        assert view.differing([rows[0], gone, rows[2]]) == set()
        assert view.differing(rows) == {gone.number}
        assert view.differing([rows[0].changed(label="x: y"), rows[2].changed(number=99)]) == {1, 99}
        for change in ({"label": "x: y"}, {"anchors": "0a"}, {"bundle_sha256": bytes(32)}, {"hwid": None}):
            alike = [row.changed(**change) for row in (rows[0], rows[2])]
            assert view.differing(alike) == {1, 3}, f"all have another {next(iter(change))}"
            assert view.differing([alike[0], rows[2]]) == {1}
        assert view.differing([]) == set()
        found = view.by_cert_serials([SERIAL, SERIAL + 1, SERIAL + 7])
        assert found == {SERIAL: rows[0], SERIAL + 1: gone}
        assert view.by_cert_serials([]) == {}


def test_of_rows_that_are_added_at_once_each_may_have_what_others_lack(registry: StoredRegistry) -> None:
    with registry.transaction() as transaction:
        full = keyed(transaction, device(transaction, "first"))
        bare = full.changed(name="bare", hwid=None, public_key_der=b"1", cert_serial=1)
        dated = full.changed(name="dated", hwid=b"1234", public_key_der=b"2", cert_serial=2, not_after=NOON)
        for rows in ([bare, dated], [full.changed(name="last", hwid=b"5678", public_key_der=b"3", cert_serial=3)]):
            added = transaction.insert_all(rows)
            assert [row.name for row in added] == [row.name for row in rows]
            assert transaction.numbered([row.number for row in added]) == {row.number: row for row in added}


def test_many_rows_are_added_and_changed_as_one(registry: StoredRegistry, clock: Clock) -> None:
    with registry.transaction() as transaction:
        first = device(transaction, "first")
        clock.advance(seconds=2)
        wanted = [first.changed(number=77, name=f"d-{each}", hwid=bytes([each] * 4)) for each in range(3)]
        rows = transaction.insert_all(wanted)
        assert transaction.insert_all([]) == transaction.update_all([]) == []
        assert [row.number for row in rows] == [2, 3, 4]
        assert {row.created_at for row in rows} == {row.changed_at for row in rows} == {clock()}
        assert [(row.name, row.hwid) for row in rows] == [(row.name, row.hwid) for row in wanted]
        changed = transaction.update_all(
            [
                row.changed(state=State.KEYED, public_key_der=row.name.encode(), cert_serial=row.number)
                for row in reversed(rows)
            ]
        )
        assert transaction.counter(LAST_ISSUED_AT) == 0
        attested_rows = [row.changed(state=State.ATTESTED, certificate_der=b"c", bundle=b"b") for row in changed]
        changed = transaction.update_all(attested_rows)
        assert [(row.number, row.state, row.bundle) for row in changed] == [
            (number, State.ATTESTED, None) for number in (4, 3, 2)
        ]
        assert transaction.counter(LAST_ISSUED_AT) == clock().timestamp()
    with registry.view() as view:
        assert view.rows() == [first, *reversed(changed)]
    with registry.transaction() as transaction:
        assert device(transaction, "next").number == 5


def test_rows_can_be_added_with_their_certificate(registry: StoredRegistry, clock: Clock) -> None:
    with registry.transaction() as transaction:
        row = device(transaction, "known")
        made = row.changed(
            name="brought",
            hwid=b"brought",
            state=State.ATTESTED,
            public_key_der=b"key",
            cert_serial=SERIAL,
            certificate_der=b"certificate",
            revoked_at=NOON,
            revocation_reason="superseded",
        )
        (added,) = transaction.insert_all([made])
        assert added == made.changed(number=2)
        assert transaction.counter(LAST_ISSUED_AT) == clock().timestamp()
        assert transaction.revoked() == [added]


@pytest.mark.parametrize(
    ("field", "clash"),
    [
        ("name", {"name": "D-0"}),
        ("hwid", {"hwid": b"0000"}),
        ("public_key", {"public_key_der": b"key 0"}),
        ("cert_serial", {"cert_serial": 1}),
        ("name", {"name": "Taken"}),
        ("public_key", {"public_key_der": b"taken"}),
        ("cert_serial", {"cert_serial": SERIAL}),
    ],
)
def test_of_many_rows_none_is_added_or_changed_if_one_may_not(
    registry: StoredRegistry, field: str, clash: dict[str, Any]
) -> None:
    with registry.transaction() as transaction:
        taken = keyed(transaction, device(transaction, "taken"), key=b"taken")
        several = [
            taken.changed(
                name=f"d-{n}", hwid=b"%d" % (n * 1111) * (4 if n == 0 else 1), public_key_der=b"key %d" % n
            )
            for n in range(3)
        ]
        several = [row.changed(cert_serial=n + 1) for n, row in enumerate(several)]
    with registry.transaction() as transaction:
        with pytest.raises(DuplicateError) as caught:
            transaction.insert_all([*several[:2], several[2].changed(**clash)])
        assert caught.value.field == field
        assert transaction.rows() == [taken]
        assert device(transaction, "next").number == 2, "no number is lost"
    if "name" in clash or "hwid" in clash:
        return  # these may not change at all
    with registry.transaction() as transaction:
        bare = transaction.insert_all(
            [row.changed(state=State.RESERVED, public_key_der=None, cert_serial=None) for row in several]
        )
        to_be = [
            old.changed(state=State.KEYED, public_key_der=row.public_key_der, cert_serial=row.cert_serial)
            for old, row in zip(bare, several, strict=True)
        ]
        with pytest.raises(DuplicateError) as caught:
            transaction.update_all([*to_be[:2], to_be[2].changed(**clash)])
        assert caught.value.field == field
        assert transaction.rows(name_glob="d-*") == bare


def test_of_many_changes_none_is_made_if_one_is_of_a_stale_row(registry: StoredRegistry) -> None:
    with registry.transaction() as transaction:
        rows = [device(transaction, f"d-{each}") for each in range(3)]
        gone = rows[2].changed(state=State.VOID, void_reason="test")
        transaction.update(gone)
        with pytest.raises(RegistryError, match="VOID for good"):
            transaction.update_all([row.changed(label="x: y") for row in rows])
        assert [row.label for row in transaction.rows()] == ["", "", ""]
        with pytest.raises(RegistryError, match="no such row"):
            transaction.update_all([rows[0].changed(label="x: y"), rows[1].changed(number=99)])
        assert [row.label for row in transaction.rows()] == ["", "", ""]


def test_what_is_thought_to_be_stored_is_believed_only_if_it_is(registry: StoredRegistry) -> None:
    with registry.transaction() as transaction:
        rows = [device(transaction, f"d-{each}") for each in range(3)]
        labelled = transaction.update(rows[1].changed(label="x: y"))
        keyed = [
            row.changed(state=State.KEYED, public_key_der=row.name.encode(), cert_serial=row.number)
            for row in (rows[0], labelled, rows[2])
        ]
        # Of the second one an older state is given, of the third one none.
        changed = transaction.update_all(keyed, known=rows[:2])
        assert transaction.rows() == changed
        assert [row.label for row in changed] == ["", "x: y", ""]
        transaction.update(changed[0].changed(state=State.VOID, void_reason="test"))
        with pytest.raises(RegistryError, match="VOID for good"):
            transaction.update_all([changed[0].changed(label="z")], known=[changed[0]])
        with pytest.raises(RegistryError, match="no such row"):
            transaction.update_all([changed[1].changed(number=99)], known=[changed[1].changed(number=99)])
        assert transaction.rows()[1:] == changed[1:]


def test_an_exception_undoes_the_whole_transaction(registry: StoredRegistry) -> None:
    with registry.transaction() as transaction:
        kept = device(transaction, "kept")

    def fail() -> None:
        with registry.transaction() as transaction:
            device(transaction, "lost")
            transaction.update(kept.changed(state=State.VOID, void_reason="test"))
            transaction.set_counter("n", 7)
            transaction.record("reserve", "lost")
            raise KeyError("anything")

    with pytest.raises(KeyError):
        fail()
    with registry.view() as view:
        assert view.rows() == [kept]
        assert view.counter("n") == 0
    with registry.transaction() as transaction:
        assert device(transaction, "next").number == kept.number + 1


def test_a_transaction_sees_its_own_changes_and_a_view_does_not(registry: StoredRegistry) -> None:
    with registry.transaction() as transaction:
        row = device(transaction)
        assert transaction.live_by_name("sensor-1") == row
        with registry.view() as view:
            assert view.rows() == []
    with registry.view() as view:
        before = view.rows()
        with registry.transaction() as transaction:
            device(transaction, "later")
        assert view.rows() == before


def test_a_transaction_is_over_when_it_is_over(registry: StoredRegistry) -> None:
    with registry.transaction() as transaction:
        row = device(transaction)
    with pytest.raises(RuntimeError):
        device(transaction, "late")
    with pytest.raises(RuntimeError):
        transaction.update(row)
    with registry.view() as view:
        assert view.rows() == [row]


def test_transactions_do_not_nest(registry: StoredRegistry) -> None:
    with registry.transaction(), pytest.raises(RuntimeError, match="nest"), registry.transaction():
        pass


@pytest.mark.parametrize("other", ["sensor-1", "SENSOR-1", "Sensor-1"])
@pytest.mark.parametrize("kind", [Kind.DEVICE, Kind.SERVICE, Kind.BROKER])
def test_a_name_is_unique_across_kinds_without_regard_to_case(
    registry: StoredRegistry, other: str, kind: Kind
) -> None:
    facts_of: dict[Kind, dict[str, Any]] = {
        Kind.DEVICE: {"role": "sensor", "hwid": b"other-unit", "txn": bytes(16)},
        Kind.SERVICE: {"role": "operator"},
        Kind.BROKER: {},
    }
    with registry.transaction() as transaction:
        first = device(transaction)
        with pytest.raises(DuplicateError) as caught:
            transaction.insert(kind=kind, name=other, **facts_of[kind])
        assert caught.value.field == "name"
        assert caught.value.holder == first
        assert caught.value.exit_code == 3
    with registry.view() as view:
        assert view.rows() == [first]


def test_names_are_known_without_their_rows(registry: StoredRegistry) -> None:
    with registry.transaction() as transaction:
        assert (transaction.count(), transaction.names(), transaction.names(live=True)) == (0, set(), set())
        old = attested(transaction, keyed(transaction, device(transaction, "Pump")))
        device(transaction, "pump", hwid=b"pump", replaces=old.number)
        gone = device(transaction, "gone")
        transaction.update(gone.changed(state=State.VOID, void_reason="x"))
        issuing = device(transaction, "renewed", state=State.KEYED, public_key_der=b"k", cert_serial=7, renews=1)
        assert not issuing.is_live
    with registry.view() as view:
        assert view.count() == 4
        assert view.names() == {"pump", "gone", "renewed"}
        assert view.names(live=True) == {row.name_folded for row in view.rows() if row.is_live} == {"pump"}


def test_a_hwid_is_unique_among_live_rows(registry: StoredRegistry) -> None:
    with registry.transaction() as transaction:
        first = device(transaction, hwid=b"unit")
        with pytest.raises(DuplicateError) as caught:
            device(transaction, "other", hwid=b"unit")
        assert caught.value.field == "hwid"
        transaction.update(first.changed(state=State.VOID, void_reason="test"))
        again = device(transaction, hwid=b"unit")
        assert transaction.live_by_name("sensor-1") == transaction.live_by_hwid(b"unit") == again
        assert [row.number for row in transaction.named("Sensor-1")] == [first.number, again.number]


@pytest.mark.parametrize(
    ("field", "serial", "key"), [("public_key", SERIAL + 1, b"key"), ("cert_serial", SERIAL, b"other")]
)
def test_keys_and_serial_numbers_are_unique_over_all_rows_ever(
    registry: StoredRegistry, field: str, serial: int, key: bytes
) -> None:
    with registry.transaction() as transaction:
        first = keyed(transaction, device(transaction))
        transaction.update(first.changed(state=State.VOID, void_reason="test"))
        second = device(transaction, "other")
        with pytest.raises(DuplicateError) as caught:
            keyed(transaction, second, serial, key)
        assert caught.value.field == field
        with pytest.raises(DuplicateError):
            transaction.insert(
                kind=Kind.SERVICE,
                name="svc",
                role="operator",
                state=State.KEYED,
                public_key_der=key,
                cert_serial=serial,
            )
        keyed(transaction, second, SERIAL + 1, b"other")


def test_a_replaced_row_gives_up_its_name_and_gets_it_back(registry: StoredRegistry) -> None:
    with registry.transaction() as transaction:
        old = attested(transaction, keyed(transaction, device(transaction)))
        new = device(transaction, replaces=old.number)
        replaced = transaction.row(old.number)
        assert replaced is not None
        assert replaced.replaced_by == new.number
        assert not replaced.is_live
        assert transaction.live_by_name("sensor-1") == new
        with pytest.raises(RegistryError, match="replaced already"):
            device(transaction, replaces=old.number)
    with registry.transaction() as transaction:
        transaction.update(new.changed(state=State.VOID, void_reason="given up"))
        assert transaction.live_by_hwid(b"sensor-1") == transaction.row(old.number)


def test_a_renewal_holds_nothing_until_it_is_attested(registry: StoredRegistry) -> None:
    with registry.transaction() as transaction:
        old = attested(transaction, keyed(transaction, device(transaction)))
        new = device(
            transaction,
            state=State.KEYED,
            public_key_der=b"new key",
            cert_serial=SERIAL + 1,
            bundle_sha256=old.bundle_sha256,
            renews=old.number,
        )
        assert (new.renews, new.is_open_renewal, new.is_live) == (old.number, True, False)
        assert transaction.live_by_name("sensor-1") == transaction.live_by_hwid(b"sensor-1") == old
    with registry.transaction() as transaction:
        issued = transaction.update(new.changed(state=State.ISSUED, certificate_der=b"leaf"))
        with pytest.raises(DuplicateError):  # while the old one stands, there is no second one
            transaction.update(issued.changed(state=State.ATTESTED))
        transaction.update(old.changed(replaced_by=new.number))
        made = transaction.update(issued.changed(state=State.ATTESTED))
        assert transaction.live_by_name("sensor-1") == transaction.live_by_hwid(b"sensor-1") == made
    with registry.view() as view:
        assert view.row(new.number) == made


def test_an_open_renewal_is_unique_in_key_and_serial_number(registry: StoredRegistry) -> None:
    with registry.transaction() as transaction:
        old = attested(transaction, keyed(transaction, device(transaction)))
        for key, serial, field in ((b"key", SERIAL + 1, "public_key"), (b"new key", SERIAL, "cert_serial")):
            with pytest.raises(DuplicateError) as caught:
                device(transaction, state=State.KEYED, public_key_der=key, cert_serial=serial, renews=old.number)
            assert caught.value.field == field


def test_a_replaced_row_that_is_void_does_not_come_back(registry: StoredRegistry) -> None:
    with registry.transaction() as transaction:
        old = attested(transaction, keyed(transaction, device(transaction)))
        new = device(transaction, replaces=old.number)
        old = transaction.row(old.number) or old
        transaction.update(old.changed(state=State.VOID, void_reason="replaced"))
        transaction.update(new.changed(state=State.VOID, void_reason="given up"))
        assert transaction.live_by_name("sensor-1") is None


def test_a_replaced_row_does_not_come_back_beside_one_that_got_its_hwid(registry: StoredRegistry) -> None:
    with registry.transaction() as transaction:
        old = attested(transaction, keyed(transaction, device(transaction)))
        new = device(transaction, replaces=old.number, hwid=b"another board")
        device(transaction, "sensor-2", hwid=old.hwid)
    with registry.transaction() as transaction:
        with pytest.raises(DuplicateError) as caught:
            transaction.update(new.changed(state=State.VOID, void_reason="given up"))
        assert caught.value.field == "hwid"
        assert transaction.row(new.number) == new


def test_replacing_what_is_not_there_is_refused(registry: StoredRegistry) -> None:
    with registry.transaction() as transaction, pytest.raises(RegistryError, match="no such row"):
        device(transaction, replaces=99)


def test_the_bundle_is_kept_until_the_row_is_attested(registry: StoredRegistry) -> None:
    with registry.transaction() as transaction:
        row = keyed(transaction, device(transaction))
        fields: dict[str, Any] = {"certificate_der": b"c", "bundle": b"bundle", "bundle_sha256": bytes(32)}
        row = transaction.update(row.changed(state=State.ISSUED, **fields))
        assert row.bundle == b"bundle"
        row = transaction.update(row.changed(state=State.ATTESTED))
        assert row.bundle is None
        assert row.bundle_sha256 == bytes(32)
    with registry.view() as view:
        assert view.row(row.number) == row


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"state": State.RESERVED}, "go back"),
        ({"cert_serial": SERIAL + 5}, "cert_serial"),
        ({"public_key_der": b"other"}, "public_key_der"),
        ({"name": "other"}, "name"),
        ({"hwid": b"other"}, "hwid"),
        ({"revoked_at": None, "revocation_reason": ""}, "revoked_at"),
    ],
)
def test_a_stale_writer_undoes_nothing(registry: StoredRegistry, change: dict[str, Any], why: str) -> None:
    with registry.transaction() as transaction:
        row = keyed(transaction, device(transaction))
        row = transaction.update(row.changed(revoked_at=NOON, revocation_reason="superseded"))
        with pytest.raises(RegistryError, match=why):
            transaction.update(row.changed(**change))
        assert transaction.row(row.number) == row
        assert transaction.revoked() == [row]


def test_what_a_crl_needs_is_known_of_every_revoked_certificate(registry: StoredRegistry) -> None:
    with registry.transaction() as transaction:
        assert transaction.revocations() == []
        ends = NOON + timedelta(days=1)
        gone: dict[str, Any] = {"revoked_at": NOON, "revocation_reason": "superseded"}
        made = keyed(transaction, device(transaction, "made", issuer="0a" * 20))
        made = attested(transaction, made, not_after=ends, **gone)
        void = keyed(transaction, device(transaction, "void"), SERIAL - 1, b"another")
        transaction.update(void.changed(state=State.VOID, void_reason="x", **gone))
        keyed(transaction, device(transaction, "neither"), 7, b"third")
    with registry.view() as view:
        assert view.revocations() == [
            RevokedCertificate(made.number, SERIAL, "0a" * 20, ends, NOON, "superseded"),
            RevokedCertificate(void.number, SERIAL - 1, "", None, NOON, "superseded"),
        ]
        assert [one.number for one in view.revocations()] == [row.number for row in view.revoked()]


def test_void_is_final(registry: StoredRegistry) -> None:
    with registry.transaction() as transaction:
        row = device(transaction)
        void = transaction.update(row.changed(state=State.VOID, void_reason="test"))
        with pytest.raises(RegistryError, match="VOID for good"):
            transaction.update(row)
        assert transaction.row(row.number) == void


def test_an_unknown_row_cannot_be_changed(registry: StoredRegistry) -> None:
    with registry.transaction() as transaction:
        row = device(transaction)
        with pytest.raises(RegistryError, match="no such row"):
            transaction.update(row.changed(number=row.number + 1))


def test_counters_only_rise(registry: StoredRegistry) -> None:
    with registry.transaction() as transaction:
        transaction.set_counter("big", SERIAL)
        transaction.set_counter("big", SERIAL)
        with pytest.raises(RegistryError, match="counter"):
            transaction.set_counter("big", SERIAL - 1)
    with registry.view() as view:
        assert view.counter("big") == SERIAL


def test_the_newest_issuance_is_remembered(registry: StoredRegistry, clock: Clock) -> None:
    with registry.transaction() as transaction:
        row = keyed(transaction, device(transaction))
        assert transaction.counter(LAST_ISSUED_AT) == 0
        attested(transaction, row)
        assert transaction.counter(LAST_ISSUED_AT) == NOON.timestamp()
        clock.advance(seconds=-60)
        attested(transaction, keyed(transaction, device(transaction, "two"), SERIAL + 1, b"two"))
        assert transaction.counter(LAST_ISSUED_AT) == NOON.timestamp()


@pytest.mark.parametrize("name", ["", "+", "#", "a/b", "a\0", "x" * 64, "-a"])
def test_names_outside_the_grammar_are_never_stored(registry: StoredRegistry, name: str) -> None:
    with registry.transaction() as transaction, pytest.raises(IdentityError):
        device(transaction, name, hwid=b"unit")
    with registry.view() as view:
        assert view.rows() == []


def test_a_certificate_is_given_to_a_row_that_is_ready_for_it_alone(registry: StoredRegistry) -> None:
    with registry.transaction() as transaction:
        reserved = device(transaction)
        ready = keyed(transaction, reserved)
    dates: dict[str, Any] = {"not_before": NOON, "not_after": NOON + timedelta(days=1)}
    given = ready.certified(b"certificate", State.ISSUED, anchors="", **dates)
    expected = {"state": State.ISSUED, "certificate_der": b"certificate", **dates}
    assert given == ready.changed(**expected)
    with pytest.raises(ValueError, match="needs a public key"):
        reserved.certified(b"certificate", State.ISSUED, anchors="", **dates)
    with pytest.raises(ValueError, match="time zone"):
        ready.certified(
            b"certificate", State.ISSUED, anchors="", **dates | {"not_after": NOON.replace(tzinfo=None)}
        )


@pytest.mark.parametrize(
    "fields",
    [
        {"role": "operator"},
        {"role": "service-x"},
        {"hwid": b"123"},
        {"hwid": bytes(33)},
        {"hwid": None},
        {"txn": None},
        {"txn": bytes(15)},
        {"state": State.KEYED},
        {"state": State.VOID},
        {"cert_serial": 0},
        {"cert_serial": 1 << 159},
    ],
)
def test_rows_that_contradict_themselves_are_bugs(registry: StoredRegistry, fields: dict[str, Any]) -> None:
    with registry.transaction() as transaction, pytest.raises(ValueError, match=r"."):
        device(transaction, **fields)


def test_threads_lose_nothing(registry: StoredRegistry) -> None:
    def add(number: int) -> None:
        for each in range(10):
            with registry.transaction() as transaction:
                transaction.set_counter("n", transaction.counter("n") + 1)
                device(transaction, f"d-{number}-{each}")

    threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=PATIENCE_S)
        assert not thread.is_alive()
    with registry.view() as view:
        assert view.counter("n") == 40
        assert len({row.name for row in view.rows()}) == 40
        assert [row.number for row in view.rows()] == list(range(1, 41))


def test_notes_are_kept_by_topic_and_key(registry: StoredRegistry) -> None:
    with registry.transaction() as transaction:
        transaction.put_note("ca", "b", {"kind": "root", "deep": {"n": 1}})
        transaction.put_note("ca", "a", {"kind": "issuing"})
        transaction.put_note("receipts", "a", {"number": 1})
        assert list(transaction.notes("ca")) == ["b", "a"]
    with registry.transaction() as transaction:
        transaction.put_note("ca", "b", {"kind": "root"})
        transaction.put_note("receipts", "a", None)
        transaction.put_note("receipts", "none", None)
    with registry.view() as view:
        assert view.notes("ca") == {"b": {"kind": "root"}, "a": {"kind": "issuing"}}
        assert view.notes("receipts") == {}
        assert view.notes("other") == {}


def test_a_note_of_a_failed_transaction_is_not_kept(registry: StoredRegistry) -> None:
    def fails() -> None:
        with registry.transaction() as transaction:
            transaction.put_note("ca", "a", {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    with registry.view() as view:
        assert view.notes("ca") == {}


def test_the_issuer_of_a_certificate_stays_and_anchors_may_change(registry: StoredRegistry) -> None:
    with registry.transaction() as transaction:
        row = device(transaction, issuer="")
        row = transaction.update(row.changed(issuer="0a" * 20, anchors="0b 0c"))
    with registry.transaction() as transaction:
        with pytest.raises(RegistryError, match="issuer"):
            transaction.update(row.changed(issuer="0d" * 20))
        stored = transaction.update(row.changed(anchors="0c"))
    with registry.view() as view:
        assert view.row(row.number) == stored
    assert (stored.issuer, stored.anchors) == ("0a" * 20, "0c")
    for field in ("issuer", "anchors"):
        with pytest.raises(ValueError, match="hex"):
            stored.changed(**{field: "NO"})
