"""How a station comes into being, and what is left when it does not."""

from __future__ import annotations

import resource
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from support.patience import PATIENCE_S
from support.station import CHEAP, PASSPHRASE, new_station

from birthmark.device.errors import AuthorityError, ConfigurationError, RegistryError
from birthmark.provisioning import audit
from birthmark.provisioning.crl_store import current_crl
from birthmark.provisioning.founding import found_station
from birthmark.provisioning.settings import Settings
from birthmark.provisioning.station import Station

if TYPE_CHECKING:
    from pathlib import Path

FILES = {
    "station.toml": 0o600,
    "registry.json": 0o600,
    "registry.lock": 0o600,
    "audit.jsonl": 0o600,
    "crl.lock": 0o600,
    "rollover.lock": 0o600,
    "root.pem": 0o644,
    "issuing.pem": 0o644,
    "crl.pem": 0o644,
    "root-crl.pem": 0o644,
    "keys": 0o700,
}


def test_a_station_has_these_files(tmp_path: Path) -> None:
    station = new_station(tmp_path / "deep" / "station")
    found = {
        str(path.relative_to(station.folder)): stat.S_IMODE(path.stat().st_mode)
        for path in station.folder.rglob("*")
    }
    keys = {f"keys/{ca.kind}-{ca.key_id[:8]}.key.pem": 0o400 for ca in station.cas}
    assert len(keys) == 2
    assert found == FILES | keys
    assert stat.S_IMODE(station.folder.stat().st_mode) == 0o700
    assert [path.name for path in station.folder.parent.iterdir()] == ["station"]
    crl = current_crl(station)
    assert crl is not None
    assert (crl.current.number, crl.cert_serials) == (1, frozenset())
    actions = [(entry["action"], entry["subject"]) for entry in audit.read(station.registry.audit_path)]
    signed = [("crl", "root-ca"), ("unlock", "issuing-ca"), ("crl", "issuing-ca")]
    assert actions == [("init", "root-ca"), ("init", "issuing-ca"), *signed]


def test_an_empty_folder_may_be_there(tmp_path: Path) -> None:
    (tmp_path / "station").mkdir()
    assert new_station(tmp_path / "station").authority.key_id


@pytest.mark.parametrize("occupied", ["station", "file", "link", "other"])
def test_what_is_there_is_never_overwritten(tmp_path: Path, occupied: str) -> None:
    folder = tmp_path / "station"
    if occupied == "station":
        new_station(folder)
    elif occupied == "file":
        folder.write_text("precious")
    elif occupied == "link":
        folder.symlink_to(tmp_path / "nowhere")
    else:
        folder.mkdir()
        (folder / "precious").touch()

    def picture() -> list[tuple[str, bytes]]:
        return sorted((str(path), path.read_bytes() if path.is_file() else b"") for path in tmp_path.rglob("*"))

    before = picture()
    with pytest.raises(ConfigurationError, match="something already"):
        new_station(folder)
    assert picture() == before


def test_the_roots_key_may_have_a_passphrase_of_its_own(tmp_path: Path) -> None:
    station = found_station(
        tmp_path / "station",
        Settings("Acme"),
        passphrase=PASSPHRASE,
        root_passphrase=b"of its own",
        derivation=CHEAP,
    )
    assert station.root_issuer(b"of its own")
    with pytest.raises(AuthorityError, match="root CA's key"):
        station.root_issuer(PASSPHRASE)


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AuthorityError, match="empty"):
        found_station(tmp_path / "station", Settings("Acme"), passphrase=b"", derivation=CHEAP)
    assert list(tmp_path.iterdir()) == []
    # No room for anything: in a process of its own, because the limit stays.
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]);"
        "from support.station import new_station; import resource;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700)); new_station(Path(sys.argv[1]))"
    )
    tests = str(__import__("pathlib").Path(__file__).parents[1])
    command = [sys.executable, "-c", script, str(tmp_path / "station"), tests]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 700


def test_what_a_crash_left_is_removed_and_a_living_attempt_is_not(tmp_path: Path) -> None:
    import fcntl
    import os

    left, alive = tmp_path / ".station.00000001.unfinished", tmp_path / ".station.00000002.unfinished"
    left.mkdir()
    (left / "half").touch()
    alive.mkdir()
    descriptor = os.open(alive, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        new_station(tmp_path / "station")
    finally:
        os.close(descriptor)
    assert sorted(path.name for path in tmp_path.iterdir()) == [alive.name, "station"]


def test_what_is_no_station_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is none") as caught:
        Station.open(tmp_path / "nowhere")
    assert "birthmark init" in caught.value.hint
    with pytest.raises(ConfigurationError, match="there is none"):
        Station.open(tmp_path)


def test_the_copies_of_the_certificates_are_mended(living: Station) -> None:
    kept = {name: (living.folder / name).read_bytes() for name in ("root.pem", "issuing.pem")}
    (living.folder / "root.pem").write_text("junk")
    (living.folder / "issuing.pem").unlink()
    station = Station.open(living.folder, passphrase=PASSPHRASE)
    assert station.authority.issuing_der == living.cas.for_clients.certificate_der
    station.publish_certificates()
    assert {name: (living.folder / name).read_bytes() for name in kept} == kept


def test_a_record_of_a_ca_that_is_missing_or_damaged(living: Station) -> None:
    ca = living.cas.for_clients
    with living.registry.transaction() as transaction:
        note = transaction.notes("ca")[ca.key_id]
        transaction.put_note("ca", ca.key_id, note | {"certificate_der": "AAAA"})
    with pytest.raises(RegistryError, match="damaged"):
        _ = living.authority
    with living.registry.transaction() as transaction:
        transaction.put_note("ca", ca.key_id, None)
    with pytest.raises(RegistryError, match="0 issuing CAs"):
        _ = living.authority


def test_a_key_that_is_another_ones(living: Station) -> None:
    root, issuing = living.cas
    living.key_path(issuing).unlink()
    living.key_path(root).rename(living.key_path(issuing))
    with pytest.raises(AuthorityError, match="do not belong together"):
        _ = living.authority
