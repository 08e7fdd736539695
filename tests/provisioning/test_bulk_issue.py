"""`birthmark issue --from`: what it takes, what it makes of it, and what it refuses, whole."""

from __future__ import annotations

import csv
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID
from support.patience import PATIENCE_S
from support.station import Command, enrolled_row, keyed_row

from birthmark.device.credentials import Credentials
from birthmark.device.identity import DeviceId
from birthmark.device.pem import read_blocks
from birthmark.provisioning import audit, bulk, bulk_requests
from birthmark.provisioning.cas import read_cas
from birthmark.provisioning.registry.line import Batch
from birthmark.provisioning.registry.model import KeyMode, Row, State
from birthmark.provisioning.renewal import open_renewals

if TYPE_CHECKING:
    from support.station import Answer

    from birthmark.provisioning.station import Station

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def request(name: str, key: PrivateKey | None = None, **odd: Any) -> str:
    """Return a certification request in PEM; `odd` makes it another than the station takes."""
    key = key or ec.generate_private_key(odd.get("curve", ec.SECP256R1()))
    names = [x509.NameAttribute(NameOID.COMMON_NAME, name)]
    names += [x509.NameAttribute(NameOID.ORGANIZATION_NAME, text) for text in odd.get("more", [])]
    made = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(names))
    return made.sign(key, odd.get("hash", SHA256())).public_bytes(Encoding.PEM).decode()


