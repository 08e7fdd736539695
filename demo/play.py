"""What the demo's steps share: the stage, the names, and the ways of observing."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo.processes import StepFailedError

if TYPE_CHECKING:
    from demo.processes import Child, Heard, Stage

    Record = dict[str, Any]

HOST = "127.0.0.1"
GATEWAY = "gateway-1"
OPERATOR = "demo-operator"
BYSTANDERS = ("sensor-1", "sensor-2")
CULPRIT = "sensor-3"
PROBER = Path(__file__).with_name("prober.py")


@dataclass(slots=True)
class Play:
    """What goes on from one step to the next."""

    stage: Stage
    port: int = 0
    ports: dict[str, str] = field(default_factory=dict)
    """By device, the pty that it is on."""
    running: dict[str, Child] = field(default_factory=dict)

    @property
    def broker(self) -> str:
        """Where the broker listens."""
        return f"{HOST}:{self.port}"

    def operator_sees(self, topic: str, text: str, *, timeout_s: float, since_s: float = 0.0) -> Heard:
        """Wait until the operator gets a message on a topic (or below it) with a text in it."""

        def wanted(record: Record) -> bool:
            return _is_below(record.get("topic"), topic) and text in str(record.get("payload", ""))

        watch = self.running["watch"]
        return watch.wait_for(f"a message on {topic}", wanted, timeout_s=timeout_s, since_s=since_s)

    def messages(self, topic: str, *, since_s: float) -> list[Heard]:
        """Return what the operator has got on a topic or below it after `since_s`."""
        heard = self.running["watch"].heard()
        return [one for one in heard if one.at_s > since_s and _is_below(one.record.get("topic"), topic)]

    def hears(self, name: str, *, timeout_s: float, since_s: float = 0.0, **facts: object) -> Heard:
        """Wait until a process says a record with these facts in it."""

        def wanted(record: Record) -> bool:
            return all(record.get(key) == value for key, value in facts.items())

        what = " ".join(str(value) for value in facts.values())
        return self.running[name].wait_for(what, wanted, timeout_s=timeout_s, since_s=since_s)


def expect(holds: object, what: str) -> None:
    """Raise unless `what` was observed."""
    if not holds:
        raise StepFailedError(f"not observed: {what}")


def ask(prober: Child, request: str) -> Record:
    """Have a prober do something, and return its answer."""
    since_s = time.monotonic()
    word = request.split(maxsplit=1)[0]
    prober.tell(request)
    return prober.wait_for(request, lambda r: r.get("did") == word, timeout_s=15, since_s=since_s).record


def milliseconds(seconds: float) -> float:
    """Return seconds as milliseconds, to a tenth."""
    return round(seconds * 1000, 1)


def _is_below(topic: object, above: str) -> bool:
    return isinstance(topic, str) and f"{topic}/".startswith(f"{above}/")
