"""What a Raspberry Pi installs, in a virtual environment that has never seen this repository."""

from __future__ import annotations

import json
import os
import re
import sys
import tomllib
from typing import TYPE_CHECKING

import pytest
from support.installs import NO_INDEX, bare_environment, copy_of_tracked_files, run
from support.repository import ROOT

if TYPE_CHECKING:
    from pathlib import Path

MAX_BYTES = 25 * 1024 * 1024
"""Of the part and all that it needs, with the compiled files."""
NOT_OURS = {"pip", "setuptools"}
SIZES = """
import importlib.metadata, json
def size(one):
    return sum(path.stat().st_size for file in one.files or () if (path := one.locate_file(file)).exists())
found = {one.metadata["Name"].lower(): size(one) for one in importlib.metadata.distributions()}
print(json.dumps({name: size for name, size in found.items() if name not in ("pip", "setuptools")}))
"""
ARM = [word for tag in ("manylinux2014_aarch64", "manylinux_2_28_aarch64") for word in ("--platform", tag)]


@pytest.mark.timeout(1200)
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

    sized = run(binaries / "python", "-c", SIZES, cwd=tmp_path)
    sizes: dict[str, int] = json.loads(sized.stdout)
    assert set(sizes) == installed - NOT_OURS
    assert sum(sizes.values()) <= MAX_BYTES, sizes

    for command, extra in {"birthmark": "station", "birthmark-broker": "broker"}.items():
        answer = run(binaries / command, "--help", cwd=tmp_path)
        assert answer.returncode == 1
        assert answer.stdout == ""
        assert answer.stderr.startswith("error: could not start: the library ")
        assert f"hint: pip install 'birthmark[{extra}]'" in answer.stderr


@pytest.mark.proof
@pytest.mark.parametrize("version", ["3.11", "3.13"])
def test_every_library_of_a_device_has_a_wheel_for_a_64_bit_arm(tmp_path: Path, version: str) -> None:
    """A Pi has no compiler, and no hour to spare for one: Raspberry Pi OS has 3.11 (Bookworm) or 3.13 (Trixie)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    report = tmp_path / "report.json"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--dry-run", "--ignore-installed"]
    what = ["--only-binary=:all:", "--python-version", version, *ARM, "--target", tmp_path, "--report", report]
    answer = run(*pip, *what, *project["optional-dependencies"]["device"], cwd=tmp_path)
    if answer.returncode != 0 and "CI" not in os.environ and any(sign in answer.stderr for sign in NO_INDEX):
        pytest.skip("no package index can be reached from here")
    assert answer.returncode == 0, answer.stderr
    found = {
        one["metadata"]["name"]: one["download_info"]["url"] for one in json.loads(report.read_text())["install"]
    }
    assert {"cryptography", "cffi", "paho-mqtt", "pyserial"} <= set(found)
    for name, url in found.items():
        assert re.search(r"-(none-any|[a-z0-9_.]*aarch64[a-z0-9_.]*)\.whl$", url), (name, url.rpartition("/")[2])
