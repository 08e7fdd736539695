"""The wheel holds what is tracked: an unlisted subpackage works when editable, and is missing from the wheel."""

from __future__ import annotations

import configparser
import re
import zipfile
from email.parser import HeaderParser
from typing import TYPE_CHECKING

from support.installs import build_wheel, copy_of_tracked_files
from support.repository import PARTS, ROOT, tracked

if TYPE_CHECKING:
    from pathlib import Path


def test_the_wheel_holds_the_tracked_files_of_the_four_parts(tmp_path: Path) -> None:
    source = copy_of_tracked_files(tmp_path / "source")
    wheel = build_wheel(source, tmp_path / "dist")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        information = next(name.split("/")[0] for name in names if ".dist-info/" in name)
        metadata = HeaderParser().parsestr(archive.read(f"{information}/METADATA").decode())
        entry_points = configparser.ConfigParser()
        entry_points.read_string(archive.read(f"{information}/entry_points.txt").decode())

    assert {name for name in names if not name.startswith(f"{information}/")} == {
        f"birthmark/{path}" for path in tracked() if path.split("/")[0] in PARTS
    }
    assert dict(entry_points["console_scripts"]) == {
        "birthmark": "birthmark.provisioning.__main__:main",
        "birthmark-broker": "birthmark.broker.__main__:main",
        "birthmark-device": "birthmark.device.__main__:main",
        "birthmark-sim": "birthmark.firmware_sim.__main__:main",
    }
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra") or []) >= {"device", "broker", "station", "sim", "dev"}
    assert f"{information}/licenses/LICENSE" in names
    bare = [line for line in metadata.get_all("Requires-Dist") or [] if "extra ==" not in line]
    assert bare == [], "without an extra nothing else is installed"


def test_amqtt_is_pinned_wherever_it_is_named() -> None:
    # The broker overrides what amqtt offers no seam for, so another version is another broker.
    for name in ("pyproject.toml", "constraints.txt"):
        pins = re.findall(r"amqtt(?=[=<>~!])([^\s\"',\]]*)", (ROOT / name).read_text(encoding="utf-8"))
        assert pins == ["==0.12.1"]
