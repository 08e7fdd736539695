"""`birthmark-device agent`: the device's end of the enrollment link, as a command."""

from __future__ import annotations

import contextlib
import secrets
import signal
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Final

from birthmark.device.agent import tty
from birthmark.device.agent.enrollment import Board, Step, Surroundings
from birthmark.device.agent.hwid import RANDOM_HWID_BYTES, hardware_id
from birthmark.device.agent.machine import Agent
from birthmark.device.agent.slots import Slots
from birthmark.device.agent.stop import stop_on_signals
from birthmark.device.console import INTERRUPTED, Console, Parser, command
from birthmark.device.core_dumps import forbid_core_dumps
from birthmark.device.errors import UsageError
from birthmark.device.escape import escaped, quoted
from birthmark.device.link.messages import MAX_HWID_BYTES, MAX_TEXT_CHARACTERS, MIN_HWID_BYTES, KeyMode
from birthmark.device.link.timers import DEFAULT_BAUD
from birthmark.device.options import number

if TYPE_CHECKING:
    import argparse

KEY_MODES: Final = {"on-device": KeyMode.ON_DEVICE, "station": KeyMode.STATION, "both": KeyMode.BOTH}
FROM_HARDWARE: Final = "hardware"
RANDOM: Final = "random"

_EXAMPLES = """
birthmark-device agent --tty /dev/ttyGS0 --state /var/lib/birthmark
birthmark-device agent --tty /dev/pts/7 --state ./board-1 --hwid random --json
"""


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add `agent` to the commands of `birthmark-device`."""
    parser = command(
        commands, "agent", _run, "answer a station on a serial port: take an identity, prove it", _EXAMPLES
    )
    parser.add_argument("--tty", required=True, metavar="PATH", help="the tty or pty that the station reaches")
    parser.add_argument(
        "--state", required=True, metavar="DIR", type=Path, help="the folder of the device's records"
    )
    parser.add_argument(
        "--baud", type=number, default=DEFAULT_BAUD, metavar="N", help="the line's rate (%(default)s)"
    )
    parser.add_argument(
        "--hwid",
        default=FROM_HARDWARE,
        metavar="HEX",
        help="the hardware id: `hardware` (the board's own, else random; the default), `random` (made once and "
        "kept in the state folder: for simulators, containers and virtual machines), or 8 to 64 hex digits",
    )
    parser.add_argument("--model", default="birthmark-agent", metavar="TEXT", help="how the board names itself")
    parser.add_argument(
        "--keys", choices=sorted(KEY_MODES), default="both", help="key modes offered (%(default)s)"
    )


def _run(arguments: argparse.Namespace, console: Console) -> int:
    forbid_core_dumps()
    slots = Slots(arguments.state)
    with slots.exclusive(), stop_on_signals() as stop:
        board = Board(
            hwid=_hwid(arguments.hwid, slots),
            model=_text(arguments.model, "--model"),
            firmware=_firmware(),
            key_modes=KEY_MODES[arguments.keys],
        )
        surroundings = Surroundings(
            clock=time.monotonic,
            random_bytes=secrets.token_bytes,
            watch=lambda step: _tell(console, step),
        )
        agent = Agent(slots, board, surroundings)

        def notice(event: str) -> None:
            if event == "port_open":
                _started(console, agent, arguments.tty)
            else:
                console.emit({"event": event, "tty": arguments.tty}, f"the port {arguments.tty} is gone; waiting")

        tty.run(arguments.tty, agent, stop, baud=arguments.baud, notice=notice)
        console.emit({"event": "stopped"}, "stopped")
        return INTERRUPTED if signal.SIGINT in stop.signals else 0


def _started(console: Console, agent: Agent, path: str) -> None:
    state, hwid = agent.state.name.lower(), agent.board.hwid.hex()
    record = {"event": "started", "tty": path, "hwid": hwid, "model": agent.board.model, "state": state}
    console.emit(record, f"answering on {path}: hardware id {hwid}, {state}")


def _tell(console: Console, step: Step) -> None:
    record: dict[str, str] = {"event": step.name}
    text = step.name.replace("_", " ")
    if step.device_id:
        record["id"] = step.device_id
        text += f": {step.device_id}"
    if step.txn:
        record["txn"] = step.txn.hex()
        text += f" (transaction {step.txn.hex()})"
    if step.detail:
        record["detail"] = escaped(step.detail)
        text += f": {escaped(step.detail)}"
    console.emit(record, text)


def _hwid(wanted: str, slots: Slots) -> bytes:
    found = hardware_id() if wanted == FROM_HARDWARE else None
    if found is not None:
        return found
    if wanted in (FROM_HARDWARE, RANDOM):
        return slots.kept_hwid(secrets.token_bytes, RANDOM_HWID_BYTES)
    with contextlib.suppress(ValueError):
        hwid = bytes.fromhex(wanted)
        if MIN_HWID_BYTES <= len(hwid) <= MAX_HWID_BYTES:
            return hwid
    raise UsageError(
        f"could not use {quoted(wanted)} as a hardware id: it is not 8 to 64 hex digits",
        hint="leave --hwid out to take the board's own",
    )


def _text(text: str, option: str) -> str:
    if 1 <= len(text) <= MAX_TEXT_CHARACTERS and all(" " <= character <= "~" for character in text):
        return text
    raise UsageError(
        f"could not use {quoted(text)} for {option}: it is not 1 to {MAX_TEXT_CHARACTERS} printable characters"
    )


def _firmware() -> str:
    try:
        return f"birthmark {version('birthmark')}"[:MAX_TEXT_CHARACTERS]
    except PackageNotFoundError:
        return "birthmark"
