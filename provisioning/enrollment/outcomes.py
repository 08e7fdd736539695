"""How an attempt at a unit ended, in words that a table, a statistic and the audit log have in common."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from birthmark.device.errors import AuthorityError, LinkError, PortError, RegistryError
from birthmark.device.link.messages import ErrorCode, MessageType
from birthmark.provisioning.enrollment.enrol import ProofError, Step, UnitRefusedError
from birthmark.provisioning.enrollment.exchange import DeviceRefusalError, MalformedAnswerError, NoAnswerError
from birthmark.provisioning.enrollment.session import StoppedError
from birthmark.provisioning.registry.interface import DuplicateError

if TYPE_CHECKING:
    from birthmark.device.errors import BirthmarkError

PORT: Final = "port"
"""The step before the first one: the port itself."""


class Outcome(StrEnum):
    """How an attempt ended."""

    PASS = "PASS"  # noqa: S105 - a word on a screen
    FAIL = "FAIL"
    STOPPED = "STOPPED"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at one unit on one port, from HELLO to its end."""

    outcome: Outcome
    device_id: str
    """Empty if none was chosen yet."""
    hwid: bytes
    """Empty if the unit never said who it is."""
    step: str = ""
    """For a failure: the step that it failed at, a `Step` or PORT."""
    code: str = ""
    """For a failure: one word for its cause (`code_of`)."""
    elapsed_ms: float = 0.0


def code_of(error: BirthmarkError) -> str:
    """Return one word for the cause of a failure."""
    match error:
        case UnitRefusedError(action=action):
            return action.name
        case NoAnswerError(verdict=verdict):
            return verdict.value
        case DeviceRefusalError(code=code):
            return ErrorCode(code).name if code in set(ErrorCode) else f"ERR-{code}"
        case DuplicateError(field=field):
            return f"TAKEN-{field.upper().replace('_', '-')}"
        case StoppedError():
            return "STOPPED"
    for kind, word in _WORDS.items():
        if isinstance(error, kind):
            return word
    return "REFUSED"


_WORDS: Final[dict[type[BirthmarkError], str]] = {
    MalformedAnswerError: "PROTOCOL",
    ProofError: "PROOF",
    PortError: "PORT",
    RegistryError: "REGISTRY",
    AuthorityError: "AUTHORITY",
}


def failed_step(error: BirthmarkError, reached: Step | None) -> str:
    """Return the step that a failure belongs to.

    Args:
        error: what failed.
        reached: the last step that was answered well.
    """
    request: MessageType | None = getattr(error, "request", None)
    if request is not None and request.name.lower() in set(Step):
        return request.name.lower()
    if isinstance(error, ProofError):
        return error.step.value
    if reached is None:
        return PORT if isinstance(error, PortError) else Step.HELLO.value
    if not isinstance(error, LinkError):
        return reached.value  # the station's own word about what that step brought
    steps = [step for step in Step if step is not Step.UNLOCK or reached is Step.UNLOCK]
    return steps[min(steps.index(reached) + 1, len(steps) - 1)].value
