"""The gateway around the broker: who is let in, what is watched, and what is said about it.

Rules:

- `admit` is asked after every handshake, full or resumed: the profile, the issuing CA, the CRL in force.
- The CRL, the policy and the credentials are watched (and taken up again on SIGHUP). A new one applies without a
  restart; one that cannot be used changes nothing and is reported.
- A CRL that has become too old to go by (its grace is over, or at once if it is to fail closed) ends the live
  connections that it let in, as it refuses new ones. Their wills are published and their sessions kept: nothing is
  known against them. The status that says why leaves first.
- The gateway's own certificate is an alarm before it expires, and no obstacle afterwards: its clients judge it.
- A CRL comes as a file, on `gateway/{name}/crl`, or from the fleet (`fleet/member.py`). Either way it is judged by
  its signature alone, installed durably, then what it revokes is closed, and then a receipt says so: as a file
  beside the CRL file, and retained on `gateway/{name}/receipts`. A file that was refused over a clock or a disk is
  judged again: nobody brings it twice when the clock is set.
- Reading and writing happen off the event loop; CRLs are installed one at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING

from birthmark.broker.alarms import Alarms
from birthmark.broker.fleet.member import Member, message_of
from birthmark.broker.fleet.visits import Visits
from birthmark.broker.known_peers import KnownPeers
from birthmark.broker.log_budget import LogBudget
from birthmark.broker.own_certificate import read_own_certificate
from birthmark.broker.packets import Will
from birthmark.broker.policy_in_force import PolicyInForce
from birthmark.broker.receipts import log_receipt, receipt_of, try_to_write_receipts
from birthmark.broker.revocation import Installation, Revocations, crl_sha256
from birthmark.broker.server import RenewalDoor
from birthmark.broker.sightings import Sightings
from birthmark.broker.standing import Standing
from birthmark.broker.time_answers import TimeAnswers
from birthmark.broker.tls import renewal_context, server_context
from birthmark.broker.trust import Trust, read_trust
from birthmark.broker.watch import Watch, WatchedFiles
from birthmark.device.errors import ConfigurationError
from birthmark.device.messages import ClosedIdentity, GatewayStatus, Receipt
from birthmark.device.topics import (
    TIME_REQUESTS,
    gateway_crl,
    gateway_crl_in_force,
    gateway_receipts,
    gateway_seen,
    gateway_status,
)

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterable

    from birthmark.broker.config import BrokerSettings
    from birthmark.broker.fleet.intake import Offer
    from birthmark.broker.peer import Peer
    from birthmark.broker.policy import Policy
    from birthmark.broker.server_protocol import Server
    from birthmark.device.identity import DeviceId

STATUS_INTERVAL_S = 30.0
GUARD_INTERVAL_S = 1.0
"""How often the age of the CRLs and of the certificate in force is looked at."""
_FOR_NOW = frozenset({"not-yet-valid", "storage"})
"""Why a CRL file is refused that may pass later: a clock that is wrong, a disk. It is judged again by and by."""
MAX_WAITING_CRLS = 8
"""Brought by message and not judged yet; the next is refused, with a receipt that says so."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Brought:
    """A CRL that arrived by message."""

    content: bytes
    by: str
    started_s: float


def _renewal_context(settings: BrokerSettings) -> ssl.SSLContext | None:
    if settings.renewal_listener is None:
        return None
    return renewal_context(settings.credentials_path, settings.clients_ca_path)


def now() -> datetime:
    """The gateway's clock."""
    return datetime.now(UTC)


