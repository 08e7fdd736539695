"""`birthmark registry export | import`: the same rows again, and nothing of a file that has a bad one."""

from __future__ import annotations

import csv
import io
import json
import secrets
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st
from support.station import PASSPHRASE, Command, enrolled_row, keyed_row, new_station

from birthmark.provisioning import audit
from birthmark.provisioning.issuing import issue_broker, issue_operator
from birthmark.provisioning.record_files import read_records
from birthmark.provisioning.registry.line import Batch
from birthmark.provisioning.registry.model import KeyMode, Kind, Row, State
from birthmark.provisioning.revocation import revoke
from birthmark.provisioning.row_records import COLUMNS, csv_lines, from_cell, from_record, jsonl_lines, to_record
from birthmark.provisioning.station import Station

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from support.station import Answer

NASTY = ["=1+1", "+x: 1", "-x: 2", "@x: 3", "'quoted", "\tx", "a: b\nc: d", 'x: "y", z', "ü: ☃"]
NOW = datetime.now(UTC)
ROW = Row(1, Kind.DEVICE, "x", "x", State.RESERVED, NOW, NOW, hwid=b"unit", txn=bytes(16))
TIMES = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001
TEXTS = st.one_of(
    st.sampled_from(NASTY), st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
)
OCTETS = st.binary(min_size=4, max_size=32)
NUMBERS = st.integers(1, 10**9)


@st.composite
def rows(draw: st.DrawFn) -> Row:
    """Return any made row."""
    revoked = draw(st.booleans())
    return Row(
        number=draw(NUMBERS),
        kind=Kind.DEVICE,
        name=draw(st.from_regex(r"[A-Za-z0-9]{1,9}", fullmatch=True)),
        role="sensor",
        state=State.ATTESTED,
        created_at=draw(TIMES),
        changed_at=draw(TIMES),
        key_mode=draw(st.sampled_from([None, *KeyMode])),
        hwid=draw(st.none() | OCTETS),
        txn=bytes(16),
        public_key_der=draw(OCTETS),
        cert_serial=draw(st.integers(1, (1 << 159) - 1)),
        issuer=draw(st.sampled_from(["", "ab" * 20])),
        anchors=draw(st.sampled_from(["", "ab" * 20, "ab cd"])),
        certificate_der=draw(OCTETS),
        replaces=draw(st.none() | NUMBERS),
        batch=draw(TEXTS),
        label=draw(TEXTS),
        not_before=draw(st.none() | TIMES),
        revoked_at=draw(TIMES) if revoked else None,
        revocation_reason="superseded" if revoked else "",
    )


@settings(max_examples=30, deadline=None)
@given(several=st.lists(rows(), max_size=3))
def test_rows_come_back_from_either_format(tmp_path_factory: pytest.TempPathFactory, several: list[Row]) -> None:
    folder = tmp_path_factory.getbasetemp()
    for name, lines in (("rows.csv", csv_lines), ("rows.jsonl", jsonl_lines)):
        path = folder / name
        path.write_bytes("".join(lines(several)).encode())
        records = [record.fields for record in read_records(path, COLUMNS)]
        if name == "rows.csv":
            records = [{key: from_cell(text) for key, text in fields.items()} for fields in records]
        assert [from_record(fields) for fields in records] == several


def test_no_cell_of_a_csv_is_a_formula() -> None:
    row = Row(
        1,
        Kind.DEVICE,
        "x",
        "sensor",
        State.RESERVED,
        datetime.now(UTC),
        datetime.now(UTC),
        hwid=b"unit",
        txn=bytes(16),
    )
    several = [row.changed(label=text, void_reason="") for text in NASTY]
    cells = [cell for line in csv.reader(io.StringIO("".join(csv_lines(several)), newline="")) for cell in line]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]


