"""`birthmark quarantine list | clear`: the units that only a person can decide about.

A unit that is ahead of the journal (a restored backup, a clone, a foreign station) is refused from then on, also
when it is reset or looks innocent again, until a person clears it. Clearing changes neither the unit nor its row:
the journal's table decides anew when it is on a port the next time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from birthmark.device.console import Console, Parser, command
from birthmark.device.errors import RegistryError, UsageError
from birthmark.device.escape import escaped
from birthmark.provisioning.options import add_station_option, open_station

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from birthmark.provisioning.registry.line import Quarantined

_MAX_REASON_CHARACTERS = 200


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add these commands."""
    parser = commands.add_parser(
        "quarantine",
        help="list or clear the units that a person has to decide about",
        description="list or clear the units that a person has to decide about",
        examples="birthmark quarantine list\nbirthmark quarantine clear 0123456789abcdef --reason 'it was reset'",
    )
    actions: argparse._SubParsersAction[Parser] = parser.add_subparsers(
        title="actions", metavar="ACTION", required=True
    )
    listing = command(
        actions,
        "list",
        _list,
        "list the units in quarantine",
        "birthmark quarantine list\nbirthmark quarantine list --json",
    )
    clear = command(
        actions,
        "clear",
        _clear,
        "let a unit be enrolled again, if the journal allows it",
        "birthmark quarantine clear 0123456789abcdef --reason 'reset at the bench'\n"
        "birthmark quarantine clear sensor-17 --reason 'the journal was restored'",
    )
    clear.add_argument("unit", metavar="HWID|ID", help="the unit, as in `birthmark quarantine list`")
    clear.add_argument("--reason", required=True, metavar="TEXT", help="why, for the audit log")
    for each in (listing, clear):
        add_station_option(each)


def _list(arguments: argparse.Namespace, console: Console) -> None:
    station = open_station(arguments)
    with station.registry.view() as view:
        units = view.quarantined()
    columns = ["hwid", "name", "since", "reason"]
    console.table([_record(unit) for unit in units], columns, empty="no unit is in quarantine")


def _clear(arguments: argparse.Namespace, console: Console) -> None:
    reason = arguments.reason.strip()
    if not reason or len(reason) > _MAX_REASON_CHARACTERS or not reason.isprintable():
        raise UsageError(
            "could not use the reason: it is empty, not printable or too long",
            hint=f"say in up to {_MAX_REASON_CHARACTERS} characters why the unit may be used",
        )
    station = open_station(arguments)
    with station.registry.transaction() as transaction:
        unit = _chosen(transaction.quarantined(), arguments.unit)
        transaction.clear_quarantine(unit.hwid)
        transaction.record("quarantine-clear", unit.name or unit.hwid.hex(), hwid=unit.hwid.hex(), reason=reason)
    known = f" ({unit.name})" if unit.name else ""
    console.emit(
        {"cleared": unit.hwid.hex(), "name": unit.name or None},
        f"{unit.hwid.hex()}{known} is out of quarantine; the journal decides when it is on a port again",
    )


def _chosen(units: Sequence[Quarantined], text: str) -> Quarantined:
    wanted = text.strip().lower()
    found = [unit for unit in units if wanted and wanted in (unit.hwid.hex(), unit.name.lower())]
    if len(found) == 1:
        return found[0]
    cause = "it is not in quarantine"
    if found:
        cause = f"{len(found)} units stand under it: {', '.join(unit.hwid.hex() for unit in found)}"
    raise RegistryError(
        f"could not clear {escaped(text, 80)}: {cause}", hint="name one by its hwid: `birthmark quarantine list`"
    )


def _record(unit: Quarantined) -> dict[str, Any]:
    return {
        "hwid": unit.hwid.hex(),
        "name": unit.name or None,
        "since": unit.since.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "reason": unit.reason,
        "active_txn": unit.active_txn.hex(),
    }
