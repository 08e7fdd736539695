"""`make bench`: birthmark beside its peers, in the same run, as ratios.

`python -m bench` measures everything; `--quick` is one short round of what says most, `--only` one part of it.
What it found is a table on the terminal, and with `--json` and `--svg` a file and a picture. Traffic goes to
127.0.0.1 alone, and the run ends by itself.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from bench import certificates, connections, device, handshakes, messages, outbox, registry, revocation, upstream
from bench import line as enrolment
from bench.fleet_pki import FleetPki
from bench.peers import MOSQUITTO, available
from bench.report import Figure, line, machine, to_json, to_svg

if TYPE_CHECKING:
    from collections.abc import Iterator

ROUNDS, SECONDS = 5, 1.0
QUICK_ROUNDS, QUICK_SECONDS = 1, 0.3
VISITORS, QUICK_VISITORS = 1_000, 100
CONNECTION_ROUNDS, LINK_ROUNDS = 5, 3
AGES = (100, 10_000)
"""Rows in the registry of a line."""
HELD = 5_000
"""Connections that stay, once."""
PARTS = (
    "messages",
    "upstream",
    "connections",
    "handshakes",
    "certificates",
    "device",
    "outbox",
    "registry",
    "revocation",
    "line",
)


def main() -> int:
    """Measure."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="birthmark beside its peers")
    parser.add_argument("--quick", action="store_true", help="one short round of what says most")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part, and no other that is not named")
    parser.add_argument("--rounds", type=int, help="how often each is measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every value there")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the ratios there")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    seconds = QUICK_SECONDS if arguments.quick else SECONDS
    versions = available()
    where = machine()
    print(
        f"{where['date']}, {where['cpus']} x {where['cpu']}, {where['memory_gib']} GiB, Python {where['python']}"
    )
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    if MOSQUITTO not in versions:
        print("Mosquitto is not installed (apt install mosquitto): what is measured beside it has no ratio")
    found: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="birthmark-bench-") as name:
        folder = Path(name)
        pki = FleetPki(folder)
        for number in range(messages.DEVICES):
            pki.client(f"dev-{number:03}")
        for number in range(messages.OPERATORS):
            pki.client(f"op-{number}", "operator")
        pki.client(upstream.GATEWAY, "service-gateway")
        section = ""
        visitors, held = (QUICK_VISITORS, 0) if arguments.quick else (VISITORS, HELD)
        # Generators, each begun when its turn comes.
        parts: dict[str, Iterator[Figure]] = {
            "messages": messages.figures(folder, rounds, seconds, _say, quick=arguments.quick),
            "upstream": upstream.figures(folder, min(rounds, LINK_ROUNDS), seconds, upstream.SPOOLED, _say),
            "connections": connections.figures(pki, min(rounds, CONNECTION_ROUNDS), visitors, held, _say),
            "handshakes": handshakes.figures(pki, rounds, _say),
            "certificates": certificates.figures(folder, rounds, seconds, _say),
            "device": device.figures(folder, rounds, _say),
            "outbox": outbox.figures(rounds, _say),
            "registry": registry.figures(
                folder, rounds, registry.SIZES[:1] if arguments.quick else registry.SIZES, _say
            ),
            "revocation": revocation.figures(
                folder / "revocation",
                rounds,
                revocation.QUICK_GATEWAYS if arguments.quick else revocation.GATEWAYS,
                _say,
            ),
            "line": enrolment.figures(
                folder,
                rounds,
                AGES[:1] if arguments.quick else AGES,
                enrolment.QUICK_UNPLUGGED_AT if arguments.quick else enrolment.UNPLUGGED_AT,
                _say,
            ),
        }
        wanted = arguments.only or [part for part in PARTS if part != "upstream" or not arguments.quick]
        measured = itertools.chain.from_iterable(parts[part] for part in PARTS if part in wanted)
        for figure in measured:
            _say("")
            if figure.section != section:
                section = figure.section
                print(f"\n{section}")
            print(line(figure), flush=True)
            found.append(figure)
    if arguments.json:
        arguments.json.write_text(to_json(found, versions) + "\n")
    if arguments.svg:
        arguments.svg.write_text(to_svg(found, versions))
    return 0


def _say(text: str) -> None:
    """Show what is going on, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text[:100]}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
