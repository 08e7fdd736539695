"""The CRLs in force: which certificates are refused, and how a newer list takes hold.

Rules:

- One CRL is in force per trusted issuing CA. It is replaced only by one whose cRLNumber is higher and whose
  thisUpdate is not lower. (Not *higher*: two revocations within one second are two CRLs with the same thisUpdate,
  and the number tells them apart.) The same CRL again is `current`; another one with the same number is refused.
- The new CRL is on disk, in the data folder, before it takes effect: a broker that has refused somebody never
  lets him in again after a restart, even if an older file lies where the CRL is taken from.
- Nothing is loaded into OpenSSL; the look-up is one set per issuing CA, asked after every handshake, full or
  resumed. Taking effect is one assignment: a look-up sees the old CRLs or the new ones.
- Past nextUpdate a CRL keeps refusing what it lists; the rest is let in for a stated grace and then refused, so
  that a station that is down is an alarm first. `fail_closed` refuses everyone at once. Who is refused is not
  kept either: `refusing` names the issuing CAs whose live connections are to end.
- The thisUpdate of a CRL in force is a moment that has been, whatever the gateway's clock says: what had expired
  by then is not let in by a clock that went back. So nobody comes back by having left the CRL after its end.
- A broker without a CRL for each of its issuing CAs does not start.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from birthmark.broker.alarms import Alarm
from birthmark.broker.crl import Crl, CrlRefusedError, read_crl, split_crls
from birthmark.broker.peer import PeerRefusedError, later
from birthmark.device.durable import private_folder, remove_leftovers, write_durably
from birthmark.device.errors import ConfigurationError, SystemFailureError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime
    from pathlib import Path

    from birthmark.broker.config import RevocationSettings
    from birthmark.broker.peer import Peer
    from birthmark.broker.trust import Trust

_NO_GRACE = timedelta()
_CRL_HINT = "sign one with `birthmark crl` at the station and bring it to the `crl` of broker.toml, or over MQTT"
_FILE_HINT = "sign one with `birthmark crl` at the station and bring it to the `crl` of broker.toml"
"""For when nobody gets in who could bring it over MQTT."""


@dataclass(frozen=True, slots=True)
class Installation:
    """What became of one CRL that arrived."""

    outcome: Literal["installed", "current", "refused"]
    issuer: str
    """The issuing CA's key identifier in hex; empty if it could not be read."""
    number: int
    """Of the CRL in force for that issuing CA after this (0: none)."""
    sha256: str
    """Of the CRL that arrived."""
    revoked_count: int
    """Entries of the CRL in force."""
    reason: str = ""
    """Why it was refused: `code: message`."""
    hint: str = ""
    fault: str = ""
    """The code alone."""
    is_predecessor: bool = False
    """It is from before the one in force, by number and by date."""


