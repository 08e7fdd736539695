"""What a device does with a command: at most once, in time, with a reply."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from birthmark.device import requests
from birthmark.device.commands import MAX_AHEAD_S, MAX_REMEMBERED, CommandFailedError, Commands
from birthmark.device.errors import LocalProtocolError, RemoteProtocolError
from birthmark.device.identity import DeviceId
from birthmark.device.received import Command, Message

if TYPE_CHECKING:
    from pathlib import Path

START = 1_800_000_000.0


class Device:
    """A device's commands; what it published, and a clock to turn."""

    def __init__(self, folder: Path | None) -> None:
        self.at = START
        self.replies: list[tuple[str, Any]] = []
        self.failures: list[tuple[str, Exception]] = []
        self.commands = Commands(
            DeviceId("valve-1"),
            publish=lambda topic, payload: self.replies.append((topic, json.loads(payload) if payload else None)),
            failed=lambda topic, error: self.failures.append((topic, error)),
            now=lambda: datetime.fromtimestamp(self.at, UTC),
            folder=folder,
        )

    def get(self, name: str, payload: bytes = b"", *, retained: bool = False) -> None:
        self.commands.take(Message(f"devices/valve-1/commands/{name}", payload, 1, retained))

    def ask(self, name: str, *, of: str = "q1", within_s: float = 10.0) -> tuple[str, Any]:
        """Ask, and return the outcome and what came with it."""
        count = len(self.replies)
        self.get(f"{name}/{requests.Request(of, self.at + within_s).level}")
        assert len(self.replies) == count + 1, "one reply to each request"
        topic, payload = self.replies[-1]
        assert topic.startswith(f"devices/valve-1/replies/{name}/?id={of}/")
        return requests.outcome_of(topic), payload


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def counted(device: Device, name: str = "open") -> list[Command]:
    seen: list[Command] = []

    def handler(command: Command) -> dict[str, int]:
        seen.append(command)
        return {"times": len(seen)}

    device.commands.add(name, handler)
    return seen


def test_a_repetition_gets_the_same_reply_and_does_nothing(device: Device) -> None:
    seen = counted(device)
    assert device.ask("open") == ("done", {"times": 1})
    assert device.ask("open") == ("done", {"times": 1})
    assert device.ask("open", of="q2") == ("done", {"times": 2})
    assert [(c.name, c.request_id, c.expires) for c in seen] == [
        ("open", "q1", START + 10),
        ("open", "q2", START + 10),
    ]


def test_what_was_begun_before_a_reboot_is_not_begun_again(device: Device, tmp_path: Path) -> None:
    class PowerCutError(BaseException):
        pass

    def reboot(_: Command) -> None:
        raise PowerCutError

    device.commands.add("reboot", reboot)
    with pytest.raises(PowerCutError):
        device.ask("reboot")
    again = Device(tmp_path)
    seen = counted(again, "reboot")
    outcome, told = again.ask("reboot")
    assert outcome == "interrupted"
    assert "not begun again" in told["error"]
    assert not seen
    again.at += 11  # it has expired: nothing of it is kept, and it is not done either
    assert again.ask("reboot", within_s=-1)[0] == "expired"
    assert again.ask("reboot", of="q2")[0] == "done"
    assert list(json.loads((tmp_path / "requests.json").read_bytes())) == ["q2"]
    assert (tmp_path / "requests.json").stat().st_mode & 0o777 == 0o600


def test_without_a_folder_it_is_remembered_as_long_as_the_process_lives() -> None:
    device = Device(None)
    seen = counted(device)
    device.ask("open")
    device.ask("open")
    assert len(seen) == 1


@pytest.mark.parametrize("within_s", [0.0, -604_800.0, MAX_AHEAD_S + 1])
def test_what_is_too_late_is_not_begun(device: Device, within_s: float) -> None:
    seen = counted(device)
    outcome, told = device.ask("open", within_s=within_s)
    assert (outcome, told["clock"], told["expires"]) == ("expired", START, START + within_s)
    assert not seen
    assert device.ask("open", of="q2", within_s=MAX_AHEAD_S)[0] == "done"


def test_done_late_says_so_and_keeps_its_result(device: Device) -> None:
    def slow(_: Command) -> str:
        device.at += 11
        return '{"percent": 40}'

    device.commands.add("open", slow)
    assert device.ask("open") == ("late", {"percent": 40})


