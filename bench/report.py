"""What was measured, as figures: a table for people, JSON for machines, a picture of the ratios.

Rules:

- A figure has one value for each round and each who was measured; all were measured in the same rounds, in turn.
  A ratio is taken round by round, so that what the machine does meanwhile hits both of its sides, and given as
  the median, with the lowest and the highest.
- A goal belongs to the ratio. A figure never fails a run: whoever reads it decides.
"""

from __future__ import annotations

import json
import math
import os
import platform
import ssl
import statistics
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WIDTH, ROW, LEFT, RIGHT, TOP = 1000, 22, 430, 170, 78
TICKS: Final = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing, measured on several, in several rounds.

    Args:
        section: what it is a figure of.
        name: what was done.
        unit: of the values.
        values: by who was measured, one for each round.
        ours: whose ratio to `reference` is taken.
        reference: the other one; empty if there is none.
        at_least: the goal of the ratio, where more is better.
        at_most: the goal of the ratio, where less is better.
        note: what limits it.
    """

    section: str
    name: str
    unit: str
    values: Mapping[str, Sequence[float]]
    ours: str = "birthmark"
    reference: str = ""
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""
    errors: Sequence[str] = field(default=())

    @property
    def ratios(self) -> list[float]:
        """Ours to the reference's, round by round."""
        ours, theirs = self.values.get(self.ours, ()), self.values.get(self.reference, ())
        return [one / other for one, other in zip(ours, theirs, strict=False) if other]

    @property
    def ratio(self) -> float | None:
        """The median of the ratios."""
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def is_reached(self) -> bool | None:
        """Whether the goal is; None if there is none, or nothing to hold against it."""
        if self.ratio is None or (self.at_least is None and self.at_most is None):
            return None
        return (self.at_least is None or self.ratio >= self.at_least) and (
            self.at_most is None or self.ratio <= self.at_most
        )

    @property
    def goal(self) -> str:
        """The goal, as text."""
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "" if self.at_most is None else f"<= {self.at_most:g}"

    def record(self) -> dict[str, Any]:
        """Return this as a JSON object."""
        return {
            "section": self.section,
            "name": self.name,
            "unit": self.unit,
            "values": {who: [round(value, 4) for value in values] for who, values in self.values.items()},
            "medians": {who: round(statistics.median(values), 4) for who, values in self.values.items() if values},
            "ratio": {
                "of": self.ours,
                "to": self.reference,
                "median": round(self.ratio, 4),
                "lowest": round(min(self.ratios), 4),
                "highest": round(max(self.ratios), 4),
            }
            if self.ratio is not None
            else None,
            "goal": self.goal or None,
            "reached": self.is_reached,
            "note": self.note,
            "errors": list(self.errors),
        }


def machine() -> dict[str, Any]:
    """Return where this was measured."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in _lines("/proc/cpuinfo")
            if line.startswith(("model name", "Model"))
        ),
        platform.machine(),
    )
    memory = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "cpus": os.cpu_count(),
        "cpu": model,
        "memory_gib": round(memory / 1024**2, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
    }


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123 - /proc
            return file.read().splitlines()
    except OSError:
        return []


def line(figure: Figure) -> str:
    """Return a figure as a line of the table."""
    parts = [f"{who} {shortened(statistics.median(values))}" for who, values in figure.values.items() if values]
    shown = f"{figure.name:<46}  {figure.unit:<12}  {'  '.join(parts)}"
    if figure.ratio is not None:
        verdict = {True: "reached", False: "MISSED", None: ""}[figure.is_reached]
        shown += f"  | x{figure.ratio:.2f} ({min(figure.ratios):.2f} to {max(figure.ratios):.2f})"
        shown += f" {figure.goal} {verdict}".rstrip()
    for error in dict.fromkeys(figure.errors):
        shown += f"\n    not measured: {error}"
    return shown


def to_json(figures: Sequence[Figure], versions: Mapping[str, str]) -> str:
    """Return all of it as JSON."""
    return json.dumps(
        {"machine": machine(), "versions": dict(versions), "figures": [one.record() for one in figures]}, indent=1
    )


def to_svg(figures: Sequence[Figure], versions: Mapping[str, str]) -> str:
    """Return a picture: each figure's ratio with its spread on a logarithmic scale, and its goal as a mark."""
    shown = [figure for figure in figures if figure.ratio is not None]
    bounds = [value for figure in shown for value in (*figure.ratios, *_goals(figure))]
    low, high = min(bounds, default=0.5) / 1.2, max(bounds, default=2.0) * 1.2
    height = TOP + ROW * (len(shown) + len({figure.section for figure in shown})) + 20
    span = math.log(high / low)

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(value / low) / span

    where = machine()
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="white"/>',
        '<text x="10" y="22" font-size="15">Ratios, with their spread; the goal is the grey mark</text>',
        (
            f'<text x="10" y="40" font-size="11" fill="#555">{escape(told)}; {where["date"]}, '
            f"{where['cpus']} CPUs, Python {where['python']}, {escape(where['openssl'])}</text>"
        ),
    ]
    for tick in TICKS:
        if low <= tick <= high:
            colour = "#888" if tick == 1 else "#ddd"
            parts.append(f'<path d="M{x(tick):.1f} {TOP - 12} V{height - 15}" stroke="{colour}"/>')
            parts.append(
                f'<text x="{x(tick):.1f}" y="{TOP - 17}" font-size="10" text-anchor="middle">{tick:g}</text>'
            )
    y, section = TOP, ""
    for figure in shown:
        if figure.section != section:
            section = figure.section
            parts.append(f'<text x="10" y="{y + 12}" font-size="12" font-weight="bold">{escape(section)}</text>')
            y += ROW
        parts += _row(figure, y, x)
        y += ROW
    return "\n".join([*parts, "</svg>", ""])


def _goals(figure: Figure) -> list[float]:
    return [goal for goal in (figure.at_least, figure.at_most) if goal]


def _row(figure: Figure, y: float, x: Any) -> list[str]:
    ratio = figure.ratio or 1.0
    colour = {True: "#27722f", False: "#b3261e", None: "#224466"}[figure.is_reached]
    lowest, highest = x(min(figure.ratios)), x(max(figure.ratios))
    parts = [
        (
            f'<text x="20" y="{y + 12}" font-size="11">{escape(figure.name)} '
            f'<tspan fill="#777">({escape(figure.unit)}, to {escape(figure.reference)})</tspan></text>'
        ),
        f'<path d="M{lowest:.1f} {y + 8} H{highest:.1f}" stroke="{colour}" stroke-width="2"/>',
        f'<circle cx="{x(ratio):.1f}" cy="{y + 8}" r="4" fill="{colour}"/>',
        (
            f'<text x="{WIDTH - RIGHT + 12}" y="{y + 12}" font-size="11" fill="{colour}">{ratio:.2f}'
            f"{'  (goal ' + escape(figure.goal) + ')' if figure.goal else ''}</text>"
        ),
    ]
    parts += [
        f'<path d="M{x(goal):.1f} {y + 1} V{y + 15}" stroke="#777" stroke-width="2"/>' for goal in _goals(figure)
    ]
    return parts


def shortened(value: float) -> str:
    """Return a value with as many digits as say something."""
    if value >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
