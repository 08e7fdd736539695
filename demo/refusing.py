"""Steps: what a device may not do, and who may not come in at all."""

from __future__ import annotations

from demo.narrator import Observed
from demo.play import BYSTANDERS, CULPRIT, OPERATOR, PROBER, Play, ask, expect

SUBSCRIPTION_REFUSED = 128


def foreign_topic(play: Play) -> Observed:
    """A device reaches for another's topics, and is denied."""
    prober = play.stage.start("prober", "python", PROBER, play.broker, "--state", "bench/board-1", listening=True)
    play.running["prober"] = prober
    # It keeps a TLS session of each version, for when it is revoked.
    expect(ask(prober, "connect 1.2")["accepted"], f"{CULPRIT} let in over TLS 1.2")
    ask(prober, "leave")
    expect(ask(prober, "connect 1.3")["accepted"], f"{CULPRIT} let in over TLS 1.3")

    victim = BYSTANDERS[0]
    own = ask(prober, f"subscribe devices/{CULPRIT}/commands/#")
    foreign = ask(prober, f"subscribe devices/{victim}/commands/#")
    everything = ask(prober, "subscribe #")
    expect(own.get("code") in {0, 1}, f"{CULPRIT} may subscribe to its own commands")
    expect(foreign.get("code") == SUBSCRIPTION_REFUSED, f"SUBACK 0x80 for {victim}'s commands")
    expect(everything.get("code") == SUBSCRIPTION_REFUSED, "SUBACK 0x80 for #")

    forged = f"devices/{victim}/telemetry/forged"
    ask(prober, f"publish {forged} FORGED")
    ask(prober, f"publish devices/{CULPRIT}/telemetry/marker MARKER")
    # One connection, one order: when the operator has the second message, the first will not come any more.
    play.operator_sees(f"devices/{CULPRIT}/telemetry/marker", "MARKER", timeout_s=15)
    expect(not play.messages(forged, since_s=0), "no forged reading at the operator")
    denial = play.hears("broker", event="denied", id=CULPRIT, topic=forged, timeout_s=15).record["message"]
    ask(prober, "leave")
    return Observed(
        f"SUBACK 0x80 for {victim}'s commands and for #; a forged reading reached nobody. "
        f"The broker's log: {denial.removeprefix('denied: ')}",
        {"log": denial},
    )


def stranger(play: Play) -> Observed:
    """A stranger's certificate is refused, and so is none."""
    stage, broker = play.stage, play.running["broker"]
    stage.run("stranger-init", "birthmark init --station strangers --organization Demo --json")
    stage.run("stranger-issue", f"birthmark issue-operator {OPERATOR} --station strangers --out stranger --json")
    told = {}
    for who, options in {
        "another CA": f"--identity stranger/{OPERATOR}.pem",
        "no certificate": "--nobody",
    }.items():
        words = [play.broker, *options.split(), "--ca", "operator/ca.pem"]
        prober = stage.start("stranger", "python", PROBER, *words, listening=True)
        for version in ("1.2", "1.3"):
            answer = ask(prober, f"connect {version}")
            expect(not answer["accepted"], f"{who}: refused over TLS {version}")
            told[f"{who}, TLS {version}"] = answer["reason"]

    def logged() -> set[str]:
        records = [heard.record for heard in broker.heard()]
        return {record["reason"] for record in records if record.get("event") == "handshake_failed"}

    broker.until(lambda: len(logged()) == 2, "both reasons in the broker's log", timeout_s=15)
    return Observed(
        "another CA's certificate with the operator's name, and no certificate, each over TLS 1.2 and 1.3. "
        f"The broker's log: {', '.join(sorted(logged()))}",
        {"refused": told, "logged": sorted(logged())},
    )