def write_csv(path: Path, *rows: dict[str, str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows_of(station: Station) -> list[Row]:
    with station.registry.view() as view:
        return view.rows()


def refused(answer: Answer, *causes: str, code: int = 1) -> None:
    assert answer.exit_code == code, answer
    assert "issued" not in answer.stdout
    *_, error, hint = answer.stderr.splitlines()
    assert error.startswith("error: could not use ")
    assert all(cause in error for cause in causes), error
    assert hint.startswith("hint: ")


def test_a_csv_with_requests_in_it_and_beside_it(birthmark: Command, living: Station) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    Path("requests").mkdir()
    Path("requests/two.pem").write_text(request("pump-2", key))
    table = write_csv(
        Path("devices.csv"),
        {"csr": request("pump-1"), "id": "pump-1", "role": "pump", "hwid": "0a0b0c0d"},
        {"csr": "requests/two.pem", "id": "pump-2", "role": "", "hwid": ""},
    )
    with living.registry.transaction() as transaction:
        transaction.put_batch(Batch("W47", living.clock()))
    answer = birthmark("issue", "--from", table, "--out", "out")
    assert answer.exit_code == 0, answer
    assert "certificates issued: 2; all are in out" in answer.stdout
    one, two = rows_of(living)
    assert [(row.name, row.role, row.hwid, row.state, row.key_mode, row.batch) for row in (one, two)] == [
        ("pump-1", "pump", b"\n\x0b\x0c\r", State.ATTESTED, KeyMode.ON_DEVICE, "W47"),
        ("pump-2", "sensor", None, State.ATTESTED, KeyMode.ON_DEVICE, "W47"),
    ]
    assert {path.name for path in Path("out").iterdir()} == {"pump-1.crt.pem", "pump-2.crt.pem", "ca.pem"}
    leaf, issuing = x509.load_pem_x509_certificates(Path("out/pump-2.crt.pem").read_bytes())
    assert leaf.public_bytes(Encoding.DER) == two.certificate_der
    assert leaf.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) == (
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    assert issuing == living.issuing
    verify = ["openssl", "verify", "-x509_strict", "-CAfile", "out/ca.pem", "-untrusted"]
    subprocess.run([*verify, "out/pump-2.crt.pem", "out/pump-2.crt.pem"], check=True, capture_output=True)
    actions = [(entry["action"], entry["subject"]) for entry in audit.read(living.registry.audit_path)]
    issued = [("issue-from", "devices.csv"), ("issue", "pump-1"), ("issue", "pump-2")]
    assert actions[-4:] == [("unlock", "issuing-ca"), *issued]
    assert birthmark("audit", "verify").exit_code == 0


def test_a_folder_of_requests_and_a_line_a_device(birthmark: Command, living: Station) -> None:
    Path("in").mkdir()
    for name in ("b-2", "a-1", "c-3"):
        Path(f"in/{name}.csr.pem").write_text(request(name))
    Path("in/.DS_Store").write_bytes(b"\0")
    answer = birthmark("issue", "--from", "in", "--role", "meter", "--out", "out.jsonl", "--json")
    assert answer.records == [
        {"event": "read", "devices": 3},
        {"event": "progress", "done": 3, "of": 3},
        {"event": "result", "issued": 3, "known": 0, "out": "out.jsonl"},
    ]
    records = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == ["a-1", "b-2", "c-3"]
    assert {record["role"] for record in records} == {"meter"}
    for row, record in zip(rows_of(living), records, strict=True):
        (_, leaf_der), (_, issuing_der) = read_blocks(record["certificate"].encode())
        assert (leaf_der, f"{row.cert_serial:x}") == (row.certificate_der, record["cert_serial"])
        assert issuing_der == living.issuing.public_bytes(Encoding.DER)


def test_again_issues_nothing_and_writes_the_same(
    birthmark: Command, living: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "GROUP", 2)
    lines = [json.dumps({"id": f"d-{n}", "csr": request(f"d-{n}")}) for n in range(5)]
    Path("some.jsonl").write_text("\n".join(lines[:3]))
    Path("all.jsonl").write_text("\ufeff" + "\r\n".join(lines))
    assert birthmark("issue", "--from", "some.jsonl", "--out", "out.jsonl").exit_code == 0
    some = Path("out.jsonl").read_text()
    answer = birthmark("issue", "--from", "all.jsonl", "--out", "out.jsonl", "--json")
    assert [record.get("done") for record in answer.records] == [None, 5, None]
    assert answer.records[-1] == {"event": "result", "issued": 2, "known": 3, "out": "out.jsonl"}
    every = Path("out.jsonl").read_text()
    assert every.startswith(some)
    before = rows_of(living)
    assert birthmark("issue", "--from", "all.jsonl", "--out", "out.jsonl").exit_code == 0
    assert birthmark("issue", "--from", "all.jsonl", "--out", "out").exit_code == 0
    assert Path("out.jsonl").read_text() == every
    one = Path("out/d-1.crt.pem")
    whole = one.read_bytes()
    one.write_bytes(whole[:99])
    assert birthmark("issue", "--from", "all.jsonl", "--out", "out").exit_code == 0
    assert one.read_bytes() == whole, "what is not as it should be is written anew"
    assert len(list(Path("out").iterdir())) == 6
    assert rows_of(living) == before


def test_what_was_recorded_and_not_signed_is_signed(
    birthmark: Command, living: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"id": name, "csr": request(name)}) for name in ("d-1", "d-2")]
    Path("two.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(bulk, "GROUP", 1)
    real, asked = bulk._Run.sign, []

    def once(self: bulk._Run, rows: list[Row]) -> list[Row]:
        asked.append(rows)
        if len(asked) == 2:
            raise OSError(28, "No space left on device")
        return real(self, rows)

    monkeypatch.setattr(bulk._Run, "sign", once)
    assert birthmark("issue", "--from", "two.jsonl", "--out", "out").exit_code == 5
    one, two = rows_of(living)
    assert (one.state, two.state) == (State.ATTESTED, State.KEYED)
    answer = birthmark("issue", "--from", "two.jsonl", "--out", "out", "--json")
    assert answer.records[-1] == {"event": "result", "issued": 1, "known": 1, "out": "out"}
    again = rows_of(living)
    assert again[0] == one
    assert (again[1].state, again[1].cert_serial) == (State.ATTESTED, two.cert_serial)


def test_what_was_recorded_under_another_ca_is_signed_by_it_in_one_group(
    birthmark: Command, living: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run was killed before it signed, the issuing CA was changed, and its devices stand between new ones."""
    lines = [json.dumps({"id": f"d-{n}", "csr": request(f"d-{n}")}) for n in range(6)]
    Path("odd.jsonl").write_text("\n".join(lines[1::2]))
    Path("all.jsonl").write_text("\n".join(lines))
    groups: list[list[Row]] = []
    real = bulk._Run.sign

    def full(self: bulk._Run, rows: list[Row]) -> list[Row]:
        raise OSError(28, "No space left on device")

    def counted(self: bulk._Run, rows: list[Row]) -> list[Row]:
        groups.append(rows)
        return real(self, rows)

    monkeypatch.setattr(bulk._Run, "sign", full)
    assert birthmark("issue", "--from", "odd.jsonl", "--out", "out").exit_code == 5
    old = {row.issuer for row in rows_of(living)}
    assert birthmark("ca", "rollover", "start", "issuing").exit_code == 0
    assert birthmark("ca", "rollover", "activate", "--force").exit_code == 0
    monkeypatch.setattr(bulk._Run, "sign", counted)
    assert birthmark("issue", "--from", "all.jsonl", "--out", "out").exit_code == 0
    by_issuer = {rows[0].issuer: sorted(row.name for row in rows) for rows in groups}
    assert len(groups) == len(by_issuer) == 2, "a transaction for each CA, not for each change from one to another"
    assert by_issuer.pop(*old) == ["d-1", "d-3", "d-5"]
    assert list(by_issuer.values()) == [["d-0", "d-2", "d-4"]]
    for row in rows_of(living):
        assert row.state is State.ATTESTED
        leaf = x509.load_der_x509_certificate(row.certificate_der or b"")
        with living.registry.view() as view:
            leaf.verify_directly_issued_by(read_cas(view).get(row.issuer).certificate)


HEAD = "id,role,csr,hwid\n"


@pytest.mark.parametrize(
    ("content", "causes"),
    [
        (b"", ["is empty"]),
        (HEAD.encode(), ["there is no device"]),
        (b"id,csr,colour\nx,y,z\n", ["line 1", "no column 'colour'"]),
        (b"id,csr,id\nx,y,z\n", ["line 1", "column id twice"]),
        (b"role,csr\nx,y\n", ["line 1", "no column id"]),
        (b"ID,csr\nx,y\n", ["line 1", "no column 'ID'"]),
        (b"id,csr\nx\n", ["line 2", "1 fields"]),
        (b"id,csr\nx,y,z\n", ["line 2", "3 fields"]),
        (b"id,role\nx,pump\n", ["line 2", "x has no csr"]),
        (b"id,csr\n,y\n", ["line 2", "has no id"]),
        (b"id,csr\na b,y\n", ["line 2", "as a device id"]),
        (b"id,csr\n=1+1,y\n", ["line 2", "as a device id"]),
        (b"id,role,csr\nx,operator,y\n", ["line 2", "reserved for services"]),
        (b"id,csr\nx,nowhere.pem\n", ["line 2", "request of x cannot be read", "No such file"]),
        (b"id,csr\nx,a\0b\n", ["line 2", "NUL"]),
        (b"id,csr,hwid\nx,GOOD,zz\n", ["line 2", "hwid is not 4 to 32 octets"]),
        (b"id,csr,hwid\nx,GOOD,0102\n", ["line 2", "hwid is not 4 to 32 octets"]),
        (b'id,csr\nx,"y\n', ["is no CSV"]),
        (b"id,csr\n\xff,y\n", ["not in UTF-8"]),
        (b"id,csr\nx," + b"y" * 17_000 + b"\n", ["line 2", "csr is longer than"]),
        (b"id,csr\nx," + b"y" * 200_000 + b"\n", ["line 2", "is longer than"]),
        (b"id,csr\nx,GOOD\n\ny,GOOD\n", ["line 4"]),
        (b"id,csr\nx,TWICE\ny,TWICE\n", ["line 3", "CN"]),
    ],
)
def test_a_bad_csv_is_named_and_nothing_of_it_applied(
    birthmark: Command, living: Station, content: bytes, causes: list[str]
) -> None:
    for name in ("GOOD", "TWICE"):
        Path(name).write_text(request("x"))
    Path("bad.csv").write_bytes(content)
    answer = birthmark("issue", "--from", "bad.csv", "--out", "out")
    if causes == ["not in UTF-8"]:
        assert "could not read bad.csv: it is not in UTF-8" in answer.stderr
    else:
        refused(answer, "bad.csv", *causes)
    assert rows_of(living) == []
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("[]", "no JSON object"),
        ("{", "no JSON"),
        ("[" * 100_000, "longer than"),
        ("[" * 50_000, "no JSON"),
        ('{"id": "x", "id": "y"}', "names a field twice"),
        ('{"id": 7}', "its id is no text"),
        ('{"id": "x", "color": "y"}', "no field 'color'"),
        ('{"csr": "x"}', "has no id"),
        ('{"id": "x", "csr": null}', "x has no csr"),
        ('{"id": "x", "csr": "a\\u0000b"}', "NUL"),
        ('{"id": "\\ud800", "csr": "x"}', "its id has half a character"),
        ('{"id": "x", "csr": "\\ud800"}', "its csr has half a character"),
    ],
)
def test_a_bad_jsonl_is_named_and_nothing_of_it_applied(
    birthmark: Command, living: Station, line: str, cause: str
) -> None:
    good = json.dumps({"id": "good", "csr": request("good")})
    Path("bad.jsonl").write_text(f"{good}\n\n{line}\n")
    refused(birthmark("issue", "--from", "bad.jsonl", "--out", "out"), "bad.jsonl, line 3: ", cause)
    assert rows_of(living) == []
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda: request("pump-2"), "not exactly CN = pump-1"),
        (lambda: request("Pump-1"), "not exactly CN = pump-1"),
        (lambda: request("pump-1", more=["Acme"]), "not exactly CN = pump-1"),
        (lambda: request("pump-1", curve=ec.SECP384R1()), "not on P-256"),
        (lambda: request("pump-1", rsa.generate_private_key(65537, 2048)), "512"),
        (lambda: request("pump-1", hash=SHA384()), "ECDSA and SHA-256"),
        (lambda: request("pump-1") * 2, "none, or more than one"),
        (lambda: "nothing", "none, or more than one"),
        (lambda: "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n", "not closed"),
        (lambda: request("pump-1") + " " * 9000, "too long"),
    ],
)
def test_a_request_that_cannot_be_signed_is_named(
    birthmark: Command, living: Station, make: Any, cause: str
) -> None:
    Path("in").mkdir()
    Path("in/a.csr.pem").write_text(request("a"))
    Path("in/pump-1.csr.pem").write_text(make())
    answer = birthmark("issue", "--from", "in", "--out", "out")
    refused(answer, "in, pump-1.csr.pem: ", cause)
    assert "device is hostile" not in answer.stderr, "it is no board on a cable that is at fault"
    assert rows_of(living) == []
    assert not Path("out").exists()


def test_a_request_whose_signature_was_changed_is_refused(birthmark: Command, living: Station) -> None:
    one, two = (x509.load_pem_x509_csr(request("x").encode()) for _ in range(2))
    der = one.public_bytes(Encoding.DER).replace(
        one.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint),
        two.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint),
    )
    pem = x509.load_der_x509_csr(der).public_bytes(Encoding.PEM).decode()
    Path("one.jsonl").write_text(json.dumps({"id": "x", "csr": pem}))
    refused(birthmark("issue", "--from", "one.jsonl", "--out", "out"), "self-signature does not verify")
    assert rows_of(living) == []


def test_a_folder_with_something_else_in_it_is_refused(birthmark: Command) -> None:
    Path("in").mkdir()
    refused(birthmark("issue", "--from", "in", "--out", "out"), "in: there is no device in it")
    Path("in/x.csr").write_text(request("x"))
    refused(birthmark("issue", "--from", "in", "--out", "out"), "in, x.csr: it is not named like a request")
    Path("in/x.csr").rename("in/-x.csr.pem")
    refused(birthmark("issue", "--from", "in", "--out", "out"), "in, -x.csr.pem: ", "as a device id")
    answer = birthmark("issue", "--from", "in/-x.csr.pem", "--out", "out")
    assert "its name ends neither in .csv nor in .jsonl" in answer.stderr
    answer = birthmark("issue", "--from", "nowhere", "--out", "out")
    assert "could not read nowhere: No such file or directory" in answer.stderr


def test_the_output_is_never_written_over_the_requests_nor_among_them(birthmark: Command, living: Station) -> None:
    Path("in").mkdir()
    Path("in/x.csr.pem").write_text(request("x"))
    line = json.dumps({"id": "x", "csr": request("x")})
    Path("in.jsonl").write_text(line)
    for source in ("in", "in.jsonl"):
        answer = birthmark("issue", "--from", source, "--out", f"./{source}")
        assert answer.exit_code == 2
        assert f"could not use {source} for --out: the requests are there" in answer.stderr
    assert Path("in.jsonl").read_text() == line
    assert [path.name for path in Path("in").iterdir()] == ["x.csr.pem"]
    assert rows_of(living) == []


@pytest.mark.parametrize("name", ["out.csv", "devices.txt"])
def test_an_output_that_is_neither_a_folder_nor_jsonl_is_refused(
    birthmark: Command, living: Station, name: str
) -> None:
    Path("devices.txt").write_text("mine")
    Path("in.jsonl").write_text(json.dumps({"id": "x", "csr": request("x")}))
    answer = birthmark("issue", "--from", "in.jsonl", "--out", name)
    assert answer.exit_code == 2
    assert f"could not use {name} for --out: it is neither a folder nor named .jsonl" in answer.stderr
    assert (Path("devices.txt").read_text(), Path("out.csv").exists()) == ("mine", False)
    assert rows_of(living) == []


def test_twice_the_same_in_one_file_is_refused(birthmark: Command, living: Station) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    for one, two, what in (
        ({"id": "x", "csr": request("x")}, {"id": "X", "csr": request("X")}, "the id of X is that of line 1"),
        ({"id": "x", "csr": request("x", key)}, {"id": "y", "csr": request("y", key)}, "the key of y"),
        (
            {"id": "x", "csr": request("x"), "hwid": "01020304"},
            {"id": "y", "csr": request("y"), "hwid": "01020304"},
            "the hwid of y",
        ),
    ):
        Path("two.jsonl").write_text(json.dumps(one) + "\n" + json.dumps(two))
        refused(birthmark("issue", "--from", "two.jsonl", "--out", "out"), "two.jsonl, line 2: ", what)
    assert rows_of(living) == []


def test_more_devices_than_fit_into_one_go_are_refused(
    birthmark: Command, living: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_requests, "MAX_DEVICES", 2)
    lines = [json.dumps({"id": name, "csr": request(name)}) for name in ("d-1", "d-2", "d-3")]
    Path("three.jsonl").write_text("\n".join(lines))
    refused(birthmark("issue", "--from", "three.jsonl", "--out", "out"), "line 3", "more than 2 devices")
    assert rows_of(living) == []
    Path("two.jsonl").write_text("\n".join(lines[:2]))
    assert birthmark("issue", "--from", "two.jsonl", "--out", "out").exit_code == 0


def test_who_interrupts_it_is_told_that_nothing_is_lost(birthmark: Command, living: Station) -> None:
    Path("in.jsonl").write_text(json.dumps({"id": "x", "csr": request("x")}))
    words = ["issue", "--from", "in.jsonl", "--out", "out.jsonl"]
    reading, writing = os.pipe()
    environment = {key: value for key, value in os.environ.items() if key != "BIRTHMARK_PASSPHRASE"}
    with subprocess.Popen(
        [sys.executable, "-m", "birthmark.provisioning", *words, "--passphrase-fd", str(reading)],
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=[reading],
        env=environment | {"BIRTHMARK_STATION": str(living.folder)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "devices read and checked: 1\n"
        process.send_signal(signal.SIGINT)  # while it waits for a passphrase, which does not come
        told, code = process.stdout.read(), process.wait(PATIENCE_S)
    os.close(reading)
    os.close(writing)
    assert (told.startswith("interrupted; nothing is lost"), code) == (True, 130)
    assert birthmark(*words).exit_code == 0


def test_what_belongs_to_another_device_is_refused_and_nothing_applied(
    birthmark: Command, living: Station
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    Path("first.jsonl").write_text(json.dumps({"id": "first", "csr": request("first", key), "hwid": "01020304"}))
    assert birthmark("issue", "--from", "first.jsonl", "--out", "out").exit_code == 0
    enrolled_row(living, "taken")
    keyed_row(living, "begun")
    before = rows_of(living)
    for claim, what in (
        (
            {"id": "TAKEN", "csr": request("TAKEN")},
            "belongs to device taken, row 2, ATTESTED, which is written otherwise",
        ),
        ({"id": "begun", "csr": request("begun")}, "the name of begun belongs to device begun"),
        (
            {"id": "first", "csr": request("first")},
            "the name of first belongs to device first, row 1, ATTESTED, with another key",
        ),
        ({"id": "first", "csr": request("first", key), "role": "pump"}, "ATTESTED, with the role sensor"),
        ({"id": "first", "csr": request("first", key), "hwid": "05060708"}, "ATTESTED, with another hwid"),
        ({"id": "z", "csr": request("z", key)}, "the public key of z belongs to device first"),
        ({"id": "z", "csr": request("z"), "hwid": "01020304"}, "the hwid of z belongs to device first"),
    ):
        good = {"id": "good", "csr": request("good")}
        Path("more.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(claim))
        refused(birthmark("issue", "--from", "more.jsonl", "--out", "more"), "more.jsonl, line 2: ", what, code=3)
    assert rows_of(living) == before
    assert birthmark("revoke", "first", "--reason", "lost").exit_code == 0
    refused(birthmark("issue", "--from", "first.jsonl", "--out", "out"), "row 1, ATTESTED, and is revoked", code=3)


def test_a_wrong_passphrase_records_nothing(
    birthmark: Command, living: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("one.jsonl").write_text(json.dumps({"id": "x", "csr": request("x")}))
    monkeypatch.setenv("BIRTHMARK_PASSPHRASE", "wrong")
    answer = birthmark("issue", "--from", "one.jsonl", "--out", "out")
    assert answer.exit_code == 6
    assert rows_of(living) == []
    assert not Path("out").exists()


def test_keys_that_the_station_makes(birthmark: Command, living: Station) -> None:
    Path("some.csv").write_text("id,role\npump-1,pump\npump-2,\n")
    words = ["issue", "--from", "some.csv", "--out", "boards", "--keys", "station"]
    answer = birthmark(*words, "--broker", "gateway-1.example.com:8884")
    assert answer.exit_code == 0, answer
    for name, role in (("pump-1", "pump"), ("pump-2", "sensor")):
        folder = Path("boards") / name
        credentials = Credentials.from_folder(folder)
        assert (credentials.device_id, str(credentials.role)) == (DeviceId(name), role)
        assert str(credentials.broker) == "gateway-1.example.com:8884"
        assert credentials.anchors_der == (living.root.public_bytes(Encoding.DER),)
        assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "active")] == [0o700, 0o600]
        assert [path.name for path in folder.iterdir()] == ["active"]
        with living.registry.view() as view:
            row = view.live_by_name(name)
            assert row is not None
            assert open_renewals(view, row) == []
        assert (row.state, row.key_mode, row.bundle) == (State.ATTESTED, KeyMode.STATION, None)
        assert row.certificate_der == credentials.leaf_der
        assert row.bundle_sha256 is not None
    before = {path: path.read_bytes() for path in Path("boards").rglob("*") if path.is_file()}
    rows = rows_of(living)
    again = birthmark(*words, "--json")
    assert again.records[-1] == {"event": "result", "issued": 0, "known": 2, "out": "boards"}
    assert {path: path.read_bytes() for path in Path("boards").rglob("*") if path.is_file()} == before
    assert rows_of(living) == rows
    keys = [block for path in before for label, block in read_blocks(before[path]) if label == "PRIVATE KEY"]
    for path in living.folder.rglob("*"):
        assert not any(key[-64:] in path.read_bytes() for key in keys if path.is_file())


def test_a_key_of_the_stations_needs_a_folder_and_is_not_made_twice(birthmark: Command, living: Station) -> None:
    Path("one.csv").write_text("id\npump-1\n")
    words = ["issue", "--from", "one.csv", "--keys", "station", "--out"]
    answer = birthmark(*words, "out.jsonl")
    assert answer.exit_code == 1
    assert "could not make a key for pump-1" in answer.stderr
    assert rows_of(living) == []
    assert birthmark(*words, "boards").exit_code == 0
    refused(birthmark(*words, "elsewhere"), "one.csv, line 2: the name of pump-1 belongs to", code=3)
    assert not list(Path("elsewhere").iterdir()), "no key is left that is nobody's"
    (Path("boards") / "pump-1" / "active").write_text("damaged")
    answer = birthmark(*words, "boards")
    assert "could not use the key in boards/pump-1/active: the file is damaged" in answer.stderr
