"""Lines over the size of a fleet, both axes logarithmic, as SVG: no library, and nothing to load."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

WIDTH, PANEL, LEFT, RIGHT, TOP, GAP = 1000, 300, 80, 350, 60, 80
COLOURS: Final = ("#b3261e", "#224466", "#27722f", "#8a6d00")
UNITS: Final = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB"), (1.0, "B"))


@dataclass(frozen=True, slots=True)
class Line:
    """One quantity over the fleet's size."""

    name: str
    values: Sequence[float]


@dataclass(frozen=True, slots=True)
class Panel:
    """Lines that share their axes."""

    title: str
    lines: Sequence[Line]


def page(title: str, devices: Sequence[int], panels: Sequence[Panel]) -> str:
    """Return the picture; each line has a value for each of `devices`."""
    height = TOP + len(panels) * (PANEL + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="24" font-size="13">{escape(title)}</text>',
    ]
    for number, panel in enumerate(panels):
        parts += _panel(panel, devices, TOP + number * (PANEL + GAP))
    return "\n".join([*parts, "</svg>", ""])


def amount(octets: float) -> str:
    """Return a number of bytes as people say it."""
    for size, unit in UNITS:
        if octets >= size:
            return f"{octets / size:.3g} {unit}"
    return "0"


def _panel(panel: Panel, devices: Sequence[int], top: float) -> Iterator[str]:
    values = [value for line in panel.lines for value in line.values]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    first, last = math.log10(devices[0]), math.log10(devices[-1])
    width, bottom = WIDTH - LEFT - RIGHT, top + PANEL

    def x(count: float) -> float:
        return LEFT + width * (math.log10(count) - first) / (last - first)

    def y(value: float) -> float:
        return bottom - (PANEL - 20) * (math.log10(value) - low) / (high - low)

    yield f'<text x="{LEFT}" y="{top + 6}" font-size="13" font-weight="bold">{escape(panel.title)}</text>'
    for power in range(low, high + 1):
        at = y(10.0**power)
        yield f'<path d="M{LEFT} {at:.1f} H{LEFT + width}" stroke="#ddd"/>'
        yield _text(LEFT - 6, at + 4, amount(10.0**power), "end")
    for count in devices:
        if math.log10(count) % 1 == 0:
            yield f'<path d="M{x(count):.1f} {top + 20} V{bottom}" stroke="#ddd"/>'
            yield _text(x(count), bottom + 16, f"{count:,}", "middle")
    yield _text(LEFT + width / 2, bottom + 34, "devices", "middle")
    for number, line in enumerate(panel.lines):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(
            f"{x(count):.1f},{y(value):.1f}" for count, value in zip(devices, line.values, strict=True)
        )
        yield f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
        at = top + 40 + 18 * number
        yield f'<path d="M{LEFT + width + 14} {at - 4} h20" stroke="{colour}" stroke-width="3"/>'
        yield _text(LEFT + width + 40, at, line.name, "start")


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="11" text-anchor="{anchor}">{escape(text)}</text>'
