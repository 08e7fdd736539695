"""A TCP connection to an upstream, without the event loop waiting for a name server."""

from __future__ import annotations

import asyncio
import socket
import threading

from birthmark.device.dialling import dial


async def dialled(host: str, port: int, timeout_s: float) -> socket.socket:
    """Return a connected, non-blocking socket.

    In a thread of its own that nobody waits for: nothing can end the resolution of a name.

    Raises:
        OSError, UnicodeError: as `dial`.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[socket.socket] = loop.create_future()

    def tell(found: socket.socket | Exception) -> None:
        if outcome.done():  # nobody waits any more
            if isinstance(found, socket.socket):
                found.close()
        elif isinstance(found, Exception):
            outcome.set_exception(found)
        else:
            outcome.set_result(found)

    def work() -> None:
        found: socket.socket | Exception
        try:
            found = dial(host, port, timeout_s=timeout_s)
            found.settimeout(0)
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except (OSError, UnicodeError) as error:
            found = error
        try:
            loop.call_soon_threadsafe(tell, found)
        except RuntimeError:  # the loop is gone
            if isinstance(found, socket.socket):
                found.close()

    threading.Thread(target=work, name=f"dial {host}", daemon=True).start()
    return await outcome
