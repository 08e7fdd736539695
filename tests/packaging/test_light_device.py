"""The device part imports in a process where the other parts and their libraries do not exist."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

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
    "sqlalchemy",
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
        timeout=60,
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
