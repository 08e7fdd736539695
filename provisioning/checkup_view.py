"""How `birthmark doctor` shows what it found: one page for people, one object a line for machines.

On a terminal, weeks have bars, and a sentence goes on below its own beginning where a line ends. A hint stays in
one piece, since it is copied; and so does everything where the page goes into a file or a pipe.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from birthmark.provisioning.checkup import Level, counted
from birthmark.provisioning.registry.model import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from birthmark.device.console import Console
    from birthmark.provisioning.checkup import Facts, Remark

WEEKS_SHOWN: Final = 13
BAR_COLUMNS: Final = 40
_INDENT: Final = " " * 8
"""As wide as the word before a remark."""
_LEAST_COLUMNS: Final = 20
_WORDS: Final = {Level.NOTE: "note", Level.SOON: "SOON", Level.BROKEN: "BROKEN"}
_COLOURS: Final = {Level.NOTE: "dim", Level.SOON: "yellow", Level.BROKEN: "red"}
_EXIT_CODES: Final = {Level.WELL: 0, Level.NOTE: 0, Level.SOON: 1, Level.BROKEN: 6}


def exit_code(remarks: Sequence[Remark]) -> int:
    """Return 0 where all is well, 1 if a person is needed soon, 6 if something is broken."""
    return _EXIT_CODES[max((remark.level for remark in remarks), default=Level.WELL)]


def show(console: Console, facts: Facts, remarks: Sequence[Remark]) -> None:
    """Print everything."""
    if console.as_json:
        for record in records(facts, remarks):
            console.emit(record, "")
        return
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    census = facts.census
    in_use = ", ".join(f"{counted(census.in_use[kind], kind.value)}" for kind in Kind)
    console.say(f"in use: {in_use}\n")
    if census.in_use[Kind.DEVICE]:
        console.say("devices by the week in which their certificate ends")
        for line in chart(facts, with_bars=columns is not None):
            console.say(line)
        console.say("")
    for remark in remarks:
        if remark.level is not Level.WELL:
            _show_remark(console, remark, columns)
    well = [remark.check for remark in remarks if remark.level is Level.WELL]
    if well:
        console.say(console.paint(f"well    {hanging(', '.join(well), columns)}", "green"))
    if not facts.looked_at_gateways:
        console.say("the gateways were not looked at (--offline)")


def hanging(text: str, columns: int | None) -> str:
    """Return a text that stands behind a word, in lines of so many columns; in one without a number."""
    if columns is None:
        return text
    width = max(columns - len(_INDENT), _LEAST_COLUMNS)
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return f"\n{_INDENT}".join(lines)


def _show_remark(console: Console, remark: Remark, columns: int | None) -> None:
    word = console.paint(f"{_WORDS[remark.level]:<6}", _COLOURS[remark.level])
    console.say(f"{word}  {hanging(f'{remark.check}: {remark.text}', columns)}")
    named = ", ".join(name for name in remark.about if name not in remark.text)
    if named:
        console.say(f"{_INDENT}{hanging(named, columns)}")
    if remark.hint:
        console.say(f"{_INDENT}{console.paint('hint:', 'bold')} {remark.hint}")


def records(facts: Facts, remarks: Sequence[Remark]) -> Iterator[dict[str, Any]]:
    """Return what `--json` prints: each check's remarks, then the figures, then the verdict."""
    for remark in remarks:
        yield {
            "check": remark.check,
            "level": remark.level.name,
            "text": remark.text,
            "hint": remark.hint or None,
            "about": list(remark.about),
        }
    census = facts.census
    yield {
        "figures": {
            "rows": census.rows,
            "devices": census.in_use[Kind.DEVICE],
            "services": census.in_use[Kind.SERVICE],
            "brokers": census.in_use[Kind.BROKER],
            "devices_ending_by_week": {str(week): census.weeks[week] for week in sorted(census.weeks)},
            "gateways_looked_at": sum(facts.looked_at_gateways and not look.cause for look in facts.gateways),
        }
    }
    worst = max((remark.level for remark in remarks), default=Level.WELL)
    yield {"verdict": worst.name, "exit_code": exit_code(remarks)}


def chart(facts: Facts, *, with_bars: bool) -> Iterator[str]:
    """Return the lines of the chart: what has ended, thirteen weeks, and all that is later."""
    weeks = facts.census.weeks
    later = sum(count for week, count in weeks.items() if week >= WEEKS_SHOWN)
    rows = [("ended", weeks[-1])] if weeks[-1] else []
    rows += [(f"{facts.now + timedelta(weeks=week):%Y-%m-%d}", weeks[week]) for week in range(WEEKS_SHOWN)]
    rows.append(("later", later))
    highest = max(count for _, count in rows)
    for label, count in rows:
        columns = -(-count * BAR_COLUMNS // highest) if highest else 0
        bar = "  " + "█" * columns if with_bars and columns else ""
        yield f"  {label:<10}  {count:>7}{bar}"
