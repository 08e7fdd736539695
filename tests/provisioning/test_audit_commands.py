"""`birthmark audit show | export | verify`: what they choose, what leaves, and the word that it left."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from support.station import NOON, PASSPHRASE, Clock, Command

from birthmark.device.console import UNHEARD
from birthmark.provisioning import audit_view

if TYPE_CHECKING:
    from pathlib import Path

    from birthmark.provisioning.station import Station


@pytest.fixture
def logged(living: Station) -> Station:
    """A station with entries of three days."""
    clock = Clock(living.clock() - timedelta(days=2))
    told = type(living).open(living.folder, passphrase=PASSPHRASE, clock=clock)
    for subject, actions in (("sensor-1", ["issue", "revoke"]), ("=cmd", ["issue"]), ("pump-1", ["issue"])):
        with told.registry.transaction() as transaction:
            for action in actions:
                transaction.record(action, subject, cause='a, "b"\nc')
        clock.advance(hours=30)
    return living


def shown(birthmark: Command, *options: str) -> list[tuple[str, str]]:
    entries = birthmark("audit", "show", *options, "--json").records
    return [(entry["action"], entry["subject"]) for entry in entries if entry["actor"] != "-"]


def test_show_chooses(birthmark: Command, logged: Station) -> None:
    assert shown(birthmark, "--subject", "SENSOR*") == [("issue", "sensor-1"), ("revoke", "sensor-1")]
    assert shown(birthmark, "--action", "re?oke") == [("revoke", "sensor-1")]
    assert shown(birthmark, "--action", "issue", "--last", "1") == [("issue", "pump-1")]
    assert shown(birthmark, "--since", "1d", "--action", "issue") == [("issue", "=cmd"), ("issue", "pump-1")]
    assert shown(birthmark, "--until", "1d", "--action", "issue") == [("issue", "sensor-1")]
    assert shown(birthmark, "--since", "2999-01-01") == []
    assert shown(birthmark, "--actor", "nobody@nowhere") == []


@pytest.mark.parametrize("text", ["yesterday", "", "0d", "999999999w", "-1d", "2026-13-01"])
def test_a_time_that_is_none_is_said(birthmark: Command, logged: Station, text: str) -> None:
    answer = birthmark("audit", "show", f"--since={text}")
    assert answer.exit_code == 2
    assert "is no time" in answer.stderr
    assert "hint:" in answer.stderr


def test_an_export_that_nobody_takes_ends_like_any_other_output(living: Station) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "birthmark.provisioning", "audit", "export", "--station", str(living.folder)]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=kept, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (UNHEARD, b"")


def test_times_are_read() -> None:
    assert audit_view.moment("3d", NOON) == NOON - timedelta(days=3)
    assert audit_view.moment("2026-11-27", NOON) == datetime(2026, 11, 27, tzinfo=UTC)
    assert audit_view.moment("2026-11-27T08:30+01:00", NOON) == datetime(2026, 11, 27, 7, 30, tzinfo=UTC)


def test_a_whole_export_ends_with_the_word_of_it(birthmark: Command, logged: Station, tmp_path: Path) -> None:
    out = tmp_path / "log.jsonl"
    answer = birthmark("audit", "export", "--out", out, "--json")
    assert out.read_bytes() == logged.registry.audit_path.read_bytes()
    assert out.stat().st_mode & 0o777 == 0o600
    last: dict[str, Any] = json.loads(out.read_text().splitlines()[-1])
    assert (last["action"], last["subject"], last["details"]["to"]) == ("export", "audit-log", str(out))
    assert answer.records == [{"file": str(out), "entries": last["seq"]}]


def test_a_part_is_exported_as_csv(birthmark: Command, logged: Station) -> None:
    text = birthmark("audit", "export", "--format", "csv", "--action", "issue").stdout
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["subject"] for row in rows] == ["sensor-1", "'=cmd", "pump-1"]
    assert json.loads(rows[0]["details"]) == {"cause": 'a, "b"\nc'}
    (entry,) = birthmark("audit", "show", "--action", "export", "--json").records
    assert entry["details"]["of_action"] == "issue"
    assert entry["details"]["to"] == "stdout"


def test_an_export_that_fails_leaves_nothing(birthmark: Command, logged: Station, tmp_path: Path) -> None:
    answer = birthmark("audit", "export", "--out", tmp_path / "none" / "log.jsonl")
    assert answer.exit_code == 5
    assert not (tmp_path / "none").exists()


def test_verify_says_what_must_be_there_and_what_is(birthmark: Command, logged: Station) -> None:
    log = logged.registry.audit_path
    lines = log.read_text().splitlines(keepends=True)
    at = next(number for number, line in enumerate(lines) if '"subject":"sensor-1"' in line)
    hash_of_it = json.loads(lines[at])["hash"]
    lines[at] = lines[at].replace("sensor-1", "pump-2")
    log.write_text("".join(lines))

    answer = birthmark("audit", "verify")
    assert answer.exit_code == 6
    assert f"line {at + 1} (entry {at + 1}) was edited" in answer.stdout
    assert f"expected hash {hash_of_it}" in answer.stdout
    (problem,) = birthmark("audit", "verify", "--json").records[0]["problems"]
    assert (problem["line"], problem["kind"], problem["expected"]) == (at + 1, "edited", hash_of_it)
    assert problem["found"] not in ("", hash_of_it)


def test_an_edit_of_the_last_line_is_named_though_it_was_put_back(birthmark: Command, logged: Station) -> None:
    log = logged.registry.audit_path
    count = len(log.read_text().splitlines())
    log.write_text(log.read_text().replace('"subject":"pump-1"', '"subject":"pump-2"'))
    answer = birthmark("audit", "verify")
    assert answer.exit_code == 6
    assert f"line {count} (entry {count}) was edited: it stands as it was in line {count + 1}" in answer.stdout


def test_that_nothing_fits_is_said(birthmark: Command, logged: Station) -> None:
    assert birthmark("audit", "show", "--action", "none").stdout == "there is no entry that fits\n"
    assert birthmark("audit", "show", "--action", "none", "--json").stdout == ""


def test_lines_that_are_no_entry_are_not_left_out_in_silence(
    birthmark: Command, logged: Station, tmp_path: Path
) -> None:
    log = logged.registry.audit_path
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(["noise\n", *lines, "\n"]))
    out = tmp_path / "log.jsonl"

    for words in (("show", "--last", "1"), ("export",), ("export", "--out", out)):
        answer = birthmark("audit", *words)
        assert answer.exit_code == 0
        assert (
            "2 lines that are no audit entry left out, the first is line 1: `birthmark audit verify`"
            in answer.stderr
        )
    assert out.read_text().startswith("".join(lines))
