"""Checkpoints: what a log rewritten whole cannot get past, and what is taken for one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from support.station import PASSPHRASE, Command, enrolled_row

from birthmark.device.errors import ConfigurationError
from birthmark.device.link.transcript import Label, sign, transcript
from birthmark.device.pem import block, read_blocks
from birthmark.provisioning import audit
from birthmark.provisioning.audit_checkpoint import SIGNATURE, STATEMENT, read_checkpoint
from birthmark.provisioning.profile import key_id
from birthmark.provisioning.station import Station

if TYPE_CHECKING:
    from collections.abc import Callable

DOCS = Path(__file__).parents[2] / "docs" / "audit.md"


@pytest.fixture
def carried(birthmark: Command, living: Station, tmp_path: Path) -> Path:
    """A checkpoint that was carried away, of a log that went on since."""
    enrolled_row(living, "sensor-1")
    path = tmp_path / "carried.pem"
    answer = birthmark("audit", "checkpoint", "--out", path, "--json")
    assert answer.exit_code == 0, answer.stderr
    assert path.read_bytes() == (living.folder / "checkpoint.pem").read_bytes()
    enrolled_row(living, "sensor-2")
    return path


def rewrite_all(station: Station) -> None:
    """Rewrite the log with another actor, and have the registry remember its new end."""
    log = station.registry.audit_path
    head, lines = audit.Head(), []
    for entry in audit.read(log):
        facts = {key: entry[key] for key in ("action", "subject", "details")}
        at = station.clock().fromisoformat(entry["at"])
        line, head = audit.chained(head, at=at, actor="somebody@else", **facts)
        lines.append(line)
    log.write_text("".join(line + "\n" for line in lines))
    path = station.folder / "registry.json"
    tables = json.loads(path.read_text())
    tables["meta"]["1"] |= {"audit_seq": head.seq, "audit_hash": head.hash}
    tables["outbox"] = {str(head.seq): {"line": lines[-1]}}
    shutil.copy(path, path.with_suffix(".new"))
    path.with_suffix(".new").write_text(json.dumps(tables))
    path.with_suffix(".new").replace(path)


def test_a_log_that_went_on_still_has_it(birthmark: Command, carried: Path) -> None:
    answer = birthmark("audit", "verify", "--checkpoint", carried)
    assert answer.exit_code == 0, answer.stdout
    assert answer.stdout.count("is that of the checkpoint of") == 1  # the station's own copy is the same


def test_a_log_rewritten_whole_with_the_registry_is_found(
    birthmark: Command, living: Station, carried: Path
) -> None:
    (living.folder / "checkpoint.pem").unlink()  # as whoever does this would
    seq = read_checkpoint(carried, [living.root]).head.seq
    rewrite_all(living)

    assert birthmark("audit", "verify").exit_code == 0  # nothing at the station tells
    answer = birthmark("audit", "verify", "--checkpoint", carried, "--json")

    assert answer.exit_code == 6
    (problem,) = answer.records[0]["problems"]
    assert (problem["kind"], problem["line"]) == ("rewritten", seq)
    assert problem["expected"] == read_checkpoint(carried, [living.root]).head.hash != problem["found"]


def test_the_copy_that_is_kept_finds_it_as_well(birthmark: Command, living: Station, carried: Path) -> None:
    rewrite_all(living)
    assert birthmark("audit", "verify").exit_code == 6


def without(lines: list[str], number: int) -> list[str]:
    return lines[: number - 1] + lines[number:]


def edited(lines: list[str], number: int) -> list[str]:
    return [*lines[: number - 1], lines[number - 1].replace('"actor":"', '"actor":"x'), *lines[number:]]


@pytest.mark.parametrize(("tamper", "kind"), [(without, "cut"), (edited, "edited")])
def test_what_a_checkpoint_misses_is_said_once(
    birthmark: Command,
    living: Station,
    carried: Path,
    tamper: Callable[[list[str], int], list[str]],
    kind: str,
) -> None:
    assert birthmark("crl").exit_code == 0
    seq = read_checkpoint(carried, [living.root]).head.seq
    log = living.registry.audit_path
    log.write_text("".join(tamper(log.read_text().splitlines(keepends=True), seq)))

    answer = birthmark("audit", "verify", "--checkpoint", carried, "--json")

    (problem,) = answer.records[0]["problems"]
    assert (answer.exit_code, problem["kind"], problem["line"]) == (6, kind, seq)
    assert problem["expected"] == read_checkpoint(carried, [living.root]).head.hash


def test_a_copy_of_a_log_is_checked_without_a_station(
    birthmark: Command, living: Station, carried: Path, tmp_path: Path
) -> None:
    out = tmp_path / "log.jsonl"
    assert birthmark("audit", "export", "--out", out).exit_code == 0
    nowhere = Command(tmp_path / "nowhere", birthmark._capsys)
    words = ["audit", "verify", "--log", out, "--checkpoint", carried]
    assert nowhere(*words, "--root", living.root_path).exit_code == 0
    assert "none of the roots" in nowhere(*words).stderr
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:5]))
    assert "is not there" in nowhere(*words, "--root", living.root_path).stdout
    assert "there is no such file" in nowhere("audit", "verify", "--log", tmp_path / "none").stderr


def test_a_checkpoint_of_an_old_root_is_known(birthmark: Command, living: Station, carried: Path) -> None:
    other = Station.open(living.folder, passphrase=PASSPHRASE)
    assert birthmark("ca", "rollover", "start", "issuing").exit_code == 0
    assert birthmark("ca", "rollover", "activate", "--force").exit_code == 0
    assert birthmark("audit", "verify", "--checkpoint", carried).exit_code == 0
    later = carried.with_name("later.pem")
    assert birthmark("audit", "checkpoint", "--out", later).exit_code == 0
    assert read_checkpoint(later, [other.root]).key_id != read_checkpoint(carried, [other.root]).key_id


def with_block(path: Path, label: str, change: Callable[[bytes], bytes]) -> None:
    blocks = read_blocks(path.read_bytes())
    path.write_bytes(b"".join(block(name, change(der) if name == label else der) for name, der in blocks))


@pytest.mark.parametrize(
    ("label", "change", "cause"),
    [
        (STATEMENT, lambda der: der.replace(b'"seq":', b'"seq": '), "no checkpoint"),
        (STATEMENT, lambda der: der[:-3] + b"00}", "signature does not verify"),
        (STATEMENT, lambda der: transcript(Label.ANCHORS, der[21:]), "no checkpoint"),
        (SIGNATURE, lambda der: der[:-1] + bytes([der[-1] ^ 1]), "signature does not verify"),
        (SIGNATURE, lambda _: b"", "signature does not verify"),
        ("CERTIFICATE", lambda der: der[:-1], "does not parse"),
        ("CERTIFICATE", lambda _: b"", "does not parse"),
    ],
)
def test_what_was_changed_is_none(
    carried: Path, living: Station, label: str, change: Callable[[bytes], bytes], cause: str
) -> None:
    with_block(carried, label, change)
    with pytest.raises(ConfigurationError, match=cause):
        read_checkpoint(carried, [living.root])


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"at": datetime(1999, 1, 1, tzinfo=UTC)}, "not valid then"),
        ({"key_id": "00" * 20}, "another CA"),
        ({"head": audit.Head(0, "0" * 64)}, "no checkpoint"),
        ({"head": audit.Head(5, "x" * 64)}, "no checkpoint"),
    ],
)
def test_what_the_ca_would_not_say_is_none(
    carried: Path, living: Station, change: dict[str, Any], cause: str
) -> None:
    made = replace(read_checkpoint(carried, [living.root]), **change)
    signed = transcript(Label.AUDIT, made.statement())
    with_block(carried, STATEMENT, lambda _: signed)
    with_block(carried, SIGNATURE, lambda _: living.authority.sign_transcript(signed))
    with pytest.raises(ConfigurationError, match=cause):
        read_checkpoint(carried, [living.root])


def test_another_ca_s_checkpoint_is_none(carried: Path, station: Station) -> None:
    with pytest.raises(ConfigurationError, match="none of the roots"):
        read_checkpoint(carried, [station.root])


def test_what_a_certificate_that_is_no_ca_s_signed_is_none(carried: Path, living: Station) -> None:
    """Below the root, and valid, and all of it signed as it should be: but only a CA speaks for the log."""
    key = generate_private_key(SECP256R1())
    issuer = living.root_issuer(PASSPHRASE)
    now = living.clock()
    leaf = (
        x509.CertificateBuilder(serial_number=1, public_key=key.public_key())
        .issuer_name(issuer.certificate.subject)
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sensor-1")]))
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(issuer.private_key, SHA256())
    )
    genuine = read_checkpoint(carried, [living.root])
    signed = transcript(Label.AUDIT, replace(genuine, key_id=key_id(leaf).hex()).statement())
    with_block(carried, "CERTIFICATE", lambda _: leaf.public_bytes(Encoding.DER))
    with_block(carried, STATEMENT, lambda _: signed)
    with_block(carried, SIGNATURE, lambda _: sign(key, signed))
    with pytest.raises(ConfigurationError, match="leads to none of the roots"):
        read_checkpoint(carried, [living.root])


@pytest.mark.parametrize("content", [b"", b"-----BEGIN X-----\n", b"\x00" * 40])
def test_files_that_are_none_are_said(living: Station, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "none.pem"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="could not use the checkpoint"):
        read_checkpoint(path, [living.root])


def test_a_file_that_is_there_is_kept(birthmark: Command, living: Station, carried: Path) -> None:
    before = carried.read_bytes(), living.registry.audit_head()
    answer = birthmark("audit", "checkpoint", "--out", carried)
    assert (answer.exit_code, "it is there already" in answer.stderr) == (1, True)
    assert (carried.read_bytes(), living.registry.audit_head()) == before


def test_doctor_counts_what_was_carried_away_alone(birthmark: Command, living: Station, tmp_path: Path) -> None:
    assert birthmark("audit", "checkpoint").exit_code == 0
    with living.registry.view() as view:
        assert view.counter("last_checkpoint_at") == 0
    assert birthmark("audit", "checkpoint", "--out", tmp_path / "away.pem").exit_code == 0
    with living.registry.view() as view:
        assert view.counter("last_checkpoint_at") > 0


def test_openssl_alone_checks_one_as_the_page_says(living: Station, carried: Path, tmp_path: Path) -> None:
    section = DOCS.read_text().split("## Checking a checkpoint without birthmark")[1]
    steps = re.findall(r"```\n(.*?)```", section, re.DOTALL)[0]
    shutil.copy(living.root_path, tmp_path / "root.pem")
    shutil.copy(carried, tmp_path / "checkpoint.pem")

    done = subprocess.run(["sh", "-ec", steps], cwd=tmp_path, capture_output=True, text=True, check=True)

    *said, statement = done.stdout.splitlines()
    assert said == ["checkpoint.pem: OK", "Verified OK"]
    told = json.loads(statement)
    line = living.registry.audit_path.read_text().splitlines()[told["seq"] - 1]
    assert json.loads(line)["hash"] == told["hash"]
    (tmp_path / "checkpoint.pem").write_text(
        carried.read_text().replace("CHECKPOINT-----\nAB", "CHECKPOINT-----\nAC")
    )
    assert subprocess.run(["sh", "-ec", steps], cwd=tmp_path, capture_output=True, check=False).returncode != 0
