"""A slot's retries, and what the operator sees of them."""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING, Any

import pytest
from support.board_station import open_desk

from birthmark.device.errors import LinkError, PortError, RegistryError
from birthmark.device.identity import DeviceId
from birthmark.device.link.messages import ErrorCode, MessageType
from birthmark.provisioning.enrollment.enrol import ProofError, Step, UnitRefusedError
from birthmark.provisioning.enrollment.exchange import DeviceRefusalError, MalformedAnswerError, NoAnswerError
from birthmark.provisioning.enrollment.journal import Action, Wish
from birthmark.provisioning.enrollment.outcomes import Attempt, Outcome, code_of, failed_step
from birthmark.provisioning.enrollment.port import PortName
from birthmark.provisioning.enrollment.verdict import Evidence
from birthmark.provisioning.line.port_choice import SlotPort
from birthmark.provisioning.line.slot import Announced, Ended, Noted, Slot, Stepped
from birthmark.provisioning.line.view import LiveTable, Tally
from birthmark.provisioning.registry.interface import RegistryAwayError

if TYPE_CHECKING:
    from pathlib import Path

    from birthmark.device.errors import BirthmarkError
    from birthmark.provisioning.line.slot import Report

HWID = b"12345678"
STUCK = NoAnswerError(MessageType.DATA, Evidence(byte_count=12, sound_frames=1))
LOGIN = NoAnswerError(MessageType.HELLO, Evidence(byte_count=12, noise=b"pi login: "))
SILENT = NoAnswerError(MessageType.HELLO, Evidence())


class Acted(Slot):
    """A slot whose attempts end as a test says."""

    script: list[BirthmarkError | None]

    def _session(self, progress: Any) -> Any:
        ending = self.script.pop(0)
        if not self.script and self.again:
            self.stop.set()
        nobody = ending in (SILENT, LOGIN)
        progress.hwid = b"" if nobody else HWID
        progress.reached = None if nobody else Step.BEGIN
        progress.wish = Wish(DeviceId("sensor-1"))

        class Ending:
            def run(self) -> None:
                if ending is not None:
                    raise ending

        return Ending()


class NoIds:
    given_back: list[tuple[str, bool]]

    def give_back(self, wish: Wish, *, taken: bool) -> None:
        self.given_back.append((wish.device_id.text, taken))


def reports_of(
    tmp_path: Path, *script: BirthmarkError | None, tries: int = 4, again: bool = False
) -> tuple[list[Report], NoIds]:
    reports: list[Report] = []
    ids = NoIds()
    ids.given_back = []
    port = SlotPort("1", "/dev/null", PortName("/dev/null"))
    stop = threading.Event()
    journal = open_desk(tmp_path / "desk").journal
    slot = Acted(port, journal, ids, reports.append, stop, tries, again)  # type: ignore[arg-type]
    slot.script = list(script)
    slot.run()
    assert slot.script == []
    return reports, ids


def ends(
    tmp_path: Path, *script: BirthmarkError | None, tries: int = 4, again: bool = False
) -> list[tuple[str, str, int, bool]]:
    reports, _ = reports_of(tmp_path, *script, tries=tries, again=again)
    return [
        (report.attempt.outcome.value, report.attempt.code, report.retries, report.is_final)
        for report in reports
        if isinstance(report, Ended)
    ]


def test_a_line_that_fails_is_tried_again(tmp_path: Path) -> None:
    assert ends(tmp_path, STUCK, STUCK, None) == [
        ("FAIL", "STUCK", 0, False),
        ("FAIL", "STUCK", 1, False),
        ("PASS", "", 2, True),
    ]


def test_what_is_on_a_port_instead_of_a_board_is_said_once(tmp_path: Path) -> None:
    assert [end[1] for end in ends(tmp_path, SILENT, LOGIN, LOGIN, SILENT, LOGIN, None, again=True)] == [
        "CONSOLE",
        "",
    ]


def test_tries_end(tmp_path: Path) -> None:
    assert [end[3] for end in ends(tmp_path, STUCK, STUCK, tries=2)] == [False, True]