class Gateway:
    """Everything of a gateway that is not the broker itself. `open` makes one.

    Attributes:
        tls_context: for the broker's listener.
        renewal_tls_context: for the one where what has expired is renewed; None where there is none.
        revocations: the CRLs in force.
    """

    def __init__(self, settings: BrokerSettings, trust: Trust, revocations: Revocations) -> None:
        self._settings = settings
        self._trust = trust
        self._peers = KnownPeers(trust)
        self.revocations = revocations
        self._server: Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._installing = asyncio.Lock()
        self._brought: asyncio.Queue[_Brought] = asyncio.Queue(MAX_WAITING_CRLS)
        self._alarms = Alarms(time.monotonic)
        self._log_budget = LogBudget(time.monotonic)
        is_fleet = any(upstream.fleet for upstream in settings.upstreams)
        self._visits = Visits(str(settings.name)) if is_fleet else None
        self._sightings = Sightings(settings.name, self._publish, self._visits)
        self._told_crls = Standing(self._publish)
        self._arrived: tuple[list[Installation], float] = ([], 0.0)
        """What became of the CRL file at the start, and when it was read."""
        self._may_file_pass_later = False
        """Whether the CRL file was refused for now."""
        self._watch = Watch(
            (
                WatchedFiles((settings.crl_path,), self._take_crl_file),
                WatchedFiles((settings.policy_path,), self._take_policy),
                WatchedFiles((settings.credentials_path, settings.clients_ca_path), self._take_credentials),
                *(
                    WatchedFiles((found.credentials_path, found.ca_path), partial(self._take_upstream, found.name))
                    for found in settings.upstreams
                ),
            ),
            settings.revocation.watch_interval_s,
        )
        # After the watch has taken its first look: what changes from here on is seen.
        self._policies = PolicyInForce(settings, trust)
        self._member = Member(
            settings.name,
            self._policies,
            trust=lambda: self._trust,
            install_crl=self._take_fleet_crl,
            go_by=self._go_by,
            crls=lambda: self.revocations.crls,
            publish=self._publish,
            changed=self._look_again,
            visits=self._visits,
            sightings=self._sightings,
            budget=self._log_budget,
        )
        self.tls_context = server_context(settings.credentials_path, settings.clients_ca_path)
        self.renewal_tls_context = _renewal_context(settings)
        self._own_certificate = read_own_certificate(settings.credentials_path)

    @classmethod
    def open(cls, settings: BrokerSettings) -> Gateway:
        """Read everything that a start needs: issuing CAs, CRLs, policy, credentials.

        The CRL file is installed if it is newer than the CRL kept; the receipt is written beside it by `start`,
        which closes the sessions that it revokes, or here if it is refused.

        Raises:
            BirthmarkError: something is missing or cannot be used; above all, there is no CRL of an issuing CA.
        """
        trust = read_trust(settings.clients_ca_path)
        revocations = Revocations.open(trust, settings.data_folder, settings.revocation)
        gateway = cls(settings, trust, revocations)
        started_s = time.monotonic()
        reason = ""
        try:
            content = _read_crl_file(settings)
        except OSError as error:
            reason = f"{settings.crl_path}: {error.strerror or error}"
            _log.warning("could not read the CRL file %s; going by the CRL kept, if any", reason)
        else:
            answers = revocations.install(content, now())
            gateway._arrived = (answers, started_s)
            gateway._may_file_pass_later = _may_pass_later(answers)
            if any(answer.outcome == "refused" for answer in answers):
                # Said at once: the start may end here. The others' receipts wait for what `start` closes.
                gateway._give_receipts([(answer, gateway._receipt(answer, started_s, ())) for answer in answers])
            reason = "; ".join(f"{settings.crl_path}: {answer.reason}" for answer in answers if answer.reason)
        try:
            revocations.require_complete()
        except ConfigurationError as error:
            raise ConfigurationError(
                f"{error.message} ({reason})" if reason else error.message, error.hint
            ) from None
        gateway._look_for_alarms()
        return gateway

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self._policies.policy

    def admit(self, leaf_der: bytes) -> Peer:
        """Judge a peer's certificate, after every handshake. Raises `PeerRefusedError`."""
        moment = now()
        peer = self._peers.check(leaf_der, moment)
        self.revocations.check(peer, moment)
        return peer

    def admit_for_renewal(self, leaf_der: bytes) -> Peer:
        """Judge a certificate on the renewal listener, where it may have expired. Raises `PeerRefusedError`."""
        moment = now()
        listener = self._settings.renewal_listener
        grace = listener.grace if listener else timedelta()
        peer = self._peers.check(leaf_der, moment, expired_by=grace)
        self.revocations.check(peer, moment, expired_by=grace)
        return peer

    def renewal_door(self) -> RenewalDoor | None:
        """Return the second listener's settings and rules; None where there is none."""
        listener = self._settings.renewal_listener
        if listener is None or self.renewal_tls_context is None:
            return None
        return RenewalDoor(listener, self.renewal_tls_context, self.admit_for_renewal)

    async def start(self, server: Server, stop: asyncio.Event | None = None) -> None:
        """Take up work around a broker that has taken up its store, and lets nobody in yet.

        Args:
            server: the broker.
            stop: set when the start is not wanted any more: nothing is waited for then.
        """
        self._server = server
        self._member.start(server)  # first of all: the links begin with the first wait
        self._sightings.take_up(server.own_retained(gateway_seen(self._settings.name, "+")))
        self._member.take_up()
        server.on_client = self._saw
        server.upstreams.on_status = lambda: self._publish_status(online=True)
        for upstream in server.upstreams:
            if upstream.settings.fleet:
                upstream.make_will = self._will
        # What the store has brought back may have been revoked meanwhile, or just before a crash.
        answers, started_s = self._arrived
        closed = [(answer, self._close_revoked(answer.issuer, started_s)) for answer in answers]
        server.close_identities(lambda peer: not self._trust.has(peer.issuer) or self.revocations.is_revoked(peer))
        if any(some for _answer, some in closed):
            await self._settle(str(self._settings.crl_path))
        if all(answer.outcome != "refused" for answer in answers):
            self._give_receipts([(answer, self._receipt(answer, started_s, some)) for answer, some in closed])
        self._look_for_alarms()
        server.on_gateway_message(gateway_crl(self._settings.name), self._bring)
        server.on_gateway_message(TIME_REQUESTS, TimeAnswers(server.publish, time.time).asked)
        self._publish_status(online=True)
        self._tasks = [
            asyncio.create_task(work)
            for work in (self._watch.run(), self._take_brought(), self._member.run(), self._tell(), self._guard())
        ]
        await self._member.catch_up(stop)

    def reload(self) -> None:
        """Take up the CRL, the policy and the credentials again (SIGHUP)."""
        self._watch.take_all()

    async def stop(self) -> None:
        """Stop watching, and say that the gateway is going."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._tasks = []
        if self._server:
            self._server.upstreams.on_status = lambda: None  # a link that ends now must not say that we are online
            self._sightings.tell(time.time(), at_once=True)
            self._publish_status(online=False)

    # --- CRLs --------------------------------------------------------------------------------------------

    async def _take_crl_file(self, *, is_again: bool = False) -> None:
        """Judge the CRL file, and put a receipt beside it; `is_again`: that it is refused stands there already."""
        started_s = time.monotonic()
        content = await asyncio.to_thread(_read_crl_file, self._settings)
        installed = await self._install(content, started_s, str(self._settings.crl_path), is_again=is_again)
        self._may_file_pass_later = _may_pass_later(answer for answer, _receipt in installed)
        if not (is_again and self._may_file_pass_later):
            receipts = [receipt for _answer, receipt in installed]
            await asyncio.to_thread(try_to_write_receipts, self._settings.receipt_path, receipts)

    async def _take_fleet_crl(self, offer: Offer) -> list[Installation]:
        installed = await self._install(offer.payload, offer.started_s, offer.by, is_again=offer.is_again)
        return [answer for answer, _receipt in installed]

    def _bring(self, topic: str, payload: bytes, peer: Peer) -> None:
        del topic
        brought = _Brought(payload, str(peer.device_id), time.monotonic())
        try:
            self._brought.put_nowait(brought)
        except asyncio.QueueFull:
            refusal = Installation(
                outcome="refused",
                issuer="",
                number=0,
                sha256=crl_sha256(payload),
                revoked_count=0,
                reason=f"busy: {MAX_WAITING_CRLS} others wait to be judged",
                hint="bring it again",
            )
            self._answer(self._receipt(refusal, brought.started_s, ()), brought.by)

    async def _take_brought(self) -> None:
        while True:
            brought = await self._brought.get()
            try:
                await self._install(brought.content, brought.started_s, brought.by)
            except Exception:  # noqa: BLE001 - a defect over one CRL must not keep out the next
                _log.exception("a CRL brought by %s could not be judged", brought.by)

    async def _install(
        self, content: bytes, started_s: float, origin: str, *, is_again: bool = False
    ) -> list[tuple[Installation, Receipt]]:
        """Judge CRLs, have what they revoke closed, and say so; `is_again`: a refusal was said before."""
        async with self._installing:
            answers = await asyncio.to_thread(self.revocations.install, content, now())
            # Nothing is awaited between a CRL in force and the sessions it closes.
            receipts = [self._receipt(answer, started_s, self._close(answer, started_s)) for answer in answers]
        if any(receipt.closed for receipt in receipts):
            await self._settle(origin)
        for receipt in receipts:
            if receipt.outcome != "refused" or not is_again:
                self._answer(receipt, origin)
        self._look_again()
        return list(zip(answers, receipts, strict=True))

    def _answer(self, receipt: Receipt, origin: str) -> None:
        # Whoever floods must not thereby hide from the log what was installed.
        if receipt.outcome == "installed" or self._log_budget.grants(origin, f"crl_{receipt.outcome}"):
            log_receipt(receipt, origin)
        self._publish(gateway_receipts(self._settings.name), receipt.to_bytes())

    def _close(self, answer: Installation, started_s: float) -> tuple[ClosedIdentity, ...]:
        return self._close_revoked(answer.issuer, started_s) if answer.outcome == "installed" else ()

    def _close_revoked(self, issuer: str, started_s: float) -> tuple[ClosedIdentity, ...]:
        if self._server is None:
            return ()

        def is_revoked(peer: Peer) -> bool:
            return peer.issuer == issuer and self.revocations.is_revoked(peer)

        return tuple(self._server.close_identities(is_revoked, started_s=started_s))

    async def _settle(self, origin: str) -> None:
        if self._server and not await self._server.settle():
            # They stay gone all the same: a broker that starts again closes first what its CRL revokes.
            _log.error("the sessions that a CRL from %s closed are not yet off the disk", origin)

    def _give_receipts(self, installed: list[tuple[Installation, Receipt]]) -> None:
        """Log and write what became of the CRL file at the start.

        Where CRLs come over MQTT, the file stays the first one: that is no error to be told of at each start.
        """
        for answer, receipt in installed:
            if answer.is_predecessor:
                path, fields = self._settings.crl_path, {"event": "crl_kept", "crl_number": answer.number}
                _log.info(
                    "CRL %s stays in force; the one in %s is from before",
                    answer.number,
                    path,
                    extra={"fields": fields},
                )
            else:
                log_receipt(receipt, str(self._settings.crl_path))
        try_to_write_receipts(self._settings.receipt_path, [receipt for _answer, receipt in installed])

    def _receipt(self, answer: Installation, started_s: float, closed: tuple[ClosedIdentity, ...]) -> Receipt:
        return receipt_of(
            answer,
            gateway=str(self._settings.name),
            installed_at=time.time(),
            elapsed_ms=(time.monotonic() - started_s) * 1_000,
            closed=closed,
        )

    # --- policy and credentials --------------------------------------------------------------------------

    async def _take_policy(self) -> None:
        if await asyncio.to_thread(self._policies.take_file):
            ended = self._go_by(self.policy)
            _log.info("a new policy is in force (%s); it ended %s subscriptions", self.policy.sha256[:12], ended)
        self._look_again()

    def _go_by(self, policy: Policy) -> int:
        return self._server.set_policy(policy) if self._server else 0

    async def _take_credentials(self) -> None:
        """Take up new credentials or issuing CAs; connections of a CA that is no longer trusted are closed."""
        context = server_context(self._settings.credentials_path, self._settings.clients_ca_path)
        own_certificate = read_own_certificate(self._settings.credentials_path)
        trust = read_trust(self._settings.clients_ca_path)
        renewal = _renewal_context(self._settings)
        async with self._installing:
            # First, so that nothing changes if a kept CRL of a CA that is trusted anew cannot be used.
            revocations = await asyncio.to_thread(
                Revocations.open, trust, self._settings.data_folder, self._settings.revocation
            )
            self.revocations, self._trust, self.tls_context = revocations, trust, context
            self._peers = KnownPeers(trust)
            self.renewal_tls_context = renewal
            self._own_certificate = own_certificate
            if self._server:
                self._server.set_tls_context(context, renewal)
                self._server.close_identities(lambda peer: not trust.has(peer.issuer))
        _log.info("new credentials are in force; trusted issuing CAs: %s", ", ".join(ca.name for ca in trust))
        try:
            await self._take_crl_file()  # the file may hold the CRL of a CA that is trusted only now
        except OSError as error:  # where CRLs come by message, there need be none
            _log.warning("could not read the CRL file %s: %s", self._settings.crl_path, error.strerror or error)
        self._member.follow_trust()
        for issuer in trust:
            if issuer.key_id not in self.revocations.crls:
                _log.error("no CRL of %s is in force: its clients are refused until one arrives", issuer.name)

    async def _take_upstream(self, name: DeviceId) -> None:
        if self._server:
            self._server.upstreams.reload(name)

    # --- what is said ------------------------------------------------------------------------------------

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(STATUS_INTERVAL_S)
            try:
                self._publish_status(online=True)
                self._sightings.forget(time.time())
                self._member.try_again()
                if self._may_file_pass_later:
                    with contextlib.suppress(OSError):  # the watch says of a file that it is gone
                        await self._take_crl_file(is_again=True)
            except Exception:  # noqa: BLE001 - a defect here must not silence what is to come
                _log.exception("the gateway's status could not be said")

    async def _guard(self) -> None:
        while True:
            await asyncio.sleep(GUARD_INTERVAL_S)
            try:
                if self._look_for_alarms():
                    self._publish_status(online=True)
                self._end_unchecked()
                self._sightings.tell(time.time())
                self._member.move()
            except Exception:  # noqa: BLE001 - a defect here must not silence the alarms to come
                _log.exception("the age of the CRLs and of the certificate could not be looked at")

    def _saw(self, peer: Peer, address: str) -> None:
        self._sightings.saw(peer, address, time.time())
        if peer.is_gateway:
            self._member.serve()

    def _end_unchecked(self) -> None:
        """End the connections that nobody would let in any more, because the CRL to check them by is too old."""
        refusing = self.revocations.refusing(now())
        if not refusing or self._server is None:
            return
        why = "the CRL of its CA is too old to go by"
        ended = self._server.end_connections(lambda peer: peer.issuer in refusing, why)
        if ended:
            self._server.counters.unchecked_closed += ended
            _log.error("ended %s connections: the CRL of their CA is too old to go by", ended)
            self._publish_status(online=True)

    def _look_for_alarms(self) -> bool:
        """Look at CRLs and certificate in force, log what is due; return whether what stands has changed."""
        moment = now()
        own = self._own_certificate.alarms(moment) if self._own_certificate else []
        found = self.revocations.alarms(moment) + own + self._policies.alarms(self._trust) + self._member.alarms()
        if self._server:
            found += self._server.upstreams.alarms(moment)
        has_changed = self._alarms.look(found)
        if self._server:
            self._server.counters.alarms = self._alarms.raised
        return has_changed

    def _look_again(self) -> None:
        self._look_for_alarms()
        self._publish_status(online=True)

    def _publish_status(self, *, online: bool) -> None:
        self._publish_crls()
        self._publish(gateway_status(self._settings.name), self._status(online=online).to_bytes())
        if self._server:
            self._server.upstreams.say(self._server.publish)

    def _will(self) -> Will:
        """What an upstream says of this gateway when it has lost it."""
        return Will(gateway_status(self._settings.name), self._status(online=False).to_bytes(), qos=1, retain=True)

    def _status(self, *, online: bool) -> GatewayStatus:
        crls = self.revocations.crls.values()
        return GatewayStatus(
            gateway=str(self._settings.name),
            online=online,
            clock=time.time(),
            crl_numbers={crl.issuer: crl.number for crl in crls},
            crl_next_update=min((crl.next_update.timestamp() for crl in crls), default=0.0),
            policy_sha256=self.policy.sha256,
            sessions=self._server.connected_count if self._server else 0,
            alarms=self._alarms.codes,
            counters=self._server.counters.as_dict() if self._server else {},
            policy_version=self._policies.version,
            upstreams=tuple(upstream.state() for upstream in self._server.upstreams) if self._server else (),
        )

    def _publish_crls(self) -> None:
        """Say which CRLs are in force, whole: a station restored from a backup takes over what they list."""
        self._told_crls.tell(
            {
                gateway_crl_in_force(self._settings.name, issuer): (crl.sha256, message_of(crl))
                for issuer, crl in self.revocations.crls.items()
            }
        )
        self._member.tell()

    def _publish(self, topic: str, payload: bytes) -> None:
        if self._server:
            self._server.publish(topic, payload, 1, retain=True)


def _may_pass_later(answers: Iterable[Installation]) -> bool:
    return any(answer.fault in _FOR_NOW for answer in answers)


def _read_crl_file(settings: BrokerSettings) -> bytes:
    """Read the CRL file, one byte more than is allowed at most."""
    with settings.crl_path.open("rb") as file:
        return file.read(settings.revocation.max_crl_bytes + 1)
