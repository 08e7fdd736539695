"""What an inspection says: which profile something claims to be of, and what is wrong with it.

Pure. The rules are functions; a function marked with `rule` takes what is inspected, with the time, and yields the
findings. What it cannot read of a careless or hostile certificate is a finding too, never an exception.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

from birthmark.device.escape import escaped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

UNREADABLE: Final = (
    ValueError,
    TypeError,
    OverflowError,
    NotImplementedError,
    UnsupportedAlgorithm,
    InvalidSignature,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
"""Everything that `cryptography` raises at what it does not take; much is parsed only when it is looked at."""
MAX_SHOWN: Final = 80
"""Characters of foreign text that a finding repeats."""


class Severity(Enum):
    """How bad a finding is."""

    NOTICE = "NOTICE"
    """Worth knowing; nothing has to be done now."""
    WARNING = "WARNING"
    """Outside the profile: some validator, or somebody's expectation, will stumble over it."""
    ERROR = "ERROR"
    """It will be refused, or should be."""

    @property
    def is_trouble(self) -> bool:
        """Whether the command's exit code tells of it."""
        return self is not Severity.NOTICE


class Claim(StrEnum):
    """Which profile something claims to be of."""

    DEVICE = "device"
    SERVICE = "service"
    BROKER = "broker"
    ISSUING = "issuing CA"
    ROOT = "root CA"
    CRL = "CRL"
    REQUEST = "request"

    @property
    def is_ca(self) -> bool:
        """Whether it is a CA's certificate."""
        return self in {Claim.ISSUING, Claim.ROOT}

    @property
    def is_client(self) -> bool:
        """Whether it is a TLS client's certificate."""
        return self in {Claim.DEVICE, Claim.SERVICE}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be. Every text is printable ASCII."""

    rule: str
    severity: Severity
    what: str
    why: str
    remedy: str

    def record(self) -> dict[str, str]:
        """Return it as a JSON object."""
        return {
            "rule": self.rule,
            "severity": self.severity.value,
            "what": self.what,
            "why": self.why,
            "remedy": self.remedy,
        }


@dataclass(frozen=True, slots=True)
class Rule:
    """A named check."""

    name: str
    check: Callable[[Any], Iterable[Finding]]


def error(rule: str, what: str, why: str, remedy: str) -> Finding:
    """Return a finding of severity ERROR."""
    return Finding(rule, Severity.ERROR, what, why, remedy)


def warning(rule: str, what: str, why: str, remedy: str) -> Finding:
    """Return a finding of severity WARNING."""
    return Finding(rule, Severity.WARNING, what, why, remedy)


def notice(rule: str, what: str, why: str, remedy: str) -> Finding:
    """Return a finding of severity NOTICE."""
    return Finding(rule, Severity.NOTICE, what, why, remedy)


def findings_of(rules: Sequence[Rule], subject: object) -> list[Finding]:
    """Apply every rule, and return what they found, in their order."""
    return [finding for each in rules for finding in _applied(each, subject)]


def _applied(rule: Rule, subject: object) -> Iterator[Finding]:
    try:
        with warnings.catch_warnings():
            # The library warns of what it will refuse some day; our own rules say what is wrong today.
            warnings.simplefilter("ignore")
            found = list(rule.check(subject))
    except UNREADABLE as cause:
        found = [
            error(
                rule.name,
                f"it cannot be read: {shown(str(cause)) or type(cause).__name__}",
                "what one reader cannot read, another may read in its own way",
                "have it issued anew",
            )
        ]
    yield from found


def shown(text: str) -> str:
    """Return foreign text fit to be shown."""
    return escaped(text, MAX_SHOWN)
