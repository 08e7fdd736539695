"""One upstream: its servers in turn, the link while there is one, and what is said of it.

Rules:

- The servers are tried in turn, without a wait between them; the one that worked last comes first. After a round
  in vain, or a connection lost, there is a wait that grows, with jitter (`device/backoff.py`).
- A message that ends every connection is found and set aside (`spool.py`): first by one at a time, then by three
  connections that worked until this message was sent, and that the upstream itself ended, saying nothing more.
  The waits start anew then.
- Whatever goes wrong with an upstream is a line in the log, once for each cause, and an alarm while it lasts; it
  never stops the gateway.
- New credentials are tried at once. SIGHUP does the same: it cuts a wait short.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

from birthmark.broker.alarms import Alarm
from birthmark.broker.stream import TlsStream
from birthmark.broker.upstream.credentials import read_credentials
from birthmark.broker.upstream.dialling import dialled
from birthmark.broker.upstream.link import Link
from birthmark.broker.upstream.spool import Spool
from birthmark.device import connection_errors as errors
from birthmark.device.backoff import Backoff, RetryTimer
from birthmark.device.errors import UnreachableError
from birthmark.device.escape import escaped
from birthmark.device.messages import UpstreamState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import datetime

    from birthmark.broker.delivery import Exchange
    from birthmark.broker.packets import Will
    from birthmark.broker.stream import Flusher
    from birthmark.broker.upstream.packets import TopicNamesAbove
    from birthmark.broker.upstream.settings import UpstreamSettings
    from birthmark.device.credentials import BrokerAddress
    from birthmark.device.errors import ConnectionFailedError

CONNECT_TIMEOUT_S = 10.0
"""For TCP, and from there to the CONNACK."""
FIRST_WAIT_S = 0.5
FIRST_WAIT_REFUSED_S = 5.0
LONGEST_WAIT_REFUSED_S = 300.0
CAREFUL_AFTER = 2
"""Connections in a row that ended without an acknowledgement of what was sent."""
SET_ASIDE_AFTER = 3
"""Connections in a row that worked, and ended when this one message was sent."""
UNSETTLED_AFTER = 3
"""Connections in a row that ended before our subscriptions stood."""

_log = logging.getLogger(__name__)


class Upstream:
    """One upstream.

    Args:
        settings: its table.
        exchange: the broker's.
        topics: names known from other links.
        flusher: shared by the streams of all upstreams.
        filling: see `Spool`.

    Attributes:
        on_change: called when the link comes or goes.
        make_will: what the upstream is to publish when it loses us.
        on_fleet: takes what comes down for the gateway itself (topic, payload, whether it came as retained).
        caught_up: set once the subscriptions stand and what was retained for them has come; not unset again.
        stands: set once it is caught up, or known not to be reached; not unset again.
    """

    def __init__(
        self,
        settings: UpstreamSettings,
        exchange: Exchange,
        topics: TopicNamesAbove,
        flusher: Flusher,
        filling: set[Spool],
    ) -> None:
        self.settings = settings
        self.credentials = read_credentials(settings)
        self.spool = Spool(settings, exchange, filling)
        self.on_change: Callable[[], None] = lambda: None
        self.make_will: Callable[[], Will | None] = lambda: None
        self.on_fleet: Callable[[str, bytes, bool], bool] = lambda _topic, _payload, _retain: False
        self.caught_up = asyncio.Event()
        self.stands = asyncio.Event()
        self.link: Link | None = None
        """The link that is up."""
        self.reason = ""
        """Why it is down; empty while it is up, and before the first attempt."""
        self.refused = ""
        """The message that was set aside last, in words; empty: none since the credentials were read."""
        self.refused_count = 0
        """How many were set aside since then."""
        self._exchange = exchange
        self._topics = topics
        self._flusher = flusher
        self._again = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._next = 0
        self._said: set[str] = set()
        self._stuck = self._unsettled = 0
        self._forwarded_before = 0
        self._since_s = 0.0
        self._changed_at = 0.0
        """When the link came or went last, in seconds since 1970; 0: it never was up."""
        self._also: tuple[str, ...] = ()
        longest_s = settings.longest_wait_s
        self._retry = RetryTimer(
            unreachable=Backoff(min(FIRST_WAIT_S, longest_s), longest_s),
            refused=Backoff(min(FIRST_WAIT_REFUSED_S, longest_s), max(LONGEST_WAIT_REFUSED_S, longest_s)),
        )

    # --- for the gateway ---------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.settings.name)

    def start(self) -> None:
        """Connect, and stay connected."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self, grace_s: float) -> None:
        """End: with a goodbye once all has gone up, or without after `grace_s`, for the will to be published."""
        link = self.link
        if link is not None:
            try:
                await asyncio.wait_for(self.spool.emptied(), grace_s)
            except TimeoutError:
                link.cut()
            else:
                link.close()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def reload(self) -> None:
        """Read the credentials again, and connect with them. Raises `ConfigurationError`, and changes nothing."""
        self.credentials = read_credentials(self.settings)
        self.refused, self.refused_count = "", 0
        self._again.set()
        if self.link is not None:
            self.link.close()

    def state(self) -> UpstreamState:
        """Return what the gateway's status says of it."""
        return UpstreamState(
            name=self.name,
            connected=self.link is not None,
            since=self._changed_at,
            server=str(self.settings.servers[self._next]),
            spooled=self.spool.session.waiting_count,
            reason=self.reason,
        )

    def ask_for(self, filters: Iterable[str]) -> None:
        """Subscribe to these filters too, by their names at the upstream, in place of those asked for before."""
        self._also = tuple(filters)
        if self.link is not None:
            self.link.subscribe()

    def wanted(self) -> tuple[str, ...]:
        """Return the filters to subscribe to."""
        return tuple(dict.fromkeys((*self.settings.mapping.subscriptions(), *self._also)))

    def figures(self) -> dict[str, int]:
        """Return the numbers for `$SYS` and the gateway's status."""
        spool = self.spool
        return {
            "connected": int(self.link is not None),
            "spooled": spool.session.waiting_count,
            "spooled_bytes": spool.session.queued_bytes + spool.session.inflight_bytes,
            "forwarded": spool.forwarded,
            "dropped": spool.dropped,
        }

    def alarms(self, now: datetime) -> list[Alarm]:
        """Return what about it needs a person."""
        found = self.credentials.alarms(self.name, now)
        hint = "docs/upstream.md says what each reason means"
        if self.reason:
            message = f"the upstream {self.name} is down: {self.reason}"
            if self._unsettled >= UNSETTLED_AFTER:
                message += "; each time before it granted our subscriptions: it may not allow one of them"
            elif self.spool.is_careful:
                message += "; each time before it took what was sent: one message alone is tried at a time"
            found.append(Alarm("upstream-down", message, hint, logging.ERROR))
        if self.link is not None and self.link.refused:
            filters = ", ".join(escaped(topic_filter) for topic_filter in self.link.refused)
            message = f"the upstream {self.name} does not let us subscribe to {filters}"
            refused_hint = "look at our rights there, or at `down` in broker.toml"
            found.append(Alarm("upstream-refuses", message, refused_hint))
        if self.refused:
            were = "1 message was" if self.refused_count == 1 else f"{self.refused_count} messages were"
            message = (
                f"the upstream {self.name} ends connections over messages: {were} dropped, the last {self.refused}"
            )
            refused_hint = "allow it there, or set max_topic_bytes or max_payload_bytes; SIGHUP ends this alarm"
            found.append(Alarm("upstream-refused-message", message, refused_hint))
        if self.spool.is_filling:
            verb = "stops publishers" if self.spool.holds else "drops messages"
            message = f"the spool for the upstream {self.name} is full and {verb}"
            found.append(Alarm("upstream-spool-full", message, "bring the upstream back; or raise spool_messages"))
        return found

    # --- for the link ------------------------------------------------------------------------------------

    def will(self) -> Will | None:
        """What the upstream publishes when it loses us."""
        return self.make_will()

    def take_for_fleet(self, topic: str, payload: bytes, *, retain: bool) -> bool:
        """Take a message that is for the gateway itself; return whether it is."""
        return self.settings.fleet and self.on_fleet(topic, payload, retain)

    def has_settled(self) -> None:
        """The subscriptions stand, and what was retained for them has come."""
        self.caught_up.set()
        self.stands.set()

    def let_in(self, link: Link, *, is_known: bool) -> None:
        """CONNECT was accepted."""
        self.link = link
        self._changed_at = time.time()
        self._since_s = asyncio.get_running_loop().time()
        self._forwarded_before = self.spool.forwarded
        self.reason = ""
        self._said.clear()
        waiting = self.spool.session.waiting_count
        what = "with our session" if is_known else "with a new session"
        _log.info(
            "connected to the upstream %s at %s, %s; %s messages wait to go up",
            self.name,
            self.settings.servers[self._next],
            what,
            waiting,
            extra={"fields": {"event": "upstream_connected", "upstream": self.name, "spooled": waiting}},
        )
        if not is_known and self.spool.granted:
            _log.warning(
                "the upstream %s has forgotten our session: subscribing anew, sending again what it may not have",
                self.name,
                extra={"fields": {"event": "upstream_forgot", "upstream": self.name}},
            )
        self.on_change()

    # --- the loop ----------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            try:
                error, held_s = await self._round()
            except Exception:  # noqa: BLE001 - a defect here must not be the end of the upstream
                _log.exception("a defect in connecting to the upstream %s", self.name)
                self._exchange.counters.defects += 1
                error, held_s = UnreachableError(f"could not connect to the upstream {self.name}: a defect"), 0.0
            wait_s = self._retry.wait_s(error, connected_for_s=held_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._again.wait(), wait_s)
            self._again.clear()

    async def _round(self) -> tuple[ConnectionFailedError, float]:
        """Try each server once, or until a connection has come and gone; return how the last one ended."""
        servers, reasons, held_s = self.settings.servers, [], 0.0
        error: ConnectionFailedError | None = None
        for _ in servers:
            error, held_s = await self._connect(servers[self._next])
            if held_s:
                reasons = [error.message]
                break
            reasons.append(error.message)
            self._next = (self._next + 1) % len(servers)
            self._say(error)
        assert error is not None  # noqa: S101 - there is at least one server
        reason = "; ".join(dict.fromkeys(reasons))
        if self._again.is_set():
            return error, held_s  # we have ended it ourselves, and connect at once
        if held_s:
            self._say(error)
        has_changed = reason != self.reason
        self.reason = reason
        self.stands.set()
        if has_changed:
            self.on_change()
        return error, held_s

    def _say(self, error: ConnectionFailedError) -> None:
        """Log a failure, once for each cause until it works again."""
        if error.message in self._said:
            return
        self._said.add(error.message)
        fields = {"event": "upstream_failed", "upstream": self.name, "check": error.check, "reason": error.message}
        _log.warning(
            "upstream %s: %s (%s); %s messages wait, and it is tried again by itself",
            self.name,
            error.message,
            error.hint,
            self.spool.session.waiting_count,
            extra={"fields": fields},
        )

    async def _connect(self, server: BrokerAddress) -> tuple[ConnectionFailedError, float]:
        """Connect to a server, and stay; return why it ended, and for how long it held (0: not at all)."""
        loop = asyncio.get_running_loop()
        credentials = self.credentials
        link = Link(self, server, self._exchange, self._topics)
        try:
            sock = await dialled(server.host, server.port, CONNECT_TIMEOUT_S)
        except (OSError, UnicodeError) as error:
            return errors.explained(error, link.around), 0.0
        try:
            wrapped = credentials.context.wrap_socket(
                sock, server_hostname=server.host, do_handshake_on_connect=False
            )
        except (OSError, ValueError) as error:  # it is gone already, or its name is none
            sock.close()
            return errors.explained(OSError(str(error)), link.around), 0.0
        link.stream = TlsStream(loop, wrapped, self._flusher, str(server), link)
        link.stream.start()
        try:
            try:
                await asyncio.wait_for(asyncio.shield(link.accepted), CONNECT_TIMEOUT_S)
            except TimeoutError:
                link.overdue(CONNECT_TIMEOUT_S)
                return await link.ended, 0.0
            if self.link is not link:
                return await link.ended, 0.0
            ended = await link.ended
            self._exchange.counters.upstream_lost += 1
            self._look_for_stumbling(link)
            return ended, max(loop.time() - self._since_s, 0.001)
        finally:
            if self.link is link:
                self.link = None
                self._changed_at = time.time()
            if not link.ended.done():
                link.cut()

    def _look_for_stumbling(self, link: Link) -> None:
        """Look whether a message, or a subscription, ends every connection."""
        spool, first = self.spool, next(iter(self.spool.session.inflight.values()), None)
        self._unsettled = 0 if link.has_settled else self._unsettled + 1
        if first is None or spool.forwarded != self._forwarded_before:
            self._stuck = 0
            return
        if not spool.is_careful:
            self._stuck += 1
            if self._stuck >= CAREFUL_AFTER:
                spool.be_careful(careful=True)
                self._stuck = 0
        elif link.has_settled and link.was_closed and not link.has_survived:
            self._stuck += 1
            if self._stuck >= SET_ASIDE_AFTER:
                self._stuck = 0
                self._set_aside()

    def _set_aside(self) -> None:
        message = self.spool.set_aside()
        if message is None:
            return
        self._retry.start_anew()
        self._exchange.counters.upstream_refused += 1
        topic = escaped(message.topic)
        self.refused_count += 1
        self.refused = f"on {topic} of {len(message.payload)} bytes"
        _log.error(
            "the upstream %s ends every connection over a message on %s of %s bytes: dropped; the others go on",
            self.name,
            topic,
            len(message.payload),
            extra={"fields": {"event": "upstream_refused", "upstream": self.name, "topic": topic}},
        )
