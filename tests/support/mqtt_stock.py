"""amqtt as it comes, in a process of its own: the control beside each defect that the gateway closes.

It is set up as well as its documentation allows: TLS with client certificates, a plug-in that lets a client in
only if its certificate's CN is its client id, and one that keeps devices to their own topics.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from amqtt.broker import Broker
from amqtt.plugins.base import BaseAuthPlugin, BaseTopicPlugin
from support.patience import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Iterator

    from amqtt.contexts import Action
    from amqtt.session import Session
    from support.pki import Pki


class CertificateAuth(BaseAuthPlugin):
    """The client id is the certificate's CN."""

    async def authenticate(self, *, session: Session) -> bool | None:
        certificate = session.ssl_object.getpeercert() if session.ssl_object else None
        if not certificate:
            return False
        subject: Any = certificate["subject"]
        return session.client_id in [value for part in subject for key, value in part if key == "commonName"]


class OwnTopics(BaseTopicPlugin):
    """Devices keep to `devices/{id}/`; `free-*` and `alice` may do anything."""

    async def topic_filtering(
        self,
        *,
        session: Session | None = None,
        topic: str | None = None,
        action: Action | None = None,  # noqa: ARG002 - amqtt passes it by name
    ) -> bool | None:
        client_id = (session.client_id if session else None) or ""
        return client_id.startswith(("free-", "alice")) or (topic or "").startswith(f"devices/{client_id}/")


async def serve(folder: Path) -> None:
    """Answer each line on stdin: `new` starts a fresh broker, `connected` says whom the newest holds connected."""
    config = {
        "listeners": {
            "default": {
                "type": "tcp",
                "bind": "127.0.0.1:0",
                "ssl": True,
                "certfile": str(folder / "server.pem"),
                "keyfile": str(folder / "server.pem"),
                "cafile": str(folder / "clients.pem"),
            }
        },
        "plugins": {"support.mqtt_stock.CertificateAuth": {}, "support.mqtt_stock.OwnTopics": {}},
    }
    brokers: list[Broker] = []
    while line := await asyncio.to_thread(sys.stdin.readline):
        if line.strip() == "new":
            brokers.append(Broker(config))
            await brokers[-1].start()
            server: Any = brokers[-1]._servers["default"].instance
            answer: Any = server.sockets[0].getsockname()[1]
        else:
            sessions = [session for session, _ in brokers[-1].sessions.values()]
            answer = [session.client_id for session in sessions if session.transitions.state == "connected"]
        print(json.dumps(answer), flush=True)


@contextmanager
def stock_process(folder: Path, pki: Pki) -> Iterator[StockProcess]:
    """Run stock amqtt; it is killed at the end, since its shutdown may hang."""
    pki.write_broker_files(folder)
    (folder / "clients.pem").write_bytes(pki.root.pem + pki.issuing.pem)
    process = subprocess.Popen(
        [sys.executable, "-m", "support.mqtt_stock", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield StockProcess(folder, pki, process.stdin, process.stdout)
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        process.stdin.close()
        process.stdout.close()


@dataclass
class StockProcess:
    """A process in which brokers can be started."""

    folder: Path
    pki: Pki
    stdin: IO[str]
    stdout: IO[str]

    def ask(self, line: str) -> Any:
        self.stdin.write(line + "\n")
        self.stdin.flush()
        return json.loads(self.stdout.readline())

    def connected(self) -> list[str]:
        """The client ids of the sessions that the newest broker holds to be connected."""
        found: list[str] = self.ask("connected")
        return found


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