def test_a_failure_tells_what_was_written_to_be_read(device: Device) -> None:
    def refuse(_: Command) -> None:
        raise CommandFailedError("the valve is stuck")

    def crash(_: Command) -> None:
        raise KeyError("pin 1234 of the safe")

    def unsayable(_: Command) -> dict[str, object]:
        return {"percent": object()}

    def read(command: Command) -> None:
        command.json()

    for name, handler in (("refuse", refuse), ("crash", crash), ("unsayable", unsayable), ("read", read)):
        device.commands.add(name, handler)
    assert device.ask("refuse", of="a") == ("failed", {"error": "the valve is stuck"})
    assert device.ask("crash", of="b") == ("failed", {"error": "KeyError"})
    assert device.ask("unsayable", of="c") == ("failed", {"error": "LocalProtocolError"})
    outcome, reply = device.ask("read", of="d")
    assert outcome == "failed"
    assert reply["error"].startswith("could not read a message on devices/valve-1/commands/read/?id=d&")
    assert reply["error"].endswith(": not JSON")
    assert [type(error) for _, error in device.failures] == [KeyError, LocalProtocolError, RemoteProtocolError]
    assert device.ask("crash", of="b") == ("failed", {"error": "KeyError"})
    assert len(device.failures) == 3


def test_an_unknown_command_is_answered(device: Device) -> None:
    counted(device)
    assert device.ask("dance") == ("unknown", {"error": "no such command", "commands": ["open"]})
    seen = counted(device, "#")
    assert device.ask("dance/slowly", of="q2")[0] == "done"
    assert [command.name for command in seen] == ["dance/slowly"]


def test_a_retained_request_is_left_alone(device: Device) -> None:
    seen = counted(device)
    device.get(f"open/{requests.Request('q1', START + 10).level}", retained=True)
    device.get("open/?id=&expires=1")
    device.get("/?id=a&expires=1800000010")
    assert (seen, device.replies) == ([], [])
    assert device.ask("open")[0] == "done"


def test_plain_commands_have_no_deadline_and_run_each_time(device: Device) -> None:
    seen = counted(device)
    device.get("open")
    device.get("open")
    assert device.replies == [("devices/valve-1/replies/open", {"times": n}) for n in (1, 2)]
    assert [(command.request_id, command.expires) for command in seen] == [(None, None)] * 2


def test_no_more_than_can_be_remembered(device: Device) -> None:
    seen = counted(device)
    for number in range(MAX_REMEMBERED):
        assert device.ask("open", of=f"q{number}")[0] == "done"
    assert device.ask("open", of="one-more")[0] == "busy"
    assert len(seen) == MAX_REMEMBERED
    device.at += 11
    assert device.ask("open", of="one-more")[0] == "done"


def test_what_cannot_be_noted_is_not_begun(device: Device, tmp_path: Path) -> None:
    seen = counted(device)
    (tmp_path / "requests.json").mkdir()
    assert device.ask("open") == ("busy", {"error": "the device could not note that it began"})
    assert not seen
    (tmp_path / "requests.json").rmdir()
    assert device.ask("open")[0] == "done"


@pytest.mark.parametrize("damaged", [b"", b"[]", b'{"q1": "soon"}', b"\xff", b"{"])
def test_a_damaged_file_costs_no_command(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "requests.json").write_bytes(damaged)
    device = Device(tmp_path)
    counted(device)
    assert device.ask("open")[0] == "done"


@pytest.mark.parametrize("name", ["re+boot", "", "open/?id=a&expires=1", "?x"])
def test_names_that_no_command_can_have(device: Device, name: str) -> None:
    with pytest.raises(LocalProtocolError):
        device.commands.add(name, lambda _: None)


@given(st.text())
def test_any_level_is_plain_or_a_request_or_our_error(text: str) -> None:
    try:
        name, request = requests.split(f"open/{text}")
    except RemoteProtocolError:
        assert "?" in text
        return
    if request is None:
        assert name == f"open/{text}"
    else:
        assert requests.split(f"{name}/{request.level}") == (name, request)


@given(
    st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True),
    st.integers(0, 99_999_999_999_999),
)
def test_a_request_goes_round(request_id: str, milliseconds: int) -> None:
    request = requests.Request(request_id, milliseconds / 1000)
    assert requests.split(f"a/b/{request.level}") == ("a/b", request)


def test_the_outcome_is_read_strictly() -> None:
    assert requests.outcome_of("devices/a/replies/open/?id=q/done") == "done"
    with pytest.raises(RemoteProtocolError, match="'fine' is not known"):
        requests.outcome_of("devices/a/replies/open/?id=q/fine")
