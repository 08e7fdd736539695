"""`birthmark-device export`: the identity as the PEM files that other MQTT clients take."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from birthmark.device import topics
from birthmark.device.console import Console, Parser, command
from birthmark.device.core_dumps import forbid_core_dumps
from birthmark.device.credentials import Credentials
from birthmark.device.durable import private_folder, write_durably
from birthmark.device.errors import ConfigurationError
from birthmark.device.options import add_state_option
from birthmark.device.pem import CERTIFICATE, block, read_blocks

if TYPE_CHECKING:
    import argparse

_EXAMPLES = """
birthmark-device export --state ./board-1 --out ./board-1-pem
"""


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add `export` to the commands of `birthmark-device`."""
    parser = command(
        commands, "export", _export, "write cert.pem, key.pem and ca.pem for another client", _EXAMPLES
    )
    add_state_option(parser)
    parser.add_argument(
        "--out", required=True, metavar="DIR", type=Path, help="a new or empty folder for the files"
    )


def _export(arguments: argparse.Namespace, console: Console) -> int:
    forbid_core_dumps()
    credentials = Credentials.from_folder(arguments.state)
    out: Path = arguments.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigurationError(
            f"could not export to {out}: it is there and not an empty folder",
            hint="name a folder that is not there yet",
        )
    keys = [
        (label, der)
        for label, der in read_blocks(credentials.pem_path.read_bytes())
        if label.endswith("PRIVATE KEY")
    ]
    private_folder(out)
    chain = (credentials.leaf_der, *credentials.issuing_der)
    write_durably(out / "ca.pem", _certificates(credentials.anchors_der), mode=0o644)
    write_durably(out / "cert.pem", _certificates(chain), mode=0o644)
    write_durably(out / "key.pem", b"".join(block(label, der) for label, der in keys), mode=0o600)
    attempt = _attempt(credentials, out)
    record = {
        "id": str(credentials.device_id),
        "cert": str(out / "cert.pem"),
        "key": str(out / "key.pem"),
        "ca": str(out / "ca.pem"),
        "try": attempt,
    }
    text = (
        f"wrote cert.pem, key.pem and ca.pem to {out}; this is a second copy of the key: mind it\ntry: {attempt}"
    )
    console.emit(record, text)
    return 0


def _certificates(certificates_der: tuple[bytes, ...]) -> bytes:
    return b"".join(block(CERTIFICATE, der) for der in certificates_der)


def _attempt(credentials: Credentials, out: Path) -> str:
    broker = credentials.broker
    options = {
        "-h": broker.host,
        "-p": str(broker.port),
        "-V": "mqttv311",
        "-i": str(credentials.device_id),
        "--cafile": str(out / "ca.pem"),
        "--cert": str(out / "cert.pem"),
        "--key": str(out / "key.pem"),
        "-q": "1",
        "-t": topics.telemetry(credentials.device_id, "try"),
        "-m": "hello",
    }
    words = ["mosquitto_pub", *(word for option in options.items() for word in option)]
    return shlex.join(words)
