"""How far it goes: `python -m bench.scaling` measures what docs/scaling.md plans with, and draws what it comes to.

    python -m bench.scaling --json scaling.json --svg scaling.svg      a quarter of an hour
    python -m bench.scaling --from docs/scaling.json --svg docs/scaling.svg --tables

What a message of a busy pair costs is from a run of `make bench` (docs/bench.json). Everything is on loopback, and
ends by itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench import scaling_gateway, scaling_station
from bench.fleet_pki import FleetPki
from bench.report import machine
from bench.scaling_chart import Line, Panel, amount, page
from bench.scaling_plan import Fleet, Plan, plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

SESSIONS, ENTRIES, RENEWING, ROWS = 1_000, 200_000, 1_024, 10_000
QUICK: Final = (60, 2_000, 32, 500)
SIZES: Final = tuple(int(10 ** (power / 4)) for power in range(12, 25))
PLANNED: Final = (
    ("10,000 devices", Fleet(10_000)),
    ("1,000,000 devices", Fleet(1_000_000)),
    ("1,000,000, replaced certificates left to expire", Fleet(1_000_000, lists_replaced=False)),
)
LIFETIMES: Final = (90, 730)
MESSAGE: Final = "... broker's CPU, 1 to 1, 64 B, QoS 1"
_MILLI: Final = 1e3


def main() -> int:
    """Measure or read, then draw."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description="how far birthmark goes")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="what an earlier run has measured"
    )
    parser.add_argument("--bench", type=Path, default=Path("docs/bench.json"), help="a run of `make bench`")
    parser.add_argument("--quick", action="store_true", help="a small fleet: for a look at the parts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw there")
    parser.add_argument("--tables", action="store_true", help="print the tables of docs/scaling.md")
    arguments = parser.parse_args()
    if arguments.source:
        found = json.loads(arguments.source.read_text())
    else:
        found = {"machine": machine(), "measured": measured(arguments.bench, quick=arguments.quick)}
        print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.svg:
        arguments.svg.write_text(drawn(found["measured"]))
    if arguments.tables:
        print("\n".join(tables(found["measured"])))
    return 0


def measured(bench: Path, *, quick: bool = False) -> dict[str, float]:
    """Measure a gateway and a station."""
    sessions, entries, renewing, rows = QUICK if quick else (SESSIONS, ENTRIES, RENEWING, ROWS)
    found = {"message_us": message_us(json.loads(bench.read_text()))}
    with tempfile.TemporaryDirectory(prefix="birthmark-bench-") as name:
        folder = Path(name)
        found |= scaling_station.figures(folder, renewing, rows, entries, _say)
        pki = FleetPki(folder)
        found |= scaling_gateway.sessions(pki, sessions, _say)
        found |= scaling_gateway.revocations(pki, sessions, entries, _say)
    return {what: round(value, 4) for what, value in found.items()}


def message_us(bench: Mapping[str, Any]) -> float:
    """Return what a message costs a gateway in a run of `make bench`, in microseconds of CPU."""
    return next(float(one["medians"]["birthmark"]) for one in bench["figures"] if one["name"] == MESSAGE)


def drawn(values: Mapping[str, float]) -> str:
    """Return the picture of CRL and renewal traffic."""

    def line(quantity: str, days: int, *, lists_replaced: bool = True) -> Line:
        fleets = [Fleet(count, lifetime_days=days, lists_replaced=lists_replaced) for count in SIZES]
        name = f"certificates of {days} days" + ("" if lists_replaced else ", replaced ones not listed")
        return Line(name, [getattr(plan(values, fleet), quantity) for fleet in fleets])

    def lines(quantity: str) -> list[Line]:
        return [line(quantity, days, lists_replaced=lists) for lists in (True, False) for days in LIFETIMES]

    panels = [
        Panel("The CRL, as a gateway gets it (PEM)", lines("crl_bytes")),
        Panel("CRLs to one gateway, bytes a day", lines("crl_bytes_day")),
        Panel(
            "Renewals, messages of the whole fleet, bytes a day",
            [line("renewal_bytes_day", days) for days in LIFETIMES],
        ),
    ]
    return page("What CRLs and renewals weigh, by the fleet's size (python -m bench.scaling)", SIZES, panels)


