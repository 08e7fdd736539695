"""How fast each client may send: two token buckets for each identity, messages and bytes.

Rules:

- A bucket holds at most one second's worth: after a pause a client may send that at once, and not more.
- What has been read cannot be unread: it is taken from the bucket, below zero if need be, and the answer is how
  long to read nothing from the client until it has made good. Nothing is dropped; TCP slows the client down.
- The buckets belong to the identity, not to the connection: connecting again brings no fresh ones.

Pure: the clock is passed in.
"""

from __future__ import annotations

MAX_METERS = 4_096
"""Identities remembered; beyond it, those that have made good are forgotten."""


class TokenBucket:
    """A bucket that fills at a rate.

    Args:
        rate_per_s: tokens a second, and how many it holds; 0: it never runs dry.
        now_s: a clock that never goes back.
    """

    __slots__ = ("_balance", "_rate_per_s", "_since_s")

    def __init__(self, rate_per_s: float, now_s: float) -> None:
        self._rate_per_s = rate_per_s
        self._balance = rate_per_s
        self._since_s = now_s

    def take(self, count: int, now_s: float) -> float:
        """Take tokens; return for how many seconds nothing more may be taken."""
        rate = self._rate_per_s
        if not rate:
            return 0.0
        self._balance = min(rate, self._balance + (now_s - self._since_s) * rate) - count
        self._since_s = now_s
        return max(0.0, -self._balance / rate)


class Meter:
    """What one identity sends."""

    __slots__ = ("_bytes", "_messages", "busy_until_s")

    def __init__(self, messages_per_s: float, bytes_per_s: float, now_s: float) -> None:
        self._messages = TokenBucket(messages_per_s, now_s)
        self._bytes = TokenBucket(bytes_per_s, now_s)
        self.busy_until_s = now_s

    def take(self, messages: int, size_bytes: int, now_s: float) -> float:
        """Count what has been read; return for how many seconds nothing more may be."""
        delay_s = max(self._messages.take(messages, now_s), self._bytes.take(size_bytes, now_s))
        self.busy_until_s = now_s + delay_s + 1.0  # then both buckets are full, and this meter like a new one
        return delay_s


class Meters:
    """The meters of all identities.

    Args:
        messages_per_s: for each; 0: any number.
        bytes_per_s: for each; 0: any number.
    """

    def __init__(self, messages_per_s: float, bytes_per_s: float) -> None:
        self._messages_per_s = messages_per_s
        self._bytes_per_s = bytes_per_s
        self._meters: dict[str, Meter] = {}

    def __len__(self) -> int:
        return len(self._meters)

    def of(self, identity: str, now_s: float) -> Meter | None:
        """Return the meter of an identity; None where nothing is limited."""
        if not self._messages_per_s and not self._bytes_per_s:
            return None
        meter = self._meters.get(identity)
        if meter is None:
            if len(self._meters) >= MAX_METERS:
                self._meters = {key: held for key, held in self._meters.items() if held.busy_until_s > now_s}
            meter = self._meters[identity] = Meter(self._messages_per_s, self._bytes_per_s, now_s)
        return meter