@pytest.fixture(scope="module")
def filled(founded: Path, tmp_path_factory: pytest.TempPathFactory) -> Station:
    """A station with a row of every sort that may be handed on."""
    tmp_path = tmp_path_factory.mktemp("filled")
    station = Station.open(shutil.copytree(founded / "living", tmp_path / "full"), passphrase=PASSPHRASE)
    one = enrolled_row(station, "sensor-1")
    with station.registry.transaction() as transaction:
        transaction.put_batch(Batch("W47", station.clock()))
        transaction.update(one.changed(label="=HYPERLINK: x\nlot: 7"))
    revoke(station, enrolled_row(station, "sensor-2").name, x509.ReasonFlags.key_compromise)
    keyed_row(station, "sensor-3")
    revoke(station, "sensor-3", x509.ReasonFlags.superseded)
    with station.registry.transaction() as transaction:
        never = transaction.insert(kind=Kind.DEVICE, name="never", role="x", hwid=b"none", txn=bytes(16))
        transaction.update(never.changed(state=State.VOID, void_reason="given up"))
    issue_operator(station, "alice", tmp_path / "alice")
    issue_operator(station, "alice", tmp_path / "alice", renew=True)
    issue_broker(station, ["localhost", "127.0.0.1"], tmp_path / "broker")
    return station


@pytest.fixture
def full(filled: Station, tmp_path: Path) -> Station:
    """A copy of it, to be changed."""
    return Station.open(shutil.copytree(filled.folder, tmp_path / "full"), passphrase=PASSPHRASE)


def rows_of(station: Station) -> list[Row]:
    with station.registry.view() as view:
        return view.rows()


def undated(several: list[Row]) -> list[Row]:
    """Return rows without what the registry gives them anew; fresh stations number alike what they are given."""
    at = datetime(2026, 1, 1, tzinfo=UTC)
    numbers = {row.number: place for place, row in enumerate(several, start=1)}
    fresh: list[Row] = []
    for row in several:
        links: dict[str, Any] = {
            link: numbers.get(getattr(row, link)) for link in ("replaces", "replaced_by", "renews")
        }
        fresh.append(row.changed(number=numbers[row.number], created_at=at, changed_at=at, **links))
    return fresh


@pytest.mark.parametrize("name", ["all.csv", "all.jsonl"])
def test_what_is_exported_is_the_same_when_imported(
    birthmark: Command, living: Station, full: Station, name: str
) -> None:
    exported = birthmark("registry", "export", "-o", name)
    # The command's own station is `living`: it exports nothing yet.
    assert exported.stdout == f"0 rows are in {name}\n"
    other = Command(full.folder, birthmark._capsys)
    assert other("registry", "export", "--out", name, "--json").records == [{"rows": 7, "file": name}]
    assert "PRIVATE" not in Path(name).read_text()
    answer = birthmark("registry", "import", name, "--json")
    assert answer.records == [{"added": 6, "known": 0, "empty": 1, "revoked": 2}]
    assert "2 of them are revoked" in answer.stderr
    there = [row for row in rows_of(full) if row.cert_serial is not None]
    here = rows_of(living)
    assert undated(here) == undated(there)
    assert [row.name for row in here if row.is_live] == [row.name for row in there if row.is_live]
    assert birthmark("registry", "import", name, "--json").records[0] == {
        "added": 0,
        "known": 6,
        "empty": 1,
        "revoked": 0,
    }
    assert rows_of(living) == here
    assert birthmark("crl", "--json").exit_code == 0
    listed = x509.load_pem_x509_crl(living.crl_path.read_bytes())
    assert {entry.serial_number for entry in listed} == {row.cert_serial for row in here if row.is_revoked}
    actions = [entry["action"] for entry in audit.read(living.registry.audit_path)]
    assert (actions.count("import"), actions.count("registry-export")) == (6, 1)
    assert birthmark("audit", "verify").exit_code == 0
    again = birthmark("issue-operator", "alice", "--out", "again")
    assert again.exit_code == 3, "a name that came is taken"


