"""A gateway with a shim in front, to run somebody else's MQTT 3.1.1 suite against.

`python -m support.interop_stand` makes a PKI, starts `birthmark-broker run`, and listens without TLS on loopback
until Ctrl-C. Every client id is a device of its own, allowed to do anything but to subscribe to `test/nosubscribe`
(docs/testing.md).
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from support.mqtt_world import ProcessWorld, process_world
from support.pki import Pki
from support.tls_shim import Identities, tls_shim

if TYPE_CHECKING:
    from collections.abc import Iterator

POLICY = b"""
[roles.anything]
publish = ["#"]
subscribe = ["#"]
withhold = ["nosubscribe", "test/nosubscribe"]

[roles.operator]
publish = ["#"]
subscribe = ["#"]

[[assignments]]
ou = "operator"
role = "operator"

[[assignments]]
cn = "*"
role = "anything"
"""


@contextmanager
def interop_stand(folder: Path, port: int = 0) -> Iterator[tuple[ProcessWorld, int]]:
    """Run both; yields the gateway, and the port of the shim."""
    pki = Pki.create()
    with (
        process_world(folder, pki, policy_toml=POLICY) as world,
        tls_shim(world.port, Identities(folder, pki), port) as shim_port,
    ):
        yield world, shim_port


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m support.interop_stand", description=__doc__)
    parser.add_argument("--port", type=int, default=1883, help="where to listen without TLS, on loopback")
    port = parser.parse_args().port
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job ignores SIGINT
        signal.signal(number, signal.default_int_handler)
    with (
        tempfile.TemporaryDirectory() as folder,
        interop_stand(Path(folder), port) as (world, shim_port),
        contextlib.suppress(KeyboardInterrupt),
    ):
        print(
            f"MQTT 3.1.1 on 127.0.0.1:{shim_port}, for the gateway on port {world.port}; Ctrl-C ends it",
            flush=True,
        )
        signal.pause()


if __name__ == "__main__":
    main()
