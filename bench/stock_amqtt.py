"""amqtt as it comes, as a peer of the benchmark: its TLS, and plug-ins that say what the other brokers' ACLs say.

`python -m bench.stock_amqtt FOLDER PORT` runs until it is ended.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amqtt.broker import Broker
from amqtt.plugins.base import BaseAuthPlugin, BaseTopicPlugin

from bench.fleet_pki import HOST

if TYPE_CHECKING:
    from amqtt.contexts import Action
    from amqtt.session import Session


class CertificateAuth(BaseAuthPlugin):  # type: ignore[misc, unused-ignore]
    """The client id is the certificate's CN."""

    async def authenticate(self, *, session: Session) -> bool | None:
        """Compare the two."""
        certificate = session.ssl_object.getpeercert() if session.ssl_object else None
        subject: Any = certificate["subject"] if certificate else ()
        return session.client_id in [value for part in subject for key, value in part if key == "commonName"]


class Acl(BaseTopicPlugin):  # type: ignore[misc, unused-ignore]
    """Devices keep to their own topics, operators read all of them."""

    async def topic_filtering(
        self,
        *,
        session: Session | None = None,
        topic: str | None = None,
        action: Action | None = None,  # noqa: ARG002 - amqtt passes it by name
    ) -> bool | None:
        """Decide about one topic."""
        client_id, topic = (session.client_id if session else None) or "", topic or ""
        if client_id.startswith("op-"):
            return topic.startswith(("devices/", "fleet/announcements/"))
        return topic.startswith((f"devices/{client_id}/", "fleet/announcements/"))


async def main(folder: Path, port: int) -> None:
    """Serve."""
    config = {
        "listeners": {
            "default": {
                "type": "tcp",
                "bind": f"{HOST}:{port}",
                "max_connections": 0,
                "ssl": True,
                "certfile": str(folder / "server.pem"),
                "keyfile": str(folder / "server.pem"),
                "cafile": str(folder / "chain.pem"),
            }
        },
        "plugins": {"bench.stock_amqtt.CertificateAuth": {}, "bench.stock_amqtt.Acl": {}},
    }
    await Broker(config).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
