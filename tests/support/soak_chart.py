"""Curves over time on one SVG page: no library, nothing to load, readable in any browser."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH, PANEL, LEFT, TOP, GAP = 960, 120, 70, 50, 45


@dataclass(frozen=True)
class Curve:
    """One quantity: as many values as moments, in seconds."""

    title: str
    at_s: Sequence[float]
    values: Sequence[float]


def page(title: str, curves: Sequence[Curve], marks_s: Sequence[float]) -> str:
    """Return the page; `marks_s` are drawn through every curve."""
    last_s = max((at for curve in curves for at in curve.at_s), default=1.0) or 1.0
    height = TOP + len(curves) * (PANEL + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="24" font-size="13">{escape(title)}</text>',
    ]
    for number, curve in enumerate(curves):
        parts += _panel(curve, TOP + number * (PANEL + GAP), last_s, marks_s)
    return "\n".join([*parts, "</svg>", ""])


def _panel(curve: Curve, top: float, last_s: float, marks_s: Sequence[float]) -> list[str]:
    highest = max(curve.values, default=1.0) or 1.0
    width, bottom = WIDTH - LEFT - 20, top + PANEL

    def x(at_s: float) -> float:
        return LEFT + width * at_s / last_s

    points = " ".join(
        f"{x(at_s):.1f},{bottom - (PANEL - 20) * value / highest:.1f}"
        for at_s, value in zip(curve.at_s, curve.values, strict=True)
    )
    stroke = f'V{bottom}" stroke="#c33" stroke-dasharray="3"/>'
    marks = [f'<path d="M{x(at_s):.1f} {top + 16} {stroke}' for at_s in marks_s]
    return [
        f'<text x="{LEFT}" y="{top + 10}" font-size="12">{escape(curve.title)}</text>',
        f'<text x="{LEFT - 6}" y="{top + 24}" font-size="11" text-anchor="end">{highest:.4g}</text>',
        f'<text x="{LEFT - 6}" y="{bottom}" font-size="11" text-anchor="end">0</text>',
        f'<line x1="{LEFT}" y1="{bottom}" x2="{LEFT + width}" y2="{bottom}" stroke="#999"/>',
        *marks,
        f'<polyline points="{points}" fill="none" stroke="#246" stroke-width="1.2"/>',
        f'<text x="{LEFT + width}" y="{bottom + 14}" font-size="11" text-anchor="end">{last_s:.0f} s</text>',
    ]
