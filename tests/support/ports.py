"""Ports for programs that cannot say which one they were given, or that have to come back on the same one.

A port that was free a moment ago may be somebody else's by the time it is listened on, if it is one of those that
the kernel gives to whoever asks for any. These are not.
"""

from __future__ import annotations

import secrets
import socket
from pathlib import Path

HOST = "127.0.0.1"
_LOWEST = 10_000
_TRIES = 1_000


def steady_port() -> int:
    """Return a port of loopback that nobody listens on, and that nobody gets by chance."""
    given_away = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if given_away <= _LOWEST:  # there is hardly another
        with socket.create_server((HOST, 0)) as listening:
            return int(listening.getsockname()[1])
    for _ in range(_TRIES):
        port = _LOWEST + secrets.randbelow(given_away - _LOWEST)
        try:
            socket.create_server((HOST, port)).close()
        except OSError:
            continue
        return port
    raise AssertionError("no port is free")