def test_a_registry_that_is_away_is_waited_for_and_no_attempt_is_counted(tmp_path: Path) -> None:
    away = RegistryAwayError("could not reach the registry")
    reports, ids = reports_of(tmp_path, away, away, RegistryError("it is damaged"))
    assert [report.text for report in reports if isinstance(report, Noted)] == [
        *["waiting: could not reach the registry", "it is back"] * 2
    ]
    (end,) = [report for report in reports if isinstance(report, Ended)]
    assert (end.attempt.code, end.retries, end.is_final) == ("REGISTRY", 0, True)
    assert ids.given_back == [("sensor-1", False)] * 3, "an id under which nothing was reserved is lost"


@pytest.mark.parametrize("error", [SILENT, ProofError(Step.ATTEST, "x"), RegistryError("x")])
def test_what_another_attempt_does_not_help_is_not_tried_again(tmp_path: Path, error: BirthmarkError) -> None:
    assert [end[3] for end in ends(tmp_path, error)] == [True]


@pytest.mark.parametrize(
    ("error", "reached", "expected"),
    [
        (SILENT, None, ("hello", "SILENT")),
        (STUCK, Step.BEGIN, ("data", "STUCK")),
        (PortError("x"), None, ("port", "PORT")),
        (PortError("x"), Step.COMMIT, ("attest", "PORT")),
        (PortError("x"), Step.ATTEST, ("attest", "PORT")),
        (LinkError("x"), Step.HELLO, ("keygen", "REFUSED")),
        (LinkError("x"), Step.UNLOCK, ("keygen", "REFUSED")),
        (UnitRefusedError(Action.ERASED, "x", "y"), Step.HELLO, ("hello", "ERASED")),
        (DeviceRefusalError(MessageType.PREPARE, ErrorCode.STORE), Step.DATA, ("prepare", "STORE")),
        (DeviceRefusalError(MessageType.PREPARE, 99), Step.DATA, ("prepare", "ERR-99")),
        (MalformedAnswerError(MessageType.KEYGEN, "x"), Step.HELLO, ("keygen", "PROTOCOL")),
        (ProofError(Step.PREPARE, "x"), Step.DATA, ("prepare", "PROOF")),
        (RegistryError("x"), Step.KEYGEN, ("keygen", "REGISTRY")),
    ],
)
def test_where_and_why_an_attempt_failed(
    error: BirthmarkError, reached: Step | None, expected: tuple[str, str]
) -> None:
    assert (failed_step(error, reached), code_of(error)) == expected


class Screen:
    def __init__(self, width: int = 80, *, is_coloured: bool = True) -> None:
        self.now_s = 100.0
        self.written: list[str] = []
        self.tally = Tally(lambda: self.now_s)
        self.table = LiveTable(
            ["A", "B"], self.tally, width=width, is_coloured=is_coloured, write=self.written.append
        )

    def lines(self) -> list[str]:
        return self.table.lines(self.now_s)


def ended(outcome: Outcome, code: str = "", *, is_final: bool = True, retries: int = 0) -> Ended:
    error = None if outcome is Outcome.PASS else STUCK
    return Ended("A", Attempt(outcome, "sensor-1", HWID, "data", code, 1500.0), retries, is_final, None, error)


def test_a_row_goes_from_step_to_word_and_colour() -> None:
    screen = Screen()
    screen.table.show(Stepped("A", "sensor-1", HWID, Step.DATA, 0.5))
    screen.now_s += 1
    row = screen.lines()[1]
    assert re.match(r"A +sensor-1 +data +70 +1\.5 +0", row)
    first = ended(Outcome.FAIL, "STUCK", is_final=False)
    for report in (first, ended(Outcome.PASS, retries=1)):
        screen.tally.add(report)
        screen.table.show(report)
    row = screen.lines()[1]
    assert row.startswith("\x1b[7;32m")
    assert row.endswith("\x1b[0m")
    assert "PASS" in row
    assert screen.lines()[3] == "1 PASS, 0 FAIL; first-pass yield 0.0%, final yield 100.0%"
    assert screen.lines()[4].startswith("1 retries; ")
    assert screen.lines()[5] == "failures by step: data 1"
    screen.table.show(ended(Outcome.FAIL, "STUCK"))
    assert screen.lines()[1].startswith("\x1b[7;31m")
    assert "FAIL STUCK" in screen.lines()[1]


