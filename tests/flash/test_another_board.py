"""`birthmark flash` as a real process against a board that shares no code with birthmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from support.patience import PATIENCE_S
from support.spec_board import SpecBoard
from support.station import PASSPHRASE, new_station

if TYPE_CHECKING:
    from pathlib import Path


def birthmark(station: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "BIRTHMARK_PASSPHRASE": PASSPHRASE.decode(), "BIRTHMARK_STATION": str(station)}
    command = [sys.executable, "-m", "birthmark.provisioning", *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


@pytest.fixture(scope="module")
def station(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("another-board") / "station"
    new_station(folder).close()  # cheap to unlock, for a dozen commands
    return folder


@pytest.mark.parametrize("keys", ["on-device", "station"])
def test_enrols_a_board_of_somebody_else(station: Path, keys: str) -> None:
    with SpecBoard() as board:
        done = birthmark(station, "flash", "--port", board.port, "--id", f"other-{keys}", "--keys", keys, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        leaf = board.leaf
        assert board.key is not None
        assert leaf.public_key() == board.key.public_key()
        assert [a.value for a in leaf.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)] == [
            f"other-{keys}"
        ]
        assert board.state == 2
        # A second attempt changes nothing and says why.
        log = len(board.log)
        again = birthmark(station, "flash", "--port", board.port, "--id", f"other-{keys}")
        assert again.returncode == 3
        assert "DUPLICATE" in again.stderr
        assert set(board.log[log:]) == {1}, "nothing but HELLO may be sent to a board that is refused"
        scalar = board.key.private_numbers().private_value.to_bytes(32)
        spoken = (done.stdout + done.stderr).encode()
    known = birthmark(station, "show", f"other-{keys}", "--json")
    assert json.loads(known.stdout)["state"] == "ATTESTED"
    kept = b"".join(path.read_bytes() for path in station.rglob("*") if path.is_file())
    pem = board.key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for form in (scalar, scalar.hex().encode(), pem):
        assert form not in kept
        assert form not in spoken


def test_refuses_a_key_mode_that_the_board_does_not_offer(station: Path) -> None:
    with SpecBoard(modes=1) as board:
        done = birthmark(station, "flash", "--port", board.port, "--id", "no-rng", "--keys", "station")
        assert done.returncode != 0
        assert board.log == [1]
    shown = birthmark(station, "show", "no-rng")
    assert shown.returncode != 0, "nothing may be reserved for it"