def test_an_export_goes_to_stdout_and_picks(full: Station, birthmark: Command) -> None:
    command = Command(full.folder, birthmark._capsys)
    lines = command("registry", "export", "--name", "SENSOR-*", "--not-revoked").stdout.splitlines()
    assert lines[0] == ",".join(COLUMNS.known)
    assert lines[1].startswith("1,sensor-1,device,sensor,ATTESTED,")
    assert "'=HYPERLINK" in "\n".join(lines)
    records = command("registry", "export", "--kind", "broker", "--json").records
    assert [record["id"] for record in records] == ["localhost"]
    picked = command("registry", "export", "--format", "jsonl", "--revoked").stdout.splitlines()
    assert [json.loads(line)["id"] for line in picked] == ["sensor-2", "sensor-3"]
    missing = command("registry", "export", "-o", "nowhere/x.csv")
    assert missing.exit_code == 5


def refused(answer: Answer, *causes: str) -> None:
    assert (answer.exit_code, answer.stdout) == (1, ""), answer
    error, hint = answer.stderr.splitlines()
    assert error.startswith("error: could not use ")
    assert all(cause in error for cause in causes), error
    assert hint.startswith("hint: ")


def _forged(record: dict[str, str]) -> None:
    """Sign the same certificate with another key than the CA's."""
    _signed_again(record, generate_private_key(SECP256R1()))


def _signed_again(record: dict[str, str], key: EllipticCurvePrivateKey) -> None:
    real = x509.load_der_x509_certificate(_der(record))
    builder = x509.CertificateBuilder(
        real.issuer, real.subject, real.public_key(), real.serial_number, real.not_valid_before_utc,
        real.not_valid_after_utc, list(real.extensions),
    )  # fmt: skip
    forged = builder.sign(key, SHA256())
    record["certificate"] = _text(forged.public_bytes(Encoding.DER))


def _der(record: dict[str, str]) -> bytes:
    return from_record(record).certificate_der or b""


def _text(der: bytes) -> str:
    return to_record(ROW.changed(certificate_der=der))["certificate"]


