"""The benchmark's own parts: what it verifies, what it draws. Its figures are nobody's business here."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest
from support.programs import needs

from bench import device, messages, outbox, registry, revocation, upstream
from bench.fleet_pki import FleetPki
from bench.peers import BIRTHMARK, MOSQUITTO, peer
from bench.report import Figure, line, to_json, to_svg
from bench.tables import main as print_tables
from bench.wire import CYCLE, BenchError, Subscriber, block

if TYPE_CHECKING:
    from pathlib import Path


def work(**changes: object) -> dict[str, object]:
    return {
        "publishers": 1,
        "subscribers": 1,
        "qos": 0,
        "payload_bytes": 64,
        "window": 256,
        "seconds": 0.05,
        **changes,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bench")
    pki = FleetPki(made)
    for number in range(3):
        pki.client(f"dev-{number:03}")
        pki.client(f"op-{number}", "operator")
    pki.client(upstream.GATEWAY, "service-gateway")
    return made


@pytest.mark.parametrize(
    "changes",
    [
        work(),
        work(qos=1, persistent=True),
        work(publishers=3, qos=1),
        work(subscribers=3, qos=1),
        work(per_second=100),
        work(topics=16, other_filters=150),
    ],
    ids=["1 to 1", "kept", "fan-in", "fan-out", "steady", "filters"],
)
def test_a_workload_is_run_and_verified(folder: Path, changes: dict[str, object]) -> None:
    result = messages.run(BIRTHMARK, folder, **changes)
    assert "error" not in result, result
    assert result["delivered"] > 0
    assert ("p99_ms" in result) == ("per_second" in changes)


@needs("mosquitto")
def test_mosquitto_is_measured_beside_it(folder: Path) -> None:
    result = messages.run(MOSQUITTO, folder, **work(qos=1))
    assert "error" not in result, result


@pytest.mark.parametrize("name", [BIRTHMARK, pytest.param(MOSQUITTO, marks=needs("mosquitto"))])
@pytest.mark.parametrize("locally", [0, 1], ids=["up", "up and here"])
def test_what_goes_up_is_measured_and_verified(folder: Path, name: str, locally: int) -> None:
    result = upstream.run(name, folder, is_linked=True, seconds=0.05, publishers=1, subscribers=locally, qos=1)
    assert "error" not in result, result
    assert result["delivered"] == (1 + locally) * result["sent"] > 0


@pytest.mark.parametrize("name", [BIRTHMARK, pytest.param(MOSQUITTO, marks=needs("mosquitto"))])
def test_what_waits_for_the_broker_above_is_counted_and_verified(folder: Path, name: str) -> None:
    assert upstream.drain(name, folder, 5_000) > 0


def test_who_may_not_take_part_is_an_error(folder: Path) -> None:
    """A broker that refuses is no broker with a figure of zero."""
    (folder / "stranger").mkdir(exist_ok=True)
    stranger = FleetPki(folder / "stranger")
    for name in ("dev-000", "op-0"):
        stranger.client(name)
    with peer(BIRTHMARK, folder) as broker:
        shutil.copy(folder / "root.pem", folder / "stranger" / "root.pem")
        done = messages.generate(broker, folder / "stranger", **work())
    assert "error" in done


class Deaf(Subscriber):
    """A subscriber without a connection."""

    def __init__(self, expected: bytes | None, length: int, id_at: int) -> None:
        self._expected = memoryview(expected * 2 if expected else b"")
        self._length, self._id_at, self.received = length, id_at, 0
        self.wire = type("Nobody", (), {"client_id": "nobody"})()
        self.acks = b""

    def send(self, data: bytes | memoryview) -> None:
        self.acks += bytes(data)


def test_a_lost_repeated_or_changed_message_is_found() -> None:
    sent, length = block(["a/b"], 16, 0)
    whole = sent[: 4 * length]
    for wrong in (
        whole[length:],
        whole[: 2 * length] + whole[length:],
        whole[: 2 * length] + whole[3 * length :],
        whole[:-1] + b"y",
    ):
        with pytest.raises(BenchError):
            Deaf(sent, length, 0).take(memoryview(bytearray(wrong)))
    good = Deaf(sent, length, 0)
    assert good.take(memoryview(bytearray(whole + whole[:3]))) == 4 * length
    assert good.received == 4


def test_qos_1_is_acknowledged_by_the_identifiers_that_came() -> None:
    sent, length = block(["a/b"], 16, 1)
    arriving = bytearray(sent[: 2 * length])
    for number, packet_id in enumerate((7, 300)):
        at = number * length + 7
        arriving[at : at + 2] = packet_id.to_bytes(2, "big")
    one = Deaf(sent, length, 7)
    one.take(memoryview(arriving))
    assert one.acks == b"\x40\x02\0\x07\x40\x02\x01\x2c"


def test_a_block_goes_round() -> None:
    sent, length = block(["a/1", "a/2"], 16, 1, sender=9)
    assert len(sent) == CYCLE * length
    assert sent[length : 2 * length] == b"\x32\x17\0\x03a/2\0\x02\x09\0\x01" + b"x" * 13


def test_figures_are_told_drawn_and_written() -> None:
    figures = [
        Figure(
            "S", "better", "x/s", {"mosquitto": [10, 20], "birthmark": [30, 40]}, reference="mosquitto", at_least=2
        ),
        Figure("S", "worse <&>", "ms", {"mosquitto": [1.0], "birthmark": [3.0]}, reference="mosquitto", at_most=2),
        Figure("S", "alone", "ms", {"birthmark": [3.0]}, reference="mosquitto", at_most=2, errors=["it broke"]),
    ]
    assert [figure.ratio for figure in figures] == [2.5, 3.0, None]
    assert [figure.is_reached for figure in figures] == [True, False, None]
    assert "reached" in line(figures[0])
    assert "MISSED" in line(figures[1])
    assert "it broke" in line(figures[2])
    told = json.loads(to_json(figures, {"mosquitto": "2"}))
    assert told["figures"][0]["ratio"] == {
        "of": "birthmark",
        "to": "mosquitto",
        "median": 2.5,
        "lowest": 2.0,
        "highest": 3.0,
    }
    picture = ET.fromstring(to_svg(figures, {"mosquitto": "2"}))  # noqa: S314 - our own
    assert "worse <&>" in "".join(picture.itertext())


def test_the_programs_of_a_device_start(folder: Path) -> None:
    with peer(BIRTHMARK, folder) as broker:
        folders = dict.fromkeys(device.PROGRAMS, folder) | {device.ENROLLED: device.enrol(folder, broker)}
        found = {name: device.start(name, where, broker) for name, where in folders.items()}
        assert all(result["ms"] > 0 and result["mb"] > 5 for result in found.values()), found
        with pytest.raises(RuntimeError, match="did not connect"):
            device.start(BIRTHMARK, folder / "nowhere", broker)


def test_a_registry_is_measured_by_its_size(tmp_path: Path) -> None:
    told: list[str] = []
    figures = list(registry.figures(tmp_path, 1, (5, 50), told.append))
    assert [list(figure.values) for figure in figures] == [["5 rows", "50 rows"]] * 6
    assert all(figure.ratio is not None for figure in figures)
    assert len(told) == 4
    assert {figure.section for figure in figures} == {"The registry (TinyDB)", "The registry (SQLite)"}


def test_an_outbox_is_measured() -> None:
    written, rates = outbox.figures(1, lambda _: None)
    assert set(rates.values) == set(outbox.KINDS)
    assert all(value > 0 for values in (*written.values.values(), *rates.values.values()) for value in values)


def test_a_runs_tables_come_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = [
        Figure("Fast", "a | b", "/s", {"m": [2.0, 4.0], "birthmark": [5.0, 5.0]}, reference="m", at_least=3.0),
        Figure("Small", "c", "KB", {"birthmark": [12_345.0]}, errors=["m is not installed"]),
    ]
    path = tmp_path / "run.json"
    path.write_text(to_json(figures, {"m": "2"}))
    monkeypatch.setattr("sys.argv", ["tables", str(path)])
    assert print_tables() == 0
    out = capsys.readouterr().out
    assert "| a \\| b | /s | 3 | 5 | 1.88 (1.25 to 2.50) of m | ≥ 3, **missed** |" in out
    assert "| c | KB | 12,345 |  |  |" in out
    assert "Not measured: m is not installed" in out
    path.write_text("{}")
    assert print_tables() == 1
    assert "hint: write one with" in capsys.readouterr().err


def test_a_revocation_is_confirmed_by_every_gateway(tmp_path: Path) -> None:
    found = list(revocation.figures(tmp_path / "fleet", 1, 2, lambda _: None))
    assert [figure.errors for figure in found] == [[], []]
    assert [len(figure.values[figure.ours]) for figure in found] == [1, 1]
