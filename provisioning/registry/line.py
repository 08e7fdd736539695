"""What a manufacturing line keeps beside the rows: its batches, and the units that a person has to look at."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from birthmark.device.errors import ConfigurationError
from birthmark.device.escape import quoted

if TYPE_CHECKING:
    from datetime import datetime

_BATCH_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Batch:
    """Units that are made, counted and released together. Open until `closed_at`; its name is never used again.

    Raises:
        ConfigurationError: the name is not of 1 to 64 letters, digits, dots, dashes and underscores.
    """

    name: str
    opened_at: datetime
    closed_at: datetime | None = None

    def __post_init__(self) -> None:
        if not _BATCH_NAME.fullmatch(self.name):
            raise ConfigurationError(
                f"could not use {quoted(self.name, 80)} as a batch's name",
                hint="1 to 64 letters, digits, '.', '-' and '_', beginning with a letter or a digit",
            )


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A unit that is ahead of the journal (docs/serial-protocol.md section 8); refused until it is cleared."""

    hwid: bytes
    since: datetime
    name: str
    """The device id that it stands under in the journal; empty if the journal does not know it."""
    reason: str
    """What the device is, to follow `the device on this port`."""
    active_txn: bytes
    """The transaction that it is locked by."""
