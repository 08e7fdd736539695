"""What a Raspberry Pi installs, in a virtual environment that has never seen this repository."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from support.installs import bare_environment, copy_of_tracked_files, run

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.timeout(400)
def test_a_device_installs_none_of_the_other_parts_libraries(tmp_path: Path) -> None:
    source = copy_of_tracked_files(tmp_path / "source")
    binaries = bare_environment(tmp_path / "environment", ".[device]", source)

    listing = run(binaries / "python", "-m", "pip", "list", "--format", "json", cwd=tmp_path)
    installed = {package["name"].lower() for package in json.loads(listing.stdout)}
    assert {"birthmark", "paho-mqtt", "cryptography", "pyserial"} <= installed
    assert installed.isdisjoint(
        {"amqtt", "cbor2", "tinydb", "typer", "orjson", "segno", "sqlalchemy", "pyyaml", "websockets"}
    )

    shown = run(binaries / "birthmark-device", "--help", cwd=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "usage: birthmark-device" in shown.stdout
    assert "examples:" in shown.stdout

    # The agent, too, runs on these libraries alone.
    assert run(binaries / "birthmark-device", "agent", "--help", cwd=tmp_path).returncode == 0
    library = "from birthmark.device import Client, Credentials, DeviceId; print(DeviceId('pi-1'))"
    imported = run(binaries / "python", "-W", "error", "-c", library, cwd=tmp_path)
    assert (imported.returncode, imported.stdout, imported.stderr) == (0, "pi-1\n", "")

    for command, extra in {"birthmark": "station", "birthmark-broker": "broker"}.items():
        answer = run(binaries / command, "--help", cwd=tmp_path)
        assert answer.returncode == 1
        assert answer.stdout == ""
        assert answer.stderr.startswith("error: could not start: the library ")
        assert f"hint: pip install 'birthmark[{extra}]'" in answer.stderr
