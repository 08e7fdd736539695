"""A device's private key is in one place: it is searched for in everything that a station leaves and says."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from support.fault_bench import SimBoard
from support.patience import PATIENCE_S

from birthmark.device.agent import keys
from birthmark.device.agent.slots import ACTIVE, Slots
from birthmark.provisioning.encrypted_key import KeyDerivation
from birthmark.provisioning.founding import found_station
from birthmark.provisioning.registry.model import KeyMode
from birthmark.provisioning.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PASSPHRASE = "correct horse"
CHEAP = KeyDerivation(cost=2, block_size=8, parallelism=1)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Everything that a station's process may write to."""
    home = tmp_path / "home"
    for folder in (home, home / "tmp", home / "run"):
        folder.mkdir(mode=0o700)
    settings = Settings(organization="Acme")
    found_station(home / "station", settings, passphrase=PASSPHRASE.encode(), derivation=CHEAP).close()
    return home


def flash(home: Path, port: str, mode: KeyMode) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-X", "dev", "-m", "birthmark.provisioning", "flash", "--port", port]
    places = {"HOME": home, "TMPDIR": home / "tmp", "XDG_RUNTIME_DIR": home / "run"}
    environment = {
        **os.environ,
        **{name: str(path) for name, path in places.items()},
        "BIRTHMARK_STATION": str(home / "station"),
        "BIRTHMARK_PASSPHRASE": PASSPHRASE,
    }
    return subprocess.Popen(
        [*command, "--id", "unit-1", "--keys", mode.value, "--json"],
        env=environment,
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def forms(scalar: bytes) -> Iterator[bytes]:
    """How a key might be written down."""
    number = int.from_bytes(scalar, "big")
    yield from (scalar, scalar[::-1], scalar.hex().encode(), scalar.hex().upper().encode())
    yield from (str(number).encode(), f"{number:x}".encode(), repr(scalar).encode()[2:-1])
    yield base64.b85encode(scalar)
    for shift in range(3):  # wherever it begins in a longer text, its middle is written the same
        whole = base64.b64encode(bytes(shift) + scalar)
        middle = whole[4 if shift else 0 : -4]
        yield from (middle, middle.translate(bytes.maketrans(b"+/", b"-_")))


def check_nowhere(home: Path, scalar: bytes, said: bytes) -> None:
    texts = {str(path): path.read_bytes() for path in home.rglob("*") if path.is_file()}
    assert len(texts) > 5, "that is no station"
    for name, text in {**texts, "what it said": said}.items():
        # A PEM body is searched as a whole: its lines end anywhere.
        for searched in (text, text.replace(b"\n", b"")):
            for form in forms(scalar):
                assert form not in searched, name


def test_the_search_finds_what_is_there() -> None:
    key = keys.make_key()
    scalar = keys.scalar_of_key(key)
    pem = base64.b64encode(keys.key_to_der(key))
    for text in (b"x" + scalar, pem, scalar.hex().encode(), str(int.from_bytes(scalar, "big")).encode()):
        assert any(form in text for form in forms(scalar))


@pytest.mark.parametrize("mode", list(KeyMode))
def test_after_an_enrollment(home: Path, tmp_path: Path, mode: KeyMode) -> None:
    with SimBoard(tmp_path / "board") as board, flash(home, board.port, mode) as process:
        out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    active = Slots(tmp_path / "board").active()
    assert active is not None
    scalar = keys.scalar_of_key(keys.key_from_der(active.key_der))
    check_nowhere(home, scalar, out + err)
    holding = [
        path
        for path in (tmp_path / "board").iterdir()
        if any(form in path.read_bytes().replace(b"\n", b"") for form in forms(scalar))
    ]
    assert [path.name for path in holding] == [ACTIVE]
    assert holding[0].stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("fault", ["hostile=prove-junk", "hostile=silent@begin"])
def test_after_a_failure(home: Path, tmp_path: Path, fault: str) -> None:
    """A refused proof, and Ctrl-C while the device is silent: the station made the key, and must have lost it."""
    with SimBoard(tmp_path / "board", fault) as board, flash(home, board.port, KeyMode.STATION) as process:
        if fault.endswith("begin"):
            assert process.stdout is not None
            said = b"".join(iter(lambda: _until_issued(process), b""))
            process.send_signal(signal.SIGINT)
        else:
            said = b""
        out, err = process.communicate(timeout=PATIENCE_S)
        pending = Slots(tmp_path / "board").pending()
    assert process.returncode in (3, 130), err
    assert pending is not None
    check_nowhere(home, keys.scalar_of_key(keys.key_from_der(pending.key_der)), said + out + err)


def _until_issued(process: subprocess.Popen[bytes]) -> bytes:
    """The next line, but nothing once the certificate is signed."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "it ended too soon"
    return b"" if b"ISSUED" in line else line
