"""`birthmark-sim`: the command line of the simulator; no logic of its own."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import Any

from birthmark.device.agent.stop import stop_on_signals
from birthmark.device.console import Console, Parser, command
from birthmark.firmware_sim.board import Behaviour
from birthmark.firmware_sim.fleet import run_boards

MAX_BOARDS = 100
"""What a process has descriptors for, with the usual limit of 1024; for more boards, start more simulators."""

_BOARD_EXAMPLES = """
birthmark-sim board
birthmark-sim board --count 16 --state ./fixture
birthmark-sim board --online --interval 0.5 --json
"""


def parser() -> Parser:
    """Return the parser of `birthmark-sim`."""
    root = Parser(
        prog="birthmark-sim",
        description="Boards that do not exist: the device's own agent and client on pseudo-terminals.",
        examples=_BOARD_EXAMPLES,
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
    board.add_argument(
        "--state",
        type=Path,
        default=Path("birthmark-boards"),
        metavar="DIR",
        help="where the boards keep their state, in DIR/board-1, ...; their ports are DIR/board-1/tty, ...",
    )
    board.add_argument(
        "--online", action="store_true", help="connect to the broker once enrolled, and send readings"
    )
    board.add_argument(
        "--interval", type=float, default=1.0, metavar="S", help="seconds between two readings (1.0)"
    )
    return root


def _board(arguments: argparse.Namespace, console: Console) -> None:
    behaviour = Behaviour(online=arguments.online, interval_s=arguments.interval)
    with stop_on_signals(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as stop:
        run_boards(
            arguments.state,
            arguments.count,
            behaviour,
            lambda record: console.emit(record, _in_words(record)),
            stop,
        )


def _in_words(record: dict[str, Any]) -> str:
    facts = {name: value for name, value in record.items() if name not in ("event", "board") and value is not None}
    match record["event"]:
        case "ready":
            is_whom = f"enrolled as {facts['id']}" if "id" in facts else "blank"
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
