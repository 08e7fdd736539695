"""How the demo speaks: a line or two a step for a person, one JSON object a step for a machine."""

from __future__ import annotations

import json
import sys
import textwrap
from dataclasses import dataclass, field
from typing import Any

_WIDTH = 96


@dataclass(frozen=True, slots=True)
class Observed:
    """What a step saw happen.

    Args:
        text: one or two lines for a person, with what was measured.
        facts: the same for a machine; plain JSON values.
    """

    text: str
    facts: dict[str, Any] = field(default_factory=dict)


class Narrator:
    """Tells each step's outcome on stdout.

    Args:
        as_json: JSON lines instead of text.
    """

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._number = 0

    def begin(self, folder: str) -> None:
        """Say what is about to happen."""
        self._record({"event": "begin"})
        self._say(f"birthmark, all of it, as separate processes on this machine (in {folder})\n")

    def step(self, name: str, title: str, observed: Observed, elapsed_s: float) -> None:
        """Tell a step that was observed to happen."""
        self._number += 1
        self._record(
            {
                "event": "step",
                "number": self._number,
                "step": name,
                "observed": True,
                "elapsed_ms": round(elapsed_s * 1000, 1),
                "text": observed.text,
                **observed.facts,
            }
        )
        self._say(f"{self._number:>2}  {title:<80}{elapsed_s * 1000:>8.0f} ms")
        for line in textwrap.wrap(observed.text, _WIDTH - 4):
            self._say(f"    {line}")

    def failed(self, name: str, title: str, cause: str, logs: str) -> None:
        """Tell the step that was not observed to happen; nothing follows it."""
        self._record({"event": "failed", "step": name, "observed": False, "cause": cause, "logs": logs})
        self._say(f"{self._number + 1:>2}  {title}: NOT OBSERVED")
        self._say(f"    {cause}")
        self._say(f"    the logs of every process stay in {logs}")

    def interrupted(self) -> None:
        """Tell that the demo was told to stop."""
        self._record({"event": "interrupted"})
        self._say("\nstopped; nothing is left running")

    def end(self, elapsed_s: float) -> None:
        """Tell that every step was observed."""
        self._record({"event": "end", "steps": self._number, "elapsed_s": round(elapsed_s, 2)})
        self._say(f"\nall {self._number} steps observed in {elapsed_s:.1f} s; nothing is left running")

    def _record(self, record: dict[str, Any]) -> None:
        if self._as_json:
            print(json.dumps(record, separators=(",", ":")), flush=True)

    def _say(self, text: str) -> None:
        if not self._as_json:
            print(text, file=sys.stdout, flush=True)
