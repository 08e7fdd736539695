"""`birthmark label`: a code that says the id, for what is made and for nothing else."""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest
import segno
from support.station import enrolled_row, keyed_row

from birthmark.provisioning.line.label import Format, label
from birthmark.provisioning.registry.model import Kind, State

if TYPE_CHECKING:
    from pathlib import Path

    from support.station import Command

    from birthmark.provisioning.station import Station

SVG = "{http://www.w3.org/2000/svg}"


def modules_of(svg: bytes) -> set[tuple[int, int]]:
    """The dark modules that an SVG label draws."""
    path = ET.fromstring(svg).find(f"{SVG}path")  # noqa: S314 - our own file
    assert path is not None
    drawn = path.get("d") or ""
    assert re.fullmatch(r"(M\d+ \d+h1v1h-1z)+", drawn)
    return {(int(x), int(y)) for x, y in re.findall(r"M(\d+) (\d+)", drawn)}


def test_a_made_device_gets_a_label(birthmark: Command, station: Station, tmp_path: Path) -> None:
    enrolled_row(station, "sensor-17")
    done = birthmark("label", "SENSOR-17", "--out", tmp_path / "labels", "--json")
    assert done.exit_code == 0, done.stderr
    path = tmp_path / "labels" / "sensor-17.svg"
    assert done.records == [{"id": "sensor-17", "label": str(path)}]
    svg = path.read_bytes()
    expected = segno.make("sensor-17", error="m", micro=False).matrix
    assert modules_of(svg) == {(x, y) for y, row in enumerate(expected) for x, dark in enumerate(row) if dark}
    texts = [element.text for element in ET.fromstring(svg).iter(f"{SVG}text")]  # noqa: S314
    assert texts == ["sensor-17", "sensor"]
    assert birthmark("label", "sensor-17", "--out", tmp_path / "labels", "--format", "png").exit_code == 0
    png = (tmp_path / "labels" / "sensor-17.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", png[16:24]) == ((len(expected) + 8) * 8,) * 2


def test_what_goes_on_it_beside_the_id_is_text_and_nothing_more(station: Station) -> None:
    with station.registry.transaction() as transaction:
        row = transaction.insert(
            kind=Kind.DEVICE,
            name="x-1",
            role="sensor",
            hwid=bytes(8),
            txn=bytes(16),
            label="lot: <b>&7\nnote: " + "y" * 200,
        )
    svg = label(row, Format.SVG)
    texts = list(ET.fromstring(svg).iter(f"{SVG}text"))  # noqa: S314
    assert [text.text for text in texts] == ["x-1", "sensor", "lot: <b>&7", "note: " + "y" * 200]
    for text in texts:
        assert float(text.get("font-size") or 0) * 0.6 * len(text.text or "") <= 26.5, "it fits"


@pytest.mark.parametrize("state", [State.ISSUED, State.PREPARED, State.COMMITTED])
def test_what_is_not_made_gets_none(birthmark: Command, station: Station, tmp_path: Path, state: State) -> None:
    enrolled_row(station, "made")
    enrolled_row(station, "begun", state=state)
    done = birthmark("label", "made", "begun", "--out", tmp_path / "labels")
    assert done.exit_code == 3
    assert f"it is {state}, not ATTESTED" in done.stderr
    assert not (tmp_path / "labels").exists(), "all of them, or none"


def test_neither_does_what_is_revoked_void_or_unknown(
    birthmark: Command, station: Station, tmp_path: Path
) -> None:
    enrolled_row(station, "lost-1")
    keyed_row(station, "void-1")
    for name in ("lost-1", "void-1"):
        assert birthmark("revoke", name, "--reason", "lost").exit_code == 0
    lost = birthmark("label", "lost-1", "--out", tmp_path / "labels")
    assert (lost.exit_code, "its certificate is revoked (keyCompromise)" in lost.stderr) == (3, True)
    void = birthmark("label", "void-1", "--out", tmp_path / "labels")
    assert (void.exit_code, "it is VOID" in void.stderr) == (3, True)
    none = birthmark("label", "nobody", "--out", tmp_path / "labels")
    assert (none.exit_code, "there is no such device" in none.stderr) == (6, True)