class Revocations:
    """The CRLs in force, and their durable copies.

    `open` makes one. `install` may run in another thread, one call at a time; everything else is for any thread.
    """

    def __init__(self, trust: Trust, folder: Path, settings: RevocationSettings, crls: Mapping[str, Crl]) -> None:
        self._trust = trust
        self._folder = folder
        self._settings = settings
        self._crls: Mapping[str, Crl] = dict(crls)

    @classmethod
    def open(cls, trust: Trust, data_folder: Path, settings: RevocationSettings) -> Revocations:
        """Take up the CRLs that were in force when the broker stopped; there may be none yet.

        The clock is not asked: these were valid once, and a gateway whose clock is in 1970 after a power cut
        must come up (it lets nobody in until the clock is set).

        Raises:
            ConfigurationError: a copy in the data folder is damaged: starting without it could let in a
                revoked device.
            SystemFailureError: the folder cannot be used.
        """
        folder = data_folder / "crl"
        try:
            private_folder(folder)
            remove_leftovers(folder)
        except OSError as error:
            raise SystemFailureError(f"could not use the CRLs in {folder}: {error.strerror or error}") from error
        return cls.read(trust, data_folder, settings)

    @classmethod
    def read(cls, trust: Trust, data_folder: Path, settings: RevocationSettings) -> Revocations:
        """As `open`, for looking only: nothing in the folder is touched, and it need not be there."""
        folder = data_folder / "crl"
        crls: dict[str, Crl] = {}
        try:
            for issuer in trust:
                path = _copy_path(folder, issuer.key_id)
                if path.exists():
                    crls[issuer.key_id] = _kept(path, trust)
        except OSError as error:
            raise SystemFailureError(f"could not use the CRLs in {folder}: {error.strerror or error}") from error
        return cls(trust, folder, settings, crls)

    def require_complete(self) -> None:
        """Refuse to start without a CRL for each trusted issuing CA. Raises `ConfigurationError`."""
        for issuer in self._trust:
            if issuer.key_id not in self._crls:
                raise ConfigurationError(f"could not start without a CRL of '{issuer.name}'", hint=_CRL_HINT)

    def install(self, content: bytes, now: datetime) -> list[Installation]:
        """Judge every CRL in `content` (DER or PEM) and put those that are newer in force.

        A CRL of a CA that is not trusted is passed over if there is another one beside it: a file for OpenSSL has
        the root's too. If any part of the content cannot be read, none of it takes effect.

        Returns:
            One answer per CRL of a trusted issuing CA, or a single refusal. When it returns, what is `installed`
            is on disk and in force. Nothing is raised, whatever the bytes.
        """
        try:
            candidates = self._read(content, now)
        except CrlRefusedError as error:
            return [self._refusal(error, content)]
        return [self._take(crl) for crl in candidates]

    def _take(self, crl: Crl) -> Installation:
        in_force = self._crls.get(crl.issuer)
        if in_force is not None and in_force.sha256 == crl.sha256:
            return _answer("current", crl)
        try:
            _check_newer(crl, in_force)
            write_durably(_copy_path(self._folder, crl.issuer), crl.der)
        except CrlRefusedError as error:
            is_predecessor = in_force is not None and _is_before(crl, in_force)
            return replace(self._refusal(error, crl.der), is_predecessor=is_predecessor)
        except OSError as error:
            message = f"no copy could be kept in {self._folder}: {error.strerror or error}"
            hint = "make room or mend the permissions, then deliver the CRL again"
            return self._refusal(CrlRefusedError("storage", message, hint, issuer=crl.issuer), crl.der)
        self._crls = {**self._crls, crl.issuer: crl}
        return _answer("installed", crl)

    def is_revoked(self, peer: Peer) -> bool:
        """Whether the CRL in force lists this peer's certificate."""
        crl = self._crls.get(peer.issuer)
        return crl is not None and peer.cert_serial in crl.serials

    def check(self, peer: Peer, now: datetime, *, expired_by: timedelta = _NO_GRACE) -> None:
        """Let a peer in, or not; asked after every handshake, right after `check_peer`. Constant time.

        Args:
            peer: from `check_peer`.
            now: the gateway's clock, aware.
            expired_by: on the renewal listener, how long after its end a certificate is still let in.

        Raises:
            PeerRefusedError: `revoked`; `no-crl`: its issuing CA has none in force; `crl-expired`: its CRL
                is too old to go by; `expired`: it had expired when its CRL was signed.
        """
        crl = self._crls.get(peer.issuer)
        if crl is None:
            raise PeerRefusedError("no-crl", f"no CRL of the CA of {peer.device_id} is in force", _FILE_HINT)
        if peer.cert_serial in crl.serials:
            message = f"the certificate of {peer.device_id} is revoked (CRL {crl.number})"
            raise PeerRefusedError("revoked", message, "`birthmark show` at the station says when and why")
        if crl.this_update > later(peer.not_after, expired_by):
            message = (
                f"CLOCK: the certificate of {peer.device_id} was valid until {peer.not_after:%F %T} UTC, and the "
                f"CRL in force is of {crl.this_update:%F %T} UTC; here it is {now:%F %T} UTC"
            )
            raise PeerRefusedError("expired", message, "set this gateway's clock: it is behind the station's")
        if now > self._refuses_after(crl):
            message = f"the CRL to check {peer.device_id} against expired on {crl.next_update:%F %T} UTC"
            raise PeerRefusedError("crl-expired", message, _FILE_HINT)

    def refusing(self, now: datetime) -> frozenset[str]:
        """Return the trusted issuing CAs, by key identifier, of whose clients `check` now refuses every one."""
        crls = self._crls
        return frozenset(
            issuer.key_id
            for issuer in self._trust
            if (crl := crls.get(issuer.key_id)) is None or now > self._refuses_after(crl)
        )

    def alarms(self, now: datetime) -> list[Alarm]:
        """Return what about the CRLs in force needs a person: due at half life, expired, refusing everyone."""
        alarms: list[Alarm] = []
        for crl in self._crls.values():
            shown = f"CRL {crl.number} of the CA {crl.issuer}"
            until = self._refuses_after(crl)
            if now > until:
                message = f"{shown} expired on {crl.next_update:%F %T} UTC: every client of that CA is refused"
                alarms.append(Alarm("crl-refusing", message, _FILE_HINT))
            elif now > crl.next_update:
                message = (
                    f"{shown} expired on {crl.next_update:%F %T} UTC: everyone is refused after {until:%F %T} UTC"
                )
                alarms.append(Alarm("crl-expired", message, _CRL_HINT))
            elif now > crl.this_update + (crl.next_update - crl.this_update) / 2:
                message = f"{shown} is past half its life; it expires on {crl.next_update:%F %T} UTC"
                alarms.append(Alarm("crl-due", message, _CRL_HINT))
        return alarms

    @property
    def crls(self) -> Mapping[str, Crl]:
        """The CRLs in force, by issuing CA's key identifier."""
        return self._crls

    def _refuses_after(self, crl: Crl) -> datetime:
        if self._settings.fail_closed:
            return crl.next_update
        return later(crl.next_update, timedelta(days=self._settings.grace_days))

    def _read(self, content: bytes, now: datetime) -> list[Crl]:
        if len(content) > self._settings.max_crl_bytes:
            message = f"it has more than {self._settings.max_crl_bytes} bytes"
            raise CrlRefusedError("unreadable", message, "raise max_crl_bytes in broker.toml")
        crls: list[Crl] = []
        foreign: CrlRefusedError | None = None
        in_force = {crl.sha256: crl for crl in self._crls.values()}
        for crl_der in split_crls(content):
            if known := in_force.get(hashlib.sha256(crl_der).hexdigest()):
                crls.append(known)  # a large one, delivered by file and by message, is read once
                continue
            try:
                crls.append(read_crl(crl_der, self._trust, now))
            except CrlRefusedError as error:
                if error.reason != "issuer":
                    raise
                foreign = error
        if foreign is not None and not crls:
            raise foreign
        return crls

    def _refusal(self, error: CrlRefusedError, content: bytes) -> Installation:
        in_force = self._crls.get(error.issuer)
        return Installation(
            outcome="refused",
            issuer=error.issuer,
            number=in_force.number if in_force else 0,
            sha256=crl_sha256(content),
            revoked_count=len(in_force.serials) if in_force else 0,
            reason=f"{error.reason}: {error.message}",
            hint=error.hint,
            fault=error.reason,
        )


