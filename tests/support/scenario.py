"""What a command that is killed finds, and what must be true once it is done: the terms of `command_scenarios`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from support.station import PASSPHRASE

from birthmark.provisioning.crl_store import current_crl
from birthmark.provisioning.station import Station

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


def nothing(_root: Path) -> None:
    pass


@dataclass(frozen=True)
class Scenario:
    """A command, the station that it finds, and what must be true when it has finished, killed before or not."""

    words: Sequence[str]
    """`@` stands for the scenario's folder; the station is `@/station` unless it says otherwise."""
    prepare: Callable[[Path], object] = nothing
    finished: Callable[[Path], object] = nothing
    done_already: Sequence[str] = ()
    """What the same command may say instead of finishing, where the killed one was done."""
    code: int = 0
    """How it ends when it is not killed."""
    founds: bool = True
    """Whether a station is founded first."""
    registry: str = ""
    """Where that station's registry is; empty for TinyDB."""
    boards: int = 0
    """How many boards are powered on meanwhile (`line_scenarios.powered`); they survive the command."""
    killed: Callable[[Path], object] = nothing
    """Looks at what a kill left."""


def station(root: Path, folder: str = "station") -> Station:
    return Station.open(root / folder, passphrase=PASSPHRASE)


def rows_named(root: Path, name: str, folder: str = "station") -> list[Any]:
    with station(root, folder).registry.view() as view:
        return view.named(name)


def all_listed(root: Path, folder: str = "station") -> None:
    opened = station(root, folder)
    crls = current_crl(opened)
    assert crls is not None
    with opened.registry.view() as view:
        assert {row.cert_serial for row in view.revoked()} == crls.cert_serials
