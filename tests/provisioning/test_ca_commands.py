"""`birthmark ca`: which CAs there are, and where their keys are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.station import PASSPHRASE, enrolled_row

from birthmark.provisioning import audit

if TYPE_CHECKING:
    from support.station import Command

    from birthmark.provisioning.station import Station


def test_show_says_which_cas_there_are_and_where_their_keys_are(birthmark: Command, living: Station) -> None:
    root, issuing = birthmark("ca", "show", "--json").records

    assert (root["kind"], root["phase"], root["key"]) == ("root", "trusted", "here")
    assert (issuing["kind"], issuing["phase"], issuing["key"]) == ("issuing", "current", "here")
    assert issuing["root"] == root["key_id"] == living.cas.for_clients.root
    assert 3600 < issuing["days_left"] < 3660 < root["days_left"]


def test_show_says_that_a_key_is_away(birthmark: Command, living: Station) -> None:
    living.key_path(living.cas.roots[0]).unlink()

    keys = [record["key"] for record in birthmark("ca", "show", "--json").records]

    assert keys == ["away", "here"]
    assert "away" in birthmark("ca", "show").stdout


def detach(birthmark: Command, tmp_path: Path, *options: str) -> tuple[int, str, Path]:
    medium = tmp_path / "medium"
    medium.mkdir(exist_ok=True)
    answer = birthmark("ca", "detach-root", "--to", medium, "--same-disk", *options)
    return answer.exit_code, answer.stderr, medium


def test_a_station_without_its_roots_key_issues_and_revokes(
    birthmark: Command, living: Station, tmp_path: Path
) -> None:
    (root,) = living.cas.roots
    source = living.key_path(root)
    before = source.read_bytes()

    code, said, medium = detach(birthmark, tmp_path)

    assert (code, said) == (0, "")
    copy = medium / source.name
    assert copy.read_bytes() == before
    assert copy.stat().st_mode & 0o777 == 0o400
    assert not source.exists()
    (entry,) = [entry for entry in audit.read(living.registry.audit_path) if entry["action"] == "detach-root"]
    assert entry["details"] == {"key_id": root.key_id, "to": str(copy)}
    enrolled_row(living, "sensor-1")
    assert birthmark("issue-operator", "alice", "--out", tmp_path / "alice").exit_code == 0
    assert birthmark("revoke", "sensor-1", "--reason", "lost").exit_code == 0
    without = birthmark("crl", "--root")
    assert (without.exit_code, "--root-key FILE" in without.stderr) == (6, True)
    assert birthmark("crl", "--root", "--root-key", copy).exit_code == 0


@pytest.mark.parametrize("words", [["ca", "detach-root", "--to", "medium", "--same-disk"], ["crl", "--root"]])
def test_it_is_the_roots_passphrase_that_is_asked_for(
    birthmark: Command, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    asked: list[str] = []

    def answer(prompt: str) -> str:
        asked.append(prompt)
        return PASSPHRASE.decode()

    monkeypatch.delenv("BIRTHMARK_PASSPHRASE")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("getpass.getpass", answer)
    Path("medium").mkdir()

    assert birthmark(*words).exit_code == 0

    assert asked == ["Passphrase of the root CA: "]


def test_detaching_again_says_where_it_is(birthmark: Command, tmp_path: Path) -> None:
    detach(birthmark, tmp_path)

    answer = birthmark("ca", "detach-root", "--to", tmp_path / "medium", "--same-disk", "--json")

    assert answer.exit_code == 0
    assert answer.records[0]["newly"] is False
    (tmp_path / "other").mkdir()
    lost = birthmark("ca", "detach-root", "--to", tmp_path / "other", "--same-disk")
    assert lost.exit_code == 6
    assert "audit show --action detach-root" in lost.stderr


def test_a_wrong_passphrase_moves_nothing(
    birthmark: Command, living: Station, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIRTHMARK_ROOT_PASSPHRASE", "wrong")

    code, said, medium = detach(birthmark, tmp_path)

    assert code == 6
    assert "passphrase is wrong" in said
    assert list(medium.iterdir()) == []
    assert living.root_issuer(PASSPHRASE)


def test_a_folder_that_is_no_other_medium_is_refused(birthmark: Command, living: Station, tmp_path: Path) -> None:
    (tmp_path / "medium").mkdir()

    answer = birthmark("ca", "detach-root", "--to", tmp_path / "medium")

    assert answer.exit_code == 1
    assert "is the medium mounted?" in answer.stderr
    assert birthmark("ca", "detach-root", "--to", tmp_path / "nowhere").exit_code == 1
    assert living.root_issuer(PASSPHRASE)


def test_another_file_in_its_place_is_never_replaced(birthmark: Command, living: Station, tmp_path: Path) -> None:
    (tmp_path / "medium").mkdir()
    place = tmp_path / "medium" / living.key_path(living.cas.roots[0]).name
    place.write_bytes(b"somebody's")

    code, said, _ = detach(birthmark, tmp_path)

    assert code == 6
    assert "there is another file" in said
    assert place.read_bytes() == b"somebody's"
    assert living.root_issuer(PASSPHRASE)


@pytest.mark.parametrize(
    "words",
    [
        ["ca", "show"],
        ["list"],
        ["show", "sensor-1"],
        ["inspect", "crl.pem"],
        ["audit", "verify"],
        ["audit", "show"],
        ["audit", "export", "--out", "log.jsonl"],
        ["ca", "export", "issuing", "--out", "ca.pem"],
        ["ca", "rollover", "status"],
        ["crl", "status"],
        ["quarantine", "list"],
        ["label", "sensor-1"],
        ["gateway", "list"],
        ["batch", "report", "W46"],
        ["doctor", "--offline"],
    ],
)
def test_a_locked_station_still_answers(
    birthmark: Command, living: Station, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    enrolled_row(living, "sensor-1")
    assert birthmark("batch", "open", "W46").exit_code == 0
    assert birthmark("batch", "close").exit_code == 0
    monkeypatch.delenv("BIRTHMARK_PASSPHRASE")
    monkeypatch.chdir(living.folder)

    answer = birthmark(*words, "--json")

    assert answer.exit_code in ({0, 1} if words[0] == "doctor" else {0}), answer.stderr
    assert answer.records or words[0] in ("gateway", "crl", "quarantine")  # there is none
    assert "passphrase" not in answer.stderr
    last = list(audit.read(living.registry.audit_path))[-1]
    assert last["action"] != "unlock"


def test_a_locked_station_signs_nothing(
    birthmark: Command, living: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BIRTHMARK_PASSPHRASE")

    assert birthmark("crl").exit_code == 6
