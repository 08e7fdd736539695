"""The gateway and the Mosquitto that it exports, side by side: what is published about them was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from support import engine_cases
from support.engines import ACCEPTED, both
from support.programs import needs
from support.repository import ROOT

if TYPE_CHECKING:
    from pathlib import Path

WEAKER = {
    "right in all but the profile": "profile",
    "its presence, for those who listen": "revocation",
    "the live connection itself": "revocation",
}
"""What an exported Mosquitto lets pass, and the refusal that had to be accepted for it."""


@needs("mosquitto")
def test_the_page_says_what_was_measured(tmp_path: Path) -> None:
    with both(tmp_path) as engines:
        rows = engine_cases.measure(*engines)
    assert [title for _, title, gateway, _ in rows if not gateway.held] == []
    weaker = [title for _, title, _, mosquitto in rows if not mosquitto.held]
    assert sorted(weaker) == sorted(WEAKER)
    assert {WEAKER[title] for title in weaker} <= set(ACCEPTED)
    page = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    measured = engine_cases.table(rows).splitlines()
    published = page.split(engine_cases.BEGIN)[1].split(engine_cases.END)[0].strip().splitlines()
    assert published == measured, "python -m support.engines, in tests/, writes the page"