def tables(values: Mapping[str, float]) -> Iterator[str]:
    """Yield the tables of docs/scaling.md: what was measured, and the plans."""
    yield "| measured | |"
    yield "|---|---|"
    for name, value in _shown(values):
        yield f"| {name} | {value} |"
    yield ""
    plans = [plan(values, fleet) for _, fleet in PLANNED]
    yield f"| planned | {' | '.join(name for name, _ in PLANNED)} |"
    yield "|---|" + "---|" * len(PLANNED)
    for name, text in _ROWS:
        yield f"| {name} | {' | '.join(text(one) for one in plans)} |"


def _shown(values: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    yield "a connected session, memory", amount(values["connected_bytes"])
    yield "a session that is kept for a device that is away: memory, disk", _two(values, "offline")
    yield (
        f"a message of {scaling_gateway.PAYLOAD_BYTES} bytes that waits for it: memory, disk",
        _two(values, "waiting"),
    )
    yield "a visit, full handshake: gateway's CPU", f"{values['visit_full_us'] / _MILLI:.2f} ms"
    yield "a visit, resumed", f"{values['visit_resumed_us'] / _MILLI:.2f} ms"
    yield "a message, QoS 1, each from another device: gateway's CPU", f"{values['spread_us']:.0f} µs"
    yield "the same between one busy pair (docs/bench.json)", f"{values['message_us']:.1f} µs"
    yield "a small CRL, from its file to the receipt: time, CPU", _took(values, "crl_small")
    yield "a live session that a CRL ends, CPU", f"{values['closed_session_us'] / _MILLI:.2f} ms"
    entries = f"{values['crl_large_entries']:,.0f}"
    yield (
        f"a CRL of {entries} entries ({amount(values['crl_large_bytes'])} as PEM): time, CPU",
        _took(values, "crl_large"),
    )
    yield "meanwhile, the longest that a client waited for its PINGRESP", f"{values['crl_large_stall_s']:.2f} s"
    yield "its memory on the gateway", amount(values["crl_large_memory_bytes"])
    yield (
        "an entry of a CRL: PEM, the station's CPU to sign",
        (f"{values['crl_entry_bytes']:.0f} bytes, {values['crl_entry_us']:.1f} µs"),
    )
    yield (
        "a renewal with its confirmation: the station's CPU, messages",
        (f"{values['renewal_us'] / _MILLI:.1f} ms, {amount(values['renewal_bytes'])}"),
    )
    yield "a certificate by `issue --from`: the station's CPU", f"{values['made_us'] / _MILLI:.2f} ms"
    yield "a row of the registry, SQLite", amount(values["row_bytes"])


def _two(values: Mapping[str, float], what: str) -> str:
    return f"{amount(values[f'{what}_bytes'])}, {amount(values[f'{what}_disk_bytes'])}"


def _took(values: Mapping[str, float], what: str) -> str:
    return f"{values[f'{what}_s']:.2f} s, {values[f'{what}_us'] / 1e6:.2g} s"


_ROWS: Final[tuple[tuple[str, Callable[[Plan], str]], ...]] = (
    ("messages a second", lambda one: f"{one.messages_s:,.0f}"),
    ("cores for them, half busy", lambda one: f"{one.message_cores:.2f}"),
    ("cores to let all in again within 5 minutes", lambda one: f"{one.return_cores:.2f}"),
    ("gateways, of one core each", lambda one: f"{one.gateways}"),
    ("sessions on each, memory", lambda one: amount(one.sessions_bytes)),
    ("what waits on each, disk", lambda one: amount(one.waiting_disk_bytes)),
    ("renewals a day", lambda one: f"{one.renewals_day:,.0f}"),
    ("their CPU at the station, a day", lambda one: _time(one.renewal_cpu_day_s)),
    ("entries on the CRL", lambda one: f"{one.crl_entries:,.0f}"),
    ("the CRL as PEM", lambda one: amount(one.crl_bytes)),
    ("CRLs a day", lambda one: f"{one.crls_day:,.0f}"),
    ("CRLs to each gateway, a day", lambda one: amount(one.crl_bytes_day)),
    ("CPU to sign one, and all of a day", lambda one: f"{_time(one.crl_sign_s)}, {_time(one.crl_sign_day_s)}"),
    ("CPU of a gateway to install one", lambda one: _time(one.crl_install_s)),
    ("the registry after five years", lambda one: amount(one.registry_bytes)),
    ("CPU to issue for all, once", lambda one: _time(one.issue_s)),
)


def _time(seconds: float) -> str:
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:.3g} h"
    return f"{seconds / 60:.3g} min" if seconds >= 60 else f"{seconds:.2g} s"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
