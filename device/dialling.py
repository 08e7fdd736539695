"""A TCP connection to a name that may have several addresses, IPv6 and IPv4 (what a device needs of RFC 8305).

Rules:

- The addresses are tried in the order in which the resolver gives them (RFC 6724), the families in turn, so that
  one which leads nowhere costs little.
- The next one is begun `STAGGER_S` after the last, or at once when one fails; the first that is there is taken.
- All of it together is bounded by the time-out. The name's resolution is not: nothing can end it.
"""

from __future__ import annotations

import errno
import itertools
import os
import select
import socket
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

STAGGER_S: Final = 0.25
MAX_ADDRESSES: Final = 8

_Address = tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int]]


def dial(host: str, port: int, *, timeout_s: float) -> socket.socket:
    """Return a connected socket, with `timeout_s` as its time-out.

    Raises:
        OSError, UnicodeError: the name is not known, or what the address that failed last said; `TimeoutError` if
            none answered at all.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = in_turn((info[0], info[4]) for info in found)  # type: ignore[misc]
    trying: dict[int, socket.socket] = {}
    failure: OSError | None = None
    poll = select.poll()
    give_up_at = time.monotonic() + timeout_s
    next_at = time.monotonic()
    try:
        while addresses or trying:
            now = time.monotonic()
            if now >= give_up_at:
                break
            if addresses and (now >= next_at or not trying):
                next_at = now + STAGGER_S
                try:
                    begun = _begin(*addresses.pop(0))
                except OSError as error:
                    failure = error
                    next_at = now
                    continue
                trying[begun.fileno()] = begun
                poll.register(begun, select.POLLOUT)
            until = min(give_up_at, next_at) if addresses else give_up_at
            for descriptor, _ in poll.poll(max(0.0, until - time.monotonic()) * 1000):
                ended = trying.pop(descriptor)
                poll.unregister(descriptor)
                code = ended.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not code:
                    ended.settimeout(timeout_s)
                    return ended
                ended.close()
                failure = OSError(code, os.strerror(code))
                next_at = time.monotonic()
    finally:
        for one in trying.values():
            one.close()
    # A refusal that came says more than the silence of another address.
    raise failure or TimeoutError(errno.ETIMEDOUT, "timed out")


def in_turn(addresses: Iterable[_Address]) -> list[_Address]:
    """Return addresses with their families in turn, beginning with the first one's (RFC 8305 §4)."""
    families: dict[int, list[_Address]] = defaultdict(list)
    for address in dict.fromkeys(addresses):
        families[address[0]].append(address)
    rounds = itertools.zip_longest(*families.values())
    return [address for one in rounds for address in one if address is not None][:MAX_ADDRESSES]


def _begin(family: socket.AddressFamily, address: tuple[object, ...]) -> socket.socket:
    begun = socket.socket(family, socket.SOCK_STREAM)
    begun.settimeout(0)
    code = begun.connect_ex(address)
    if code in (0, errno.EINPROGRESS):
        return begun
    begun.close()
    raise OSError(code, os.strerror(code))
