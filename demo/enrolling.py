"""Steps: a station, a gateway, an operator, and three boards that get their identity."""

from __future__ import annotations

import json
import random
import socket
import stat

from demo.narrator import Observed
from demo.play import BYSTANDERS, CULPRIT, GATEWAY, HOST, OPERATOR, Play, expect, milliseconds


def station(play: Play) -> Observed:
    """A station is founded: root and issuing CA."""
    play.port = _free_port()
    answer = play.stage.run(
        "init", f"birthmark init --organization Demo --broker-host {HOST} --broker-port {play.port} --json"
    )
    folder = play.stage.folder / "station"
    keys = sorted((folder / "keys").glob("*.pem"))
    expect(stat.S_IMODE(folder.stat().st_mode) == 0o700, "a station folder of mode 0700")
    expect(len(keys) == 2, "a key for each of the two CAs")
    for path in keys:
        expect(not stat.S_IMODE(path.stat().st_mode) & 0o077, f"{path.name} readable by its owner alone")
        expect("BEGIN ENCRYPTED PRIVATE KEY" in path.read_text(encoding="ascii"), f"{path.name} encrypted")
    root = answer.records[0]["root_sha256"]
    return Observed(
        f"root {root[:16]}…, an issuing CA below it; both keys encrypted, for their owner only",
        {"root_sha256": root},
    )


def gateway(play: Play) -> Observed:
    """A gateway gets its certificate and listens."""
    stage = play.stage
    stage.run("issue-broker", f"birthmark issue-broker {GATEWAY} {HOST} --out gateway --json")
    stage.run("broker-init", f"birthmark-broker init --folder gateway --name {GATEWAY} --json")
    child = stage.start(
        "broker", f"birthmark-broker run --config gateway/broker.toml --listen {play.broker} --json"
    )
    play.running["broker"] = child
    ready = play.hears("broker", event="ready", timeout_s=15)
    elapsed_ms = milliseconds(ready.at_s - child.started_s)
    return Observed(
        f"{GATEWAY} listens on {play.broker}, mutual TLS only, {elapsed_ms:.0f} ms after its start",
        {"broker_pid": child.pid, "start_ms": elapsed_ms},
    )


def operator(play: Play) -> Observed:
    """An operator connects and watches every device."""
    stage = play.stage
    stage.run("issue-operator", f"birthmark issue-operator {OPERATOR} --out operator --json")
    identity = f"operator/{OPERATOR}.pem"
    expect(stat.S_IMODE((stage.folder / identity).stat().st_mode) == 0o600, "the operator's key of mode 0600")
    stage.run(
        "gateway-add",
        f"birthmark gateway add {GATEWAY} --host {HOST} --port {play.port} --operator {identity} --json",
    )
    play.running["watch"] = stage.start(
        "watch",
        "birthmark-device watch devices/# --ca operator/ca.pem "
        f"--identity {identity} --broker {play.broker} --json",
    )
    session = play.running["broker"].wait_for(
        "the operator's session",
        lambda record: record.get("event") == "connected" and OPERATOR in json.dumps(record),
        timeout_s=15,
    )
    return Observed(
        f"{OPERATOR} is connected; new CRLs will go to {GATEWAY} over MQTT in this name",
        {"session": session.record},
    )


def boards(play: Play) -> Observed:
    """Three blank boards are powered on."""
    play.running["boards"] = play.stage.start(
        "boards", "birthmark-sim board --count 2 --online --interval 0.2 --state boards --json"
    )
    play.running["board"] = play.stage.start("board", "birthmark-sim board --state bench --json")
    for device, name, number in (
        (BYSTANDERS[0], "boards", 1),
        (BYSTANDERS[1], "boards", 2),
        (CULPRIT, "board", 1),
    ):
        ready = play.hears(name, event="ready", board=number, timeout_s=15)
        expect(ready.record["id"] is None, "a blank board")
        play.ports[device] = ready.record["path"]
    return Observed(f"the device's own agent answers on {', '.join(play.ports.values())}", {"ports": play.ports})


def flash(play: Play) -> Observed:
    """Each board gets its identity over its serial port."""
    told, facts = [], []
    for device, keys in ((BYSTANDERS[0], "on-device"), (BYSTANDERS[1], "on-device"), (CULPRIT, "station")):
        answer = play.stage.run(
            f"flash-{device}", f"birthmark flash --port {play.ports[device]} --id {device} --keys {keys} --json"
        )
        result = answer.records[-1]
        expect((result.get("result"), result.get("id")) == ("PASS", device), f"PASS for {device}")
        expect(result["key_mode"] == keys, f"a key made {keys} for {device}")
        facts.append({"id": device, "keys": keys, "elapsed_ms": result["elapsed_ms"]})
        told.append(f"{device} {result['elapsed_ms']:.0f} ms")
    listed = {
        row["name"]: row["state"] for row in play.stage.run("list", "birthmark list --kind device --json").records
    }
    expect(listed == dict.fromkeys(play.ports, "ATTESTED"), "three attested devices in the registry")
    return Observed(
        f"PASS: {', '.join(told)}; the station made {CULPRIT}'s key, the boards made the others themselves",
        {"flashed": facts},
    )


def online(play: Play) -> Observed:
    """Freshly flashed boards come online and report."""
    since = {}
    for number, device in enumerate(BYSTANDERS, 1):
        flashed = play.hears("boards", event="flashed", board=number, id=device, timeout_s=15)
        play.operator_sees(f"devices/{device}/status", '"online":true', timeout_s=15)
        reading = play.operator_sees(f"devices/{device}/telemetry", "celsius", timeout_s=15)
        since[device] = milliseconds(reading.at_s - flashed.at_s)
    text = ", ".join(f"{device} {ms:.0f} ms" for device, ms in since.items())
    return Observed(f"from locked board to first reading at the operator: {text}", {"first_reading_ms": since})


def _free_port() -> int:
    """A port that stays free until the broker takes it: a kernel gives those above to whoever asks for any."""
    while True:
        with socket.socket() as probe:
            port = random.randrange(20_000, 32_000)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
