"""`birthmark-sim`: the command line of the simulator; no logic of its own."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from birthmark.device.agent.stop import stop_on_signals
from birthmark.device.console import Console, Parser, command
from birthmark.device.options import taken_from_options
from birthmark.firmware_sim import fleet_command
from birthmark.firmware_sim.board import Behaviour
from birthmark.firmware_sim.boards import run_boards
from birthmark.firmware_sim.faults import KINDS, Faults, parse
from birthmark.firmware_sim.fixture import faults_of_slots, write_fixture
from birthmark.firmware_sim.lies import LIES

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_BOARDS = 100
"""What a process has descriptors for, with the usual limit of 1024; for more boards, start more simulators."""

_BOARD_EXAMPLES = """
birthmark-sim board
birthmark-sim board --count 16 --state ./fixture
birthmark-sim board --online --interval 0.5 --json
birthmark-sim board --fault baud=115200 --fault latency=16 --fault loss=1e-3
birthmark-sim board --fault hostile=prove-key@attest
"""
_FIXTURE_EXAMPLES = """
birthmark-sim fixture --slots 16
birthmark-sim fixture --slots 16 --faults baud=115200 latency=16 3:instead=login 7:unplug=1@900 12:foreign
birthmark-sim fixture --slots 4 --state ./fixture --faults log=20 --seed 7 --json
"""
_FAULTS_EXAMPLES = """
birthmark-sim faults
birthmark-sim faults --json
"""


def parser() -> Parser:
    """Return the parser of `birthmark-sim`."""
    root = Parser(
        prog="birthmark-sim",
        description="Boards that do not exist: the device's own agent and client on pseudo-terminals.",
        examples=_BOARD_EXAMPLES + _FIXTURE_EXAMPLES.lstrip("\n"),
    )
    commands = root.add_subparsers(title="commands", metavar="COMMAND", required=True)
    board = command(
        commands,
        "board",
        _board,
        "run simulated boards until interrupted, each with a port for `birthmark flash`",
        _BOARD_EXAMPLES,
    )
    board.add_argument("--count", type=_count, default=1, metavar="N", help="how many boards (1)")
    _add_common(board, "birthmark-boards", "KIND[=VALUE]", "what is wrong with each board and its line")
    fixture = command(
        commands,
        "fixture",
        _fixture,
        "run the boards of a whole fixture, and write the fixture.toml for `birthmark run --ports`",
        _FIXTURE_EXAMPLES,
    )
    fixture.add_argument("--slots", type=_count, default=16, metavar="N", help="how many slots it has (16)")
    _add_common(fixture, "birthmark-fixture", "[SLOT:]KIND[=VALUE]", "what is wrong with every slot, or with one")
    fleet_command.add_to(commands)
    command(commands, "faults", _list, "list what a simulated board can have wrong", _FAULTS_EXAMPLES)
    return root


def _add_common(parser: Parser, folder: str, fault: str, meaning: str) -> None:
    parser.add_argument(
        "--state",
        type=Path,
        default=Path(folder),
        metavar="DIR",
        help="where the boards keep their state, in DIR/board-1, ...; their ports are DIR/board-1/tty, ... "
        f"({folder})",
    )
    parser.add_argument(
        "--online", action="store_true", help="connect to the broker once enrolled, and send readings"
    )
    parser.add_argument(
        "--interval", type=float, default=1.0, metavar="S", help="seconds between two readings (1.0)"
    )
    parser.add_argument(
        "--fault",
        "--faults",
        dest="faults",
        nargs="+",
        action="extend",
        default=[],
        metavar=fault,
        help=f"{meaning}; `birthmark-sim faults` lists what there is",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the faults: the same seed, the same faults (0)",
    )


def _board(arguments: argparse.Namespace, console: Console) -> None:
    with taken_from_options():
        faults = parse(arguments.faults)
    _run(arguments, [faults] * arguments.count, console)


def _fixture(arguments: argparse.Namespace, console: Console) -> None:
    with taken_from_options():
        faults = faults_of_slots(arguments.faults, arguments.slots)
    path = write_fixture(arguments.state, faults)
    console.emit({"event": "fixture", "path": str(path), "slots": arguments.slots}, f"fixture     {path}")
    _run(arguments, faults, console)


def _run(arguments: argparse.Namespace, faults: Sequence[Faults], console: Console) -> None:
    with taken_from_options():
        behaviours = [
            Behaviour(online=arguments.online, interval_s=arguments.interval, faults=each, seed=arguments.seed)
            for each in faults
        ]
    with stop_on_signals(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as stop:
        run_boards(arguments.state, behaviours, lambda record: console.emit(record, _in_words(record)), stop)


def _list(_arguments: argparse.Namespace, console: Console) -> None:
    rows = [(name, f"{name}={kind.value}" if kind.value else name, kind.meaning) for name, kind in KINDS.items()]
    rows += [("hostile", f"hostile={name}", f"{lie.meaning}, at {lie.at.name}") for name, lie in LIES.items()]
    for name, written, meaning in rows:
        console.emit({"fault": name, "write": written, "meaning": meaning}, f"{written:<24} {meaning}")


def _in_words(record: dict[str, Any]) -> str:
    facts = {name: value for name, value in record.items() if name not in ("event", "board") and value is not None}
    match record["event"]:
        case "ready":
            is_whom = facts.get("instead") or (f"enrolled as {facts['id']}" if "id" in facts else "blank")
            text = f"ready on {facts['path']} ({facts['link']}), {is_whom}"
        case "flashed":
            text = f"enrolled as {facts['id']}"
        case "online":
            resumed = ", resumed" if facts["resumed"] else ""
            text = f"online as {facts['id']} at {facts['broker']} ({facts['tls']}{resumed})"
        case "telemetry":
            text = f"{facts['topic']}  {facts['celsius']} degrees"
        case event:
            text = " ".join([event.replace("_", " "), *(f"{name}={value}" for name, value in facts.items())])
    return f"board {record['board']:<4} {text}"


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= MAX_BOARDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not from 1 to {MAX_BOARDS}")
    return int(text)