ROW = Row(
    1, Kind.DEVICE, "x", "x", State.RESERVED, datetime.now(UTC), datetime.now(UTC), hwid=b"unit", txn=bytes(16)
)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda record: record.update(id="sensor-9"), "certificate has another name"),
        (lambda record: record.update(role="camera"), "certificate has another role"),
        (lambda record: record.update(cert_serial="1"), "certificate has another cert serial"),
        (lambda record: record.update(not_after="2031-01-01T00:00:00+00:00"), "certificate has another not after"),
        (lambda record: record.pop("not_before"), "certificate has another not before"),
        (lambda record: record.update(public_key="AAAA"), "certificate has another public key"),
        (lambda record: record.update(issuer="ab" * 20), "none of this station's CAs"),
        (lambda record: record.pop("issuer"), "none of this station's CAs"),
        (lambda record: record.update(certificate="AAAA"), "certificate cannot be used"),
        (lambda record: record.update(certificate="%"), "certificate is not base64"),
        (lambda record: record.pop("certificate"), "needs its certificate"),
        (_forged, "not signed by"),
        (lambda record: record.update(state="KEYED"), "it is KEYED, under way"),
        (lambda record: record.update(state="MADE"), "its state is not one of RESERVED, KEYED, "),
        (lambda record: record.update(not_after="27.11.2028"), "not_after is not a time like 2026-11-27T"),
        (lambda record: record.update(number="1.0"), "its number is not a whole number"),
        (lambda record: record.update(cert_serial="6,E+47"), "cert_serial is not small hex digits"),
        (lambda record: record.update(created_at="yesterday"), "created_at is not a time like"),
        (lambda record: record.update(created_at="2026-01-01T00:00:00"), "no time zone"),
        (lambda record: record.update(revoked_at="1949-05-04T12:00:00+00:00"), "revoked_at is not a time like"),
        (lambda record: record.update(revoked_at="0001-01-01T00:00:00+14:00"), "revoked_at is not a time like"),
        (lambda record: record.update(not_after="9999-12-31T23:59:59-14:00"), "not_after is not a time like"),
        (lambda record: record.update(number="-1"), "number is not a whole number"),
        (lambda record: record.update(number="0"), "not positive"),
        (lambda record: record.update(number="2"), "it has the number of line 1"),
        (lambda record: record.update(cert_serial="0x5"), "cert_serial is not small hex digits"),
        (lambda record: record.update(hwid="zz"), "hwid is not hex digits"),
        (lambda record: record.update(replaced_by="99"), "replaced by row 99, which is not in the file"),
        (lambda record: record.update(label="\ud800"), "half a character"),
        (lambda record: record.update(revoked_at="2026-01-01T00:00:00+00:00"), "a time and a reason"),
        (
            lambda record: record.update(revoked_at="2999-01-01T00:00:00+00:00", revocation_reason="superseded"),
            "revoked on 2999-01-01 00:00 UTC, which is yet to come",
        ),
        (lambda record: record.update(batch="of last week"), "'of last week' as a batch's name"),
        (lambda record: record.update(label="lot: \x1b[31m7"), "label is not printable"),
        (lambda record: record.update(private_key="x"), "no field 'private_key'"),
        (lambda record: record.update(kind="broker"), "holds no role"),
        (lambda record: record.update(kind="service"), "may not hold the role"),
    ],
)
def test_a_bad_record_is_named_and_nothing_of_the_file_applied(
    birthmark: Command, living: Station, filled: Station, change: Any, cause: str
) -> None:
    first, second, *_ = rows_of(filled)
    records = [to_record(second), to_record(first)]
    change(records[1])
    Path("bad.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    before = rows_of(living)
    refused(birthmark("registry", "import", "bad.jsonl"), "bad.jsonl, line 2: ", cause)
    assert rows_of(living) == before


def test_a_void_row_without_a_certificate_is_taken_if_it_is_revoked(
    birthmark: Command, living: Station, full: Station
) -> None:
    record = to_record(next(row for row in rows_of(full) if row.name == "sensor-3"))
    assert "certificate" not in record
    for name in ("revoked_at", "revocation_reason"):
        del record[name]
    Path("one.jsonl").write_text(json.dumps(record))
    refused(birthmark("registry", "import", "one.jsonl"), "no certificate, and is not revoked")


def test_what_belongs_to_somebody_here_is_refused(birthmark: Command, living: Station, full: Station) -> None:
    enrolled_row(living, "SENSOR-1")
    before = rows_of(living)
    other = Command(full.folder, birthmark._capsys)
    assert other("registry", "export", "-o", "all.csv").exit_code == 0
    refused(
        birthmark("registry", "import", "all.csv"),
        "all.csv, line 2: sensor-1: its name belongs to device SENSOR-1, row 1, ATTESTED",
    )
    assert rows_of(living) == before


@pytest.mark.parametrize("first", [0, 1, 2])
def test_the_line_that_clashes_is_named_wherever_it_stands(
    birthmark: Command, living: Station, tmp_path: Path, first: int
) -> None:
    """One board is somebody else's here; the others, before and after it in the file, are not."""
    shutil.copytree(living.folder, tmp_path / "elsewhere")
    other = Station.open(tmp_path / "elsewhere", passphrase=PASSPHRASE)
    boards = [secrets.token_bytes(8) for _ in range(3)]
    for number, hwid in enumerate(boards):
        enrolled_row(other, f"sensor-{number}", hwid=hwid)
    enrolled_row(living, "own", hwid=boards[first])
    Path("made.jsonl").write_text("\n".join(json.dumps(to_record(row)) for row in rows_of(other)))
    before = rows_of(living)
    refused(
        birthmark("registry", "import", "made.jsonl"),
        f"made.jsonl, line {first + 1}: sensor-{first}: its hwid belongs to device own, row 1, ATTESTED",
    )
    assert rows_of(living) == before
    other.close()


def test_a_line_that_shares_a_name_and_is_void_does_not_clash(
    birthmark: Command, living: Station, tmp_path: Path
) -> None:
    shutil.copytree(living.folder, tmp_path / "elsewhere")
    other = Station.open(tmp_path / "elsewhere", passphrase=PASSPHRASE)
    for _ in range(2):
        enrolled_row(other, "sensor-1")
        revoke(other, "sensor-1", x509.ReasonFlags.superseded)
        with other.registry.transaction() as transaction:
            row = transaction.live_by_name("sensor-1")
            assert row is not None
            transaction.update(row.changed(state=State.VOID, void_reason="made again"))
    enrolled_row(other, "sensor-1")
    enrolled_row(living, "SENSOR-1")
    first, second, live = (json.dumps(to_record(row)) for row in rows_of(other))
    Path("made.jsonl").write_text(f"{first}\n{live}\n{second}")
    refused(birthmark("registry", "import", "made.jsonl"), "made.jsonl, line 2: sensor-1: its name belongs to")
    other.close()


def test_of_two_lines_that_clash_the_later_one_is_named(
    birthmark: Command, living: Station, tmp_path: Path
) -> None:
    """Two stations of the same CAs made one board each of the same id, and their files were put together."""
    records = []
    for folder in ("line-2", "line-3"):
        shutil.copytree(living.folder, tmp_path / folder)
        other = Station.open(tmp_path / folder, passphrase=PASSPHRASE)
        enrolled_row(other, f"of-{folder}")
        enrolled_row(other, "sensor-1")
        records += [to_record(row) for row in rows_of(other)]
        other.close()
    for number, record in enumerate(records, start=1):
        record["number"] = str(number)
    Path("both.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    refused(
        birthmark("registry", "import", "both.jsonl"),
        "both.jsonl, line 4: sensor-1: its name belongs to device sensor-1, row 2, ATTESTED",
    )
    assert rows_of(living) == []


def test_a_revocation_is_not_imported_into_a_row_that_stands(
    birthmark: Command, living: Station, full: Station
) -> None:
    other = Command(full.folder, birthmark._capsys)
    other("registry", "export", "--name", "sensor-1", "-o", "one.jsonl")
    assert birthmark("registry", "import", "one.jsonl").exit_code == 0
    revoke(full, "sensor-1", x509.ReasonFlags.key_compromise)
    other("registry", "export", "--name", "sensor-1", "-o", "one.jsonl")
    answer = birthmark("registry", "import", "one.jsonl")
    refused(answer, "one.jsonl, line 1: sensor-1: it is revoked (keyCompromise), and here it is not")
    assert "birthmark revoke sensor-1" in answer.stderr
    assert not rows_of(living)[0].is_revoked


def test_another_certificate_with_a_serial_number_that_is_here_is_refused(
    birthmark: Command, living: Station, full: Station
) -> None:
    first = rows_of(full)[0]
    Path("one.jsonl").write_text(json.dumps(to_record(first)))
    assert birthmark("registry", "import", "one.jsonl").exit_code == 0
    record = to_record(first)
    _signed_again(record, full.authority._issuer.private_key)
    Path("two.jsonl").write_text(json.dumps(record))
    refused(
        birthmark("registry", "import", "two.jsonl"), "two.jsonl, line 1: sensor-1: its serial number is that of"
    )
    assert len(rows_of(living)) == 1


def test_rows_of_another_stations_ca_are_refused(birthmark: Command, living: Station, tmp_path: Path) -> None:
    stranger = new_station(tmp_path / "stranger")
    enrolled_row(stranger, "sensor-1")
    other = Command(stranger.folder, birthmark._capsys)
    assert other("registry", "export", "-o", "all.csv").exit_code == 0
    refused(
        birthmark("registry", "import", "all.csv"), "all.csv, line 2: sensor-1: ", "none of this station's CAs"
    )
    assert rows_of(living) == []


def test_references_follow_the_new_numbers(birthmark: Command, living: Station, full: Station) -> None:
    other = Command(full.folder, birthmark._capsys)
    other("registry", "export", "--name", "alice", "-o", "alice.jsonl")
    keyless = enrolled_row(living, "own")
    assert birthmark("registry", "import", "alice.jsonl").exit_code == 0
    old, new = (row for row in rows_of(living) if row.name == "alice")
    assert (old.number, old.replaced_by, new.replaces) == (keyless.number + 1, new.number, old.number)
    assert not old.is_live
    assert new.is_live
