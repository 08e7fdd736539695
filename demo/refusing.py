"""Steps: what a device may not do, and who may not come in at all."""

from __future__ import annotations

import json
import signal

from demo.narrator import Observed
from demo.play import BYSTANDERS, CULPRIT, OPERATOR, PROBER, Play, ask, expect

SUBSCRIPTION_REFUSED = 128


def foreign_topic(play: Play) -> Observed:
    """A device reaches for another's topics, and is denied."""
    prober = play.stage.start("prober", "python", PROBER, play.broker, "--state", "bench/board-1", listening=True)
    play.running["prober"] = prober
    for version in ("1.2", "1.3"):
        expect(ask(prober, f"connect {version}")["accepted"], f"{CULPRIT} let in over TLS {version}")
        if version == "1.3":
            break
        ask(prober, "leave")
    victim = BYSTANDERS[0]
    own = ask(prober, f"subscribe devices/{CULPRIT}/commands/#")
    foreign = ask(prober, f"subscribe devices/{victim}/commands/#")
    everything = ask(prober, "subscribe #")
    expect(own.get("code") == 1, f"{CULPRIT} may subscribe to its own commands")
    expect(foreign.get("code") == SUBSCRIPTION_REFUSED, f"SUBACK 0x80 for {victim}'s commands")
    expect(everything.get("code") == SUBSCRIPTION_REFUSED, "SUBACK 0x80 for #")
    ask(prober, f"publish devices/{victim}/telemetry/forged FORGED")
    ask(prober, f"publish devices/{CULPRIT}/telemetry/marker MARKER")
    # One connection, one order: when the operator has the second message, the first will not come any more.
    play.operator_sees(f"devices/{CULPRIT}/telemetry/marker", "MARKER", timeout_s=10)
    expect(
        not any("FORGED" in json.dumps(heard.record) for heard in play.running["watch"].heard()),
        "no forged reading",
    )
    denial = play.hears(
        "broker", event="denied", action="publish", topic=f"devices/{victim}/telemetry/forged", timeout_s=5
    )
    ask(prober, "leave")
    return Observed(
        f"{CULPRIT}: SUBACK 0x80 for {victim}'s commands and for #; its forged reading reached nobody. "
        f"The broker's log: {denial.record['message']}",
        {"log": denial.record["message"]},
    )


def stranger(play: Play) -> Observed:
    """A stranger's certificate is refused, and so is none."""
    stage = play.stage
    stage.run("stranger-init", "birthmark", "init", "--station", "strangers", "--organization", "Demo", "--json")
    stage.run(
        "stranger-issue",
        "birthmark",
        "issue-operator",
        OPERATOR,
        "--station",
        "strangers",
        "--out",
        "stranger",
        "--json",
    )
    ca = stage.folder / "operator" / "ca.pem"
    told = {}
    for who, options in {
        "another CA's certificate with the operator's name": ("--identity", f"stranger/{OPERATOR}.pem"),
        "no certificate": ("--nobody",),
    }.items():
        prober = stage.start("stranger", "python", PROBER, play.broker, *options, "--ca", ca, listening=True)
        for version in ("1.2", "1.3"):
            answer = ask(prober, f"connect {version}")
            expect(not answer["accepted"], f"{who} refused over TLS {version}")
            told[f"{who}, TLS {version}"] = answer["reason"]
        prober.signal(signal.SIGTERM)
    logged = [h.record for h in play.running["broker"].heard() if h.record.get("event") == "handshake_failed"]
    expect(len(logged) >= 2, "the refused handshakes in the broker's log")
    reasons = sorted({record["reason"] for record in logged})
    return Observed(
        f"{'; '.join(sorted({key.split(',')[0] for key in told}))}: refused over TLS 1.2 and 1.3. "
        f"The broker's log: {', '.join(reasons)}",
        {"refused": told, "logged": reasons},
    )
