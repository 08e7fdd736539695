"""`birthmark ca passphrase`: old or new at any moment, and nothing of the old one where a file system lets."""

from __future__ import annotations

import errno
import functools
import os
from typing import TYPE_CHECKING

import pytest
from support.station import CHEAP, PASSPHRASE, Command

from birthmark.device import durable
from birthmark.device.errors import AuthorityError
from birthmark.provisioning import audit, ca_commands, keyfile
from birthmark.provisioning.cas import CaKind
from birthmark.provisioning.passphrase_change import change_passphrase
from birthmark.provisioning.rollover.starting import RootKey, start_issuing
from birthmark.provisioning.station import Station

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NEW = b"quite another one"


@pytest.fixture
def changing(birthmark: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setenv("BIRTHMARK_NEW_PASSPHRASE", NEW.decode())
    monkeypatch.setattr(ca_commands, "change_passphrase", functools.partial(change_passphrase, derivation=CHEAP))
    return birthmark


@pytest.fixture
def two_cas(living: Station) -> Station:
    start_issuing(living, lambda: RootKey(PASSPHRASE), derivation=CHEAP)
    return Station.open(living.folder, passphrase=PASSPHRASE)


def opens(station: Station, passphrase: bytes, kind: CaKind = CaKind.ISSUING) -> list[bool]:
    found = []
    for ca in station.cas:
        if ca.kind is kind:
            try:
                keyfile.read_key(station.key_path(ca), passphrase, whose="it")
                found.append(True)
            except AuthorityError:
                found.append(False)
    return found


def test_every_issuing_key_opens_with_the_new_one_alone(changing: Command, two_cas: Station) -> None:
    answer = changing("ca", "passphrase", "issuing", "--json")
    assert answer.exit_code == 0, answer.stderr
    assert [record["newly"] for record in answer.records] == [True, True]
    assert (opens(two_cas, NEW), opens(two_cas, PASSPHRASE)) == ([True, True], [False, False])
    assert opens(two_cas, PASSPHRASE, CaKind.ROOT) == [True]
    assert {two_cas.key_path(ca).stat().st_mode & 0o777 for ca in two_cas.cas} == {0o400}
    entries = [entry for entry in audit.read(two_cas.registry.audit_path) if entry["action"] == "passphrase"]
    assert {entry["details"]["key_id"] for entry in entries} == {ca.key_id for ca in two_cas.cas.issuing}
    assert changing("crl").exit_code == 6  # with the old one in the environment
    everything = answer.stdout + answer.stderr + two_cas.registry.audit_path.read_text()
    assert NEW.decode() not in everything
    assert PASSPHRASE.decode() not in everything


def test_a_root_s_key_on_its_medium(changing: Command, living: Station, tmp_path: Path) -> None:
    (tmp_path / "medium").mkdir()
    assert changing("ca", "detach-root", "--to", tmp_path / "medium", "--same-disk").exit_code == 0
    answer = changing("ca", "passphrase", "root")
    assert "there is no such key file" in answer.stderr
    (key,) = (tmp_path / "medium").iterdir()
    assert changing("ca", "passphrase", "root", "--root-key", key).exit_code == 0
    assert living.root_issuer(NEW, key)
    assert "is for the root" in changing("ca", "passphrase", "issuing", "--root-key", key).stderr
    other = key.with_name("other.pem")
    other.write_bytes(b"")
    assert "is not the name" in changing("ca", "passphrase", "root", "--root-key", other).stderr


def test_by_descriptors(changing: Command, living: Station, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BIRTHMARK_PASSPHRASE")
    monkeypatch.delenv("BIRTHMARK_NEW_PASSPHRASE")
    given = []
    for word in (PASSPHRASE, NEW):
        reading, writing = os.pipe()
        os.write(writing, word + b"\n")
        os.close(writing)
        given.append(reading)
    options = ["--passphrase-fd", given[0], "--new-passphrase-fd", given[1]]
    assert changing("ca", "passphrase", "issuing", *options).exit_code == 0
    for descriptor in given:
        os.close(descriptor)
    assert opens(living, NEW) == [True]


@pytest.mark.parametrize(
    ("old", "new", "cause"), [(b"wrong", NEW, "is wrong"), (PASSPHRASE, PASSPHRASE, "is the old one")]
)
def test_what_cannot_be_changed_stays(living: Station, old: bytes, new: bytes, cause: str) -> None:
    before = living.registry.audit_head()
    with pytest.raises(AuthorityError, match=cause):
        change_passphrase(living, CaKind.ISSUING, old, new, derivation=CHEAP)
    assert (opens(living, PASSPHRASE), living.registry.audit_head()) == ([True], before)


def test_one_key_that_does_not_open_keeps_all_as_they_are(two_cas: Station) -> None:
    path = two_cas.key_path(two_cas.cas.issuing[1])
    keyfile.write_key(path, keyfile.read_key(path, PASSPHRASE, whose="it"), b"a third one", CHEAP)
    with pytest.raises(AuthorityError, match=path.name):
        change_passphrase(two_cas, CaKind.ISSUING, PASSPHRASE, NEW, derivation=CHEAP)
    assert opens(two_cas, NEW) == [False, False]


def test_stopped_between_two_keys_it_is_finished_by_the_same_again(
    two_cas: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., None] = durable.write_durably
    calls: list[Path] = []

    def failing(path: Path, content: bytes, *, mode: int) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "no room")
        real(path, content, mode=mode)

    monkeypatch.setattr(keyfile, "write_durably", failing)
    with pytest.raises(OSError, match="no room"):
        change_passphrase(two_cas, CaKind.ISSUING, PASSPHRASE, NEW, derivation=CHEAP)
    assert (opens(two_cas, NEW), opens(two_cas, PASSPHRASE)) == ([True, False], [False, True])
    done = change_passphrase(two_cas, CaKind.ISSUING, PASSPHRASE, NEW, derivation=CHEAP)
    assert [one.newly for one in done] == [False, True]
    assert opens(two_cas, NEW) == [True, True]


def test_the_old_bytes_are_overwritten_but_not_somebody_s_copy(living: Station, tmp_path: Path) -> None:
    path = living.key_path(living.cas.for_clients)
    old, content = os.open(path, os.O_RDONLY), path.read_bytes()
    change_passphrase(living, CaKind.ISSUING, PASSPHRASE, NEW, derivation=CHEAP)
    left = os.pread(old, len(content) + 1, 0)
    os.close(old)
    assert len(left) == len(content)
    assert not any(content[at : at + 16] in left for at in range(0, len(content), 16))
    copy = tmp_path / "copy"
    copy.hardlink_to(path)
    content = path.read_bytes()
    change_passphrase(living, CaKind.ISSUING, NEW, PASSPHRASE, derivation=CHEAP)
    assert copy.read_bytes() == content != path.read_bytes()
