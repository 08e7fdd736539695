"""A fixture that does not exist: many slots, a board with faults of its own in each, and the file that names them.

The file is what `birthmark run --ports` reads: a `[[slot]]` table for each slot, with its `name`, its `port`, and
its `baud` if the line has a rate of its own.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from birthmark.device.durable import private_folder, write_durably
from birthmark.device.errors import ConfigurationError
from birthmark.device.escape import quoted
from birthmark.firmware_sim.board import LINK_NAME
from birthmark.firmware_sim.boards import board_folder
from birthmark.firmware_sim.faults import Faults, parse

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

FILE_NAME: Final = "fixture.toml"
_OF_SLOT: Final = re.compile(r"([0-9]{1,4}):(.*)", re.DOTALL)


def faults_of_slots(texts: Iterable[str], count: int) -> list[Faults]:
    """Read faults of a fixture: `KIND[=VALUE]` is every slot's, `SLOT:KIND[=VALUE]` that of one.

    Raises:
        ConfigurationError: there is no such slot or fault.
    """
    of: list[list[str]] = [[] for _ in range(count)]
    for text in texts:
        found = _OF_SLOT.fullmatch(text)
        if found is None:
            for each in of:
                each.append(text)
        elif 1 <= int(found[1]) <= count:
            of[int(found[1]) - 1].append(found[2])
        else:
            raise ConfigurationError(
                f"could not simulate {quoted(text)}: there is no slot {found[1]}",
                hint=f"the slots are 1 to {count}; more with --slots",
            )
    return [parse(each) for each in of]


def write_fixture(folder: Path, faults: Sequence[Faults]) -> Path:
    """Write the file that names the slots' ports, and return its path.

    Raises:
        ConfigurationError: the folder's path cannot stand in it.
        OSError: it could not be written.
    """
    base = folder.resolve()
    if not str(base).isprintable() or any(character in str(base) for character in "'\\"):
        raise ConfigurationError(
            f"could not name the ports in {quoted(str(base))}: the path has characters that quote",
            hint="choose another --state",
        )
    private_folder(base)
    path = base / FILE_NAME
    write_durably(path, "\n".join(_slot(base, *each) for each in enumerate(faults, 1)).encode())
    return path


def _slot(base: Path, number: int, faults: Faults) -> str:
    table = f"[[slot]]\nname = '{number}'\nport = '{board_folder(base, number) / LINK_NAME}'\n"
    return table if faults.line.baud is None else f"{table}baud = {faults.line.baud}\n"
