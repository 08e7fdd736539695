"""Steps: a device is revoked while it sends, cannot return, and everything is on record."""

from __future__ import annotations

import shutil
import signal
import time

from demo.narrator import Observed
from demo.play import BYSTANDERS, CULPRIT, GATEWAY, Play, ask, expect, milliseconds


def revoke(play: Play) -> Observed:
    """A board is revoked while it is sending."""
    stage = play.stage
    device = stage.start("device", "birthmark-device run --state bench/board-1 --simulate --interval 0.02 --json")
    play.running["device"] = device
    play.operator_sees(f"devices/{CULPRIT}/telemetry", '"count":', timeout_s=15)
    play.operator_sees(f"devices/{CULPRIT}/status", '"online":true', timeout_s=15)
    started_s = time.monotonic()
    answer = stage.run("revoke", f"birthmark revoke {CULPRIT} --reason keyCompromise --json")
    receipt = answer.records[0]["gateways"][0]
    expect(receipt["outcome"] == "done", f"a receipt from {GATEWAY}")
    expect([one["id"] for one in receipt["closed"]] == [CULPRIT], f"{CULPRIT} closed, and nobody else")
    closed = receipt["closed"][0]
    expect(closed["sessions_closed"] == 1, f"one session of {CULPRIT} closed")
    expect(closed["will_suppressed"], "its last will suppressed")
    expect(closed["retained_presence_purged"], "its retained presence purged")
    expect(
        play.messages(f"devices/{CULPRIT}/telemetry", since_s=started_s), "readings until the moment of revocation"
    )
    cut = device.wait_for(
        "the connection cut",
        lambda r: r.get("event") in {"disconnected", "refused"},
        timeout_s=15,
        since_s=started_s,
    )
    presence = f"devices/{CULPRIT}/status"
    cleared = play.hears("watch", topic=presence, payload="", timeout_s=15, since_s=started_s)
    presences = [heard.record["payload"] for heard in play.messages(presence, since_s=started_s)]
    expect(presences == [""], "no last will: the presence was cleared, and nothing else said about it")
    return Observed(
        f"receipt from {GATEWAY} over MQTT {milliseconds(answer.elapsed_s):.0f} ms after the command: CRL "
        f"{receipt['crl_number']} in force, 1 live session closed in {closed['elapsed_ms']:.1f} ms, "
        "will suppressed, presence cleared. "
        f"The device: {cut.record['reason'].rpartition(': ')[2]}",
        {
            "receipt": receipt,
            "command_to_receipt_ms": milliseconds(answer.elapsed_s),
            "device": cut.record,
            "presence_cleared_after_ms": milliseconds(cleared.at_s - started_s),
        },
    )


def no_return(play: Play) -> Observed:
    """It cannot return: full handshake, resumed session, its own client."""
    prober = play.running["prober"]
    told = {}
    for version in ("1.2", "1.3"):
        resumed = ask(prober, f"resume {version}")
        expect(resumed["resumed"], f"a TLS {version} session resumed: OpenSSL itself has no objection")
        expect(not resumed["accepted"], f"the resumed TLS {version} session refused")
        full = ask(prober, f"connect {version}")
        expect(not full["accepted"], f"a full TLS {version} handshake refused")
        told[version] = {"resumed": resumed["reason"], "full": full["reason"]}
    refused = play.hears("device", event="refused", timeout_s=20)
    peer_refused = play.hears("broker", event="peer_refused", reason="revoked", timeout_s=15)
    # The operator is listening still, and has heard nothing of it since it was cut off.
    play.operator_sees(f"devices/{BYSTANDERS[0]}/telemetry", "celsius", timeout_s=15, since_s=refused.at_s)
    cleared = play.hears("watch", topic=f"devices/{CULPRIT}/status", payload="", timeout_s=15)
    expect(not play.messages(f"devices/{CULPRIT}", since_s=cleared.at_s), f"not a word from {CULPRIT} since")
    return Observed(
        "TLS 1.2 and 1.3, resumed and full, and its own client: refused. "
        f"The broker's log: {_cause(peer_refused.record['message'])}",
        {"refused": told, "device": refused.record, "log": peer_refused.record["message"]},
    )


def _cause(message: str) -> str:
    """Return the cause in `refused the client at ...: could not ...: <cause> (<hint>)`."""
    return message.rsplit(": ", maxsplit=1)[-1].partition(" (`")[0]


def others(play: Play) -> Observed:
    """The other boards did not notice."""
    facts = {}
    for number, device in enumerate(BYSTANDERS, 1):
        heard = [h.record for h in play.running["boards"].heard() if h.record.get("board") == number]
        expect(sum(r["event"] == "online" for r in heard) == 1, f"{device} online once")
        expect(not any(r["event"] in {"offline", "attempt_failed"} for r in heard), f"{device} never offline")
        facts[device] = sum(r["event"] == "telemetry" for r in heard)
    text = ", ".join(f"{device} sent {count} readings" for device, count in facts.items())
    return Observed(f"{text}, on one connection each", {"readings": facts})


def audit(play: Play) -> Observed:
    """The audit log tells it all, and is unbroken."""
    verdict = play.stage.run("audit-verify", "birthmark audit verify --json").records[0]
    expect(verdict["sound"], "a sound audit log")
    entries = play.stage.run("audit-show", "birthmark audit show --json").records
    revoked = [entry for entry in entries if (entry["action"], entry["subject"]) == ("revoke", CULPRIT)]
    expect(len(revoked) == 1, f"the revocation of {CULPRIT} in the log")
    forged = play.stage.folder / "forged"
    shutil.copytree(play.stage.folder / "station", forged)
    log = forged / "audit.jsonl"
    log.write_text(log.read_text(encoding="utf-8").replace(CULPRIT, BYSTANDERS[0]), encoding="utf-8")
    caught = play.stage.run("audit-forged", "birthmark audit verify --station forged --json", expected=6).records[
        0
    ]
    expect(caught["problems"], "a forged log caught")
    return Observed(
        f"{verdict['entries']} entries, chained, sound; with {CULPRIT} changed to {BYSTANDERS[0]} in it: "
        f"{caught['problems'][0]['text']}",
        {"entries": verdict["entries"], "forged": caught["problems"][0]["text"]},
    )


def goodbye(play: Play) -> Observed:
    """Everything stops when it is told to."""
    codes = {}
    for name in ("device", "prober", "boards", "board", "watch", "broker"):
        child = play.running[name]
        child.signal(signal.SIGTERM)
        codes[name] = child.finish(timeout_s=15).exit_code
    expect(codes["broker"] == codes["boards"] == codes["board"] == 0, f"exit code 0 after SIGTERM: {codes}")
    goodbyes = [
        heard.record["topic"]
        for heard in play.running["watch"].heard()
        if '"goodbye"' in str(heard.record.get("payload", ""))
    ]
    expect(all(f"devices/{device}/status" in goodbyes for device in BYSTANDERS), "a goodbye of both boards")
    return Observed("the boards said goodbye, the broker stopped with exit code 0", {"exit_codes": codes})
