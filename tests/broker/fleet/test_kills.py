"""What a gateway has said of a fleet's policy and CRL holds when it is killed with its next breath."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

from support import mqtt_client as mqtt
from support.fleet import DEVICES, POLICY, signed_policy, text_sha256, write_gateway
from support.mqtt_client import RawClient, client_context
from support.mqtt_process import broker_process
from support.patience import PATIENCE_S

from birthmark.device.fleet_policy import PolicyReceipt
from birthmark.device.messages import Receipt

if TYPE_CHECKING:
    from pathlib import Path

    from support.pki import Pki


def shown(config: Path, *options: str) -> str:
    """What `birthmark-broker policy show` says."""
    command = [sys.executable, "-m", "birthmark.broker", "policy", "show", "--config", str(config), *options]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE_S).stdout


def test_a_version_that_was_answered_is_in_force_after_a_kill(tmp_path: Path, pki: Pki) -> None:
    config = write_gateway(tmp_path / "gw", pki)
    operator = client_context(pki.operator().write(tmp_path / "alice.pem"), config.parent / "root.pem")
    policies = {number: POLICY.replace(DEVICES, f"{DEVICES}# {number}\n") for number in (1, 2)}
    before = json.loads(shown(config, "--json"))
    assert (before["version"], before["source"]) == (0, str(config.parent / "policy.toml"))
    with broker_process(config) as broker:
        with RawClient.connect(broker.port, operator) as alice:
            alice.handshake(mqtt.connect("alice")).subscribed(("gateway/gw-1/policy-receipts", 0))
            for number, text in policies.items():
                alice.send(mqtt.publish("fleet/policy", signed_policy(pki.issuing, number, text)))
                receipt = PolicyReceipt.from_bytes(alice.read_delivery().payload)
                assert (receipt.outcome, receipt.version) == ("installed", number)
        broker.process.kill()
        broker.process.wait(PATIENCE_S)
    found = json.loads(shown(config, "--json"))
    assert (found["version"], found["sha256"]) == (2, text_sha256(policies[2]))
    assert shown(config, "--text") == policies[2]
    with broker_process(config) as broker, RawClient.connect(broker.port, operator) as alice:
        alice.handshake(mqtt.connect("alice")).subscribed(("gateway/gw-1/policy-receipts", 0))
        alice.send(mqtt.publish("fleet/policy", signed_policy(pki.issuing, 2, POLICY)))
        while (told := PolicyReceipt.from_bytes(alice.read_delivery().payload)).outcome == "installed":
            pass  # the one of before, retained
        assert told.reason.startswith("conflict: ")


def test_a_crl_of_the_fleet_that_was_answered_is_in_force_after_a_kill(tmp_path: Path, pki: Pki) -> None:
    config = write_gateway(tmp_path / "gw", pki)
    operator = client_context(pki.operator().write(tmp_path / "alice.pem"), config.parent / "root.pem")
    lost = pki.device("lost")
    device = client_context(lost.write(tmp_path / "lost.pem"), config.parent / "root.pem")
    with broker_process(config) as broker:
        with RawClient.connect(broker.port, operator) as alice:
            alice.handshake(mqtt.connect("alice")).subscribed(("gateway/gw-1/receipts", 0))
            crl = pki.issuing.crl([lost.cert_serial], number=2)
            alice.send(mqtt.publish(f"fleet/crl/{pki.issuing.issuer_id}", crl))
            assert Receipt.from_bytes(alice.read_delivery().payload).crl_number == 2
        broker.process.kill()
        broker.process.wait(PATIENCE_S)
    with broker_process(config) as broker, RawClient.connect(broker.port, device) as client:
        assert client.read() == mqtt.connack(5)