def _is_before(crl: Crl, in_force: Crl) -> bool:
    return crl.number < in_force.number and crl.this_update <= in_force.this_update


def _check_newer(crl: Crl, in_force: Crl | None) -> None:
    if in_force is None:
        return
    if crl.number < in_force.number:
        message = f"number {crl.number} is lower than {in_force.number}, which is in force"
        raise CrlRefusedError("older", message, _CRL_HINT, issuer=crl.issuer)
    if crl.number == in_force.number:
        raise CrlRefusedError(
            "conflict",
            f"another CRL with the number {crl.number} is in force",
            "two stations, or a station restored from a backup, sign for one CA: find out which",
            issuer=crl.issuer,
        )
    if crl.this_update < in_force.this_update:
        message = f"number {crl.number} is higher but dated before number {in_force.number}, which is in force"
        raise CrlRefusedError("older", message, "check the station's clock", issuer=crl.issuer)


def _answer(outcome: Literal["installed", "current"], crl: Crl) -> Installation:
    return Installation(outcome, crl.issuer, crl.number, crl.sha256, len(crl.serials))


def crl_sha256(content: bytes) -> str:
    """Return what a receipt knows a CRL by, in hex.

    Of the DER, if the content is one CRL in PEM; else of the bytes as they came.
    """
    try:
        crls = split_crls(content)
    except CrlRefusedError:
        crls = []
    return hashlib.sha256(crls[0] if len(crls) == 1 else content).hexdigest()


def _copy_path(folder: Path, key_id: str) -> Path:
    return folder / f"{key_id}.crl"


def _kept(path: Path, trust: Trust) -> Crl:
    try:
        crl = read_crl(path.read_bytes(), trust, now=None)
    except CrlRefusedError as error:
        hint = f"if the disk lost it, remove {path} and deliver the latest CRL"
        raise ConfigurationError(f"could not use the CRL kept in {path}: {error.message}", hint=hint) from error
    if path != _copy_path(path.parent, crl.issuer):
        raise ConfigurationError(
            f"could not use the CRL kept in {path}: it is another CA's",
            hint=f"remove {path} and deliver the latest CRL",
        )
    return crl
