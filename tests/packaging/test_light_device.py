"""The device part imports in a process where the other parts and their libraries do not exist."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
from support.patience import PATIENCE_S
from support.repository import tracked

# Runs in a fresh interpreter: blocks, imports every module of the part, and tells what came in with them.
PROBE = textwrap.dedent(
    """
    import importlib, json, sys

    blocked = set(json.loads(sys.argv[1]))

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            parts = name.split(".")
            if parts[0] in blocked or ".".join(parts[:2]) in blocked:
                raise ModuleNotFoundError(f"blocked: {name}", name=name)
            return None

    sys.meta_path.insert(0, Blocker())
    for name in json.loads(sys.argv[2]):
        importlib.import_module(name)
    print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
    """
)

OTHERS = ["birthmark.broker", "birthmark.provisioning", "birthmark.firmware_sim"]
HEAVY = [
    "amqtt",
    "cbor2",
    "tinydb",
    "typer",
    "orjson",
    "pkcs11",
    "psycopg",
    "segno",
    "sqlalchemy",
    "uvloop",
    "yaml",
    "websockets",
    "pytest",
    "transitions",
]


def probe(blocked: list[str], modules: list[str]) -> set[str]:
    answer = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE, json.dumps(blocked), json.dumps(modules)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert answer.returncode == 0, answer.stderr
    return set(json.loads(answer.stdout))


def test_every_module_of_the_device_imports_without_the_other_parts_libraries() -> None:
    modules = [
        "birthmark." + path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in tracked()
        if path.startswith("device/") and path.endswith(".py") and not path.endswith("__main__.py")
    ]
    assert "birthmark.device.identity" in modules
    loaded = probe(OTHERS + HEAVY, modules)
    assert loaded.isdisjoint(HEAVY)


def test_what_both_ends_agree_on_needs_no_library_at_all() -> None:
    light = ["errors", "escape", "identity", "topics", "messages", "console", "durable"]
    libraries = ["paho", "cryptography", "serial"]
    loaded = probe(
        OTHERS + HEAVY + libraries, ["birthmark.device", *(f"birthmark.device.{name}" for name in light)]
    )
    assert loaded.isdisjoint(libraries)


def test_the_credentials_are_read_without_cryptography() -> None:
    # A Pi starts its client in a fraction of the time that importing cryptography takes.
    loaded = probe([*OTHERS, *HEAVY, "cryptography"], ["birthmark.device.pem", "birthmark.device.credentials"])
    assert "cryptography" not in loaded


# What a connecting client loads: the time from its start to a connection is mostly loading, and every device pays
# at every start for a module more. What is loaded of the standard library beyond paho's share is listed as well.
CONNECTING = {
    "backoff",
    "certificate_facts",
    "client",
    "clock",
    "connection_checks",
    "connection_errors",
    "credentials",
    "dialling",
    "dispatch",
    "durable",
    "errors",
    "escape",
    "events",
    "frozen",
    "handlers",
    "identity",
    "json_fields",
    "keepalive",
    "mqtt",
    "outbound",
    "outbox",
    "outbox.settings",
    "pem",
    "presence",
    "publication",
    "received",
    "returning",
    "route",
    "server_probe",
    "settings",
    "tls",
    "topics",
    "worker",
}
CONNECTING_STANDARD = {"fcntl", "hmac", "secrets"}
ENROLLED = CONNECTING | {
    "agent",
    "agent.slots",
    "agent.storage",
    "link",
    "link.bundle",
    "link.cbor",
    "link.schema",
    "link.vocabulary",
    "record",
    "renewal",
    "renewal.connection",
    "renewal.messages",
    "renewal.renewer",
    "renewal.schedule",
    "renewal.store",
}
ENROLLED_STANDARD = CONNECTING_STANDARD | {"_heapq", "_queue", "heapq", "queue"}
LOADED = """
import json, sys, importlib
import paho.mqtt.client
before = set(sys.modules)
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print(json.dumps(sorted(set(sys.modules) - before)))
"""


@pytest.mark.parametrize(
    ("modules", "own", "standard"),
    [
        ("client credentials", CONNECTING, CONNECTING_STANDARD),
        (
            "client credentials link.bundle record renewal.connection renewal.renewer renewal.store",
            ENROLLED,
            ENROLLED_STANDARD,
        ),
    ],
    ids=["files", "enrolled"],
)
def test_a_client_loads_little_beside_paho(modules: str, own: set[str], standard: set[str]) -> None:
    names = json.dumps([f"birthmark.device.{name}" for name in modules.split()])
    answer = subprocess.run(
        [sys.executable, "-c", LOADED, names], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = set(json.loads(answer.stdout)) - {"birthmark", "birthmark.device"}
    ours = {name.removeprefix("birthmark.device.") for name in loaded if name.startswith("birthmark.")}
    assert ours <= own, "loaded at every start of a device: is it needed there?"
    others = {name for name in loaded if not name.startswith("birthmark.")}
    assert others <= standard, "loaded at every start of a device: is it needed there?"
    assert not {"dataclasses", "inspect"} & others