def test_without_colours_the_word_says_it() -> None:
    screen = Screen(is_coloured=False)
    screen.table.show(ended(Outcome.FAIL, "STUCK"))
    assert "\x1b" not in "".join(screen.lines())
    assert "FAIL STUCK" in screen.lines()[1]


def test_80_columns_cut_neither_a_code_nor_a_figure_nor_a_prompt() -> None:
    screen = Screen(80, is_coloured=False)
    for report in (ended(Outcome.PASS), ended(Outcome.FAIL, "QUARANTINE")):
        screen.tally.add(report)
        screen.table.show(report)
    asked = f"scan the id of the board {'0f' * 16}"
    screen.table.show(Noted("B", "id", asked))
    screen.table.typed("S0001\x1b")
    lines = screen.lines()
    assert all(len(line) < 80 for line in lines)
    assert lines[1].rstrip().endswith("  FAIL QUARANTINE")
    assert any(line.endswith(" boards an hour") for line in lines)
    assert lines[-2:] == [f"slot B: {asked}", "> S0001\\x1b"]
    screen.table.show(Stepped("B", "S0001", HWID, Step.HELLO, 0.5))
    assert lines[-1] not in screen.lines()


def test_a_long_name_is_cut_in_characters_that_every_terminal_has() -> None:
    screen = Screen(80, is_coloured=False)
    screen.table.show(Stepped("A", "sensor-" + "1" * 56, HWID, Step.DATA, 0.5))
    assert re.match(r"A +sensor-1+\.\.  data ", screen.lines()[1])
    assert "".join(screen.lines()).isascii()


def test_an_id_that_was_given_back_is_not_shown_as_the_units() -> None:
    screen = Screen(80, is_coloured=False)
    screen.table.show(Stepped("A", "sensor-1", HWID, Step.HELLO, 0.5))
    assert screen.lines()[1].split()[1] == "sensor-1"
    screen.table.show(ended(Outcome.FAIL, "QUARANTINE"))
    assert screen.lines()[1].split()[1] == HWID.hex()[:24]


def test_a_stop_is_said_once() -> None:
    screen = Screen(80, is_coloured=False)
    screen.table.show(ended(Outcome.STOPPED, "STOPPED"))
    assert screen.lines()[1].rstrip().endswith("0  STOPPED")


def test_what_was_wrong_is_said_in_full_below_the_table() -> None:
    screen = Screen(80, is_coloured=False)
    screen.table.show(ended(Outcome.FAIL, "STUCK"))
    screen.table.close()
    assert screen.written[-1] == f"A: {STUCK.message} ({STUCK.hint})\n"


def test_nothing_raw_and_nothing_longer_than_the_terminal() -> None:
    screen = Screen(60, is_coloured=False)
    screen.table.show(Noted("B", "id", "not \x1b[2J\u202e: it is no device id" + "x" * 500))
    lines = screen.lines()
    assert all(len(line) < 60 for line in lines)
    assert all(line.isprintable() for line in lines)


def test_the_table_is_drawn_over_itself() -> None:
    screen = Screen()
    screen.table.tick()
    screen.table.tick()
    assert len(screen.written) == 1, "not more than ten times a second"
    screen.now_s += 1
    screen.table.tick()
    assert screen.written[1].startswith(f"\x1b[{screen.written[0].count(chr(10))}F")


def test_a_crl_that_is_brought_meanwhile_is_below_the_table_and_whole_at_its_end() -> None:
    screen = Screen(80, is_coloured=False)
    screen.table.show(Announced({}, "revoked certificates are on CRL 7\n  gateway-1: PENDING: no receipt"))
    assert screen.lines()[-1] == "revoked certificates are on CRL 7"
    screen.table.close()
    assert screen.written[-1] == "  gateway-1: PENDING: no receipt\n"
