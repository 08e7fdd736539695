"""`python -m bench.tables FILE`: the tables of `docs/performance.md` from the JSON of a run (`make bench`).

One table a section, in Markdown on stdout: the medians by who was measured, the ratio with its spread, the goal.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.report import shortened

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


def main() -> int:
    """Print the tables; exit 1 where the file is no run's."""
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description="a run's tables, in Markdown")
    parser.add_argument("file", type=Path, help="what `python -m bench --json` wrote")
    path: Path = parser.parse_args().file
    try:
        found = "\n".join(tables(json.loads(path.read_text())))
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"error: could not read a run from {path}: {type(error).__name__}: {error}", file=sys.stderr)
        print("hint: write one with `python -m bench --json FILE`", file=sys.stderr)
        return 1
    print(found)
    return 0


def tables(run: Mapping[str, Any]) -> Iterator[str]:
    """Return the lines for a run.

    Raises:
        KeyError, TypeError: it is none.
    """
    where, versions = run["machine"], run["versions"]
    yield (
        f"{where['date']}, {where['cpus']} x {where['cpu']}, {where['memory_gib']} GiB, Python {where['python']}, "
        f"{where['openssl']}; {', '.join(f'{name} {version}' for name, version in versions.items())}."
    )
    for section, found in groupby(run["figures"], key=lambda figure: figure["section"]):
        yield from _table(section, list(found))


def _table(section: str, figures: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    names = list(dict.fromkeys(name for figure in figures for name in figure["medians"]))
    yield f"\n## {section}\n"
    yield "| " + " | ".join(["", "unit", *names, "ratio", "goal"]) + " |"
    yield "|" + "---|" * (len(names) + 4)
    for figure in figures:
        medians = [_median(figure["medians"].get(name)) for name in names]
        cells = [figure["name"], figure["unit"], *medians, _ratio(figure["ratio"]), _goal(figure)]
        yield "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
    for error in dict.fromkeys(error for figure in figures for error in figure["errors"]):
        yield f"\nNot measured: {error}"


def _median(value: float | None) -> str:
    return "" if value is None else shortened(value)


def _ratio(ratio: Mapping[str, Any] | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f}) of {ratio['to']}"


def _goal(figure: Mapping[str, Any]) -> str:
    goal = (figure["goal"] or "").replace(">=", "≥").replace("<=", "≤")
    return f"{goal}, **missed**" if figure["reached"] is False else goal


if __name__ == "__main__":
    sys.exit(main())
