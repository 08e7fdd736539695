"""The fleet's policy at this gateway: which version is in force, and how a newer one takes hold.

Rules (docs/adr/0026-one-policy-for-a-fleet.md):

- It is taken if an issuing CA that is trusted here signed it, its version is higher than the one in force, and it
  reads as `birthmark-broker policy check` would have it. Anything else changes nothing. No clock is asked.
- It is on disk, signature and all, before it takes effect: a gateway that has gone by a version never goes by an
  older one again.
- While there is one, `policy.toml` has no say: what one gateway's disk says must not widen what the fleet allows.
- At a start its signature is checked again. One that does not verify is no policy, and the gateway does not start;
  one whose CA is not trusted any more (a CA was replaced) was verified when it came, and stays, under an alarm.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from birthmark.broker.alarms import Alarm
from birthmark.broker.policy_file import parse_policy, read_policy
from birthmark.broker.trust import read_trust
from birthmark.device.durable import write_durably
from birthmark.device.errors import (
    BirthmarkError,
    ConfigurationError,
    PolicyError,
    RemoteProtocolError,
    SystemFailureError,
)
from birthmark.device.fleet_policy import SignedPolicy

if TYPE_CHECKING:
    from pathlib import Path

    from birthmark.broker.config import BrokerSettings
    from birthmark.broker.policy import Policy
    from birthmark.broker.trust import Trust

FILE_NAME = "fleet-policy.json"
_PUBLISH = "publish one with `birthmark policy publish FILE` at the station"

Fault = Literal["malformed", "issuer", "signature", "older", "conflict", "policy", "storage"]


@dataclass(frozen=True, slots=True)
class PolicyInstallation:
    """What became of one policy that arrived."""

    outcome: Literal["installed", "current", "refused"]
    version: int
    """In force after this (0: none)."""
    sha256: str
    """Of the message that arrived."""
    fault: Fault | None = None
    """Why it was refused, one word for a machine."""
    message: str = ""
    hint: str = ""

    @property
    def reason(self) -> str:
        """Why it was refused, as a receipt says it."""
        if self.fault is None:
            return ""
        return f"{self.fault}: {self.message} ({self.hint})" if self.hint else f"{self.fault}: {self.message}"


class _RefusedError(BirthmarkError):
    def __init__(self, fault: Fault, message: str, hint: str) -> None:
        super().__init__(message, hint)
        self.fault = fault


@dataclass(frozen=True, slots=True)
class InForce:
    """A version that is in force."""

    signed: SignedPolicy
    payload: bytes
    """The message that it came in."""
    policy: Policy


class FleetPolicy:
    """The version in force, and its durable copy; there may be none.

    `open` makes one. `install` may run in another thread, one call at a time; everything else is for any thread.
    """

    def __init__(self, path: Path, in_force: InForce | None) -> None:
        self._path = path
        self.in_force = in_force

    @classmethod
    def open(cls, data_folder: Path, trust: Trust) -> FleetPolicy:
        """Take up the version that was in force when the gateway stopped. Nothing is written.

        Raises:
            ConfigurationError: the copy is damaged: going by `policy.toml` instead could allow what the fleet's
                policy denies.
            SystemFailureError: it cannot be read.
        """
        path = data_folder / FILE_NAME
        try:
            payload = path.read_bytes()
        except FileNotFoundError:
            return cls(path, None)
        except OSError as error:
            raise SystemFailureError(
                f"could not read the fleet's policy in {path}: {error.strerror or error}"
            ) from error
        try:
            signed = SignedPolicy.from_bytes(payload)
            if trust.has(signed.issuer):
                _verify(signed, trust)
            return cls(path, InForce(signed, payload, _parsed(signed)))
        except (RemoteProtocolError, PolicyError, _RefusedError) as error:
            raise ConfigurationError(
                f"could not use the fleet's policy kept in {path}: {error.message}",
                hint=f"if the disk lost it, remove {path}: policy.toml has the say until the fleet's comes again",
            ) from error

    @property
    def version(self) -> int:
        """Of the policy in force; 0: there is none."""
        return self.in_force.signed.version if self.in_force else 0

    def install(self, payload: bytes, trust: Trust) -> PolicyInstallation:
        """Judge a policy and put it in force if it is newer.

        When it returns, what is `installed` is on disk and in force. Nothing is raised, whatever the bytes.
        """
        sha256 = hashlib.sha256(payload).hexdigest()
        try:
            outcome = self._take(payload, trust)
        except _RefusedError as error:
            return PolicyInstallation("refused", self.version, sha256, error.fault, error.message, error.hint)
        return PolicyInstallation(outcome, self.version, sha256)

    def alarms(self, trust: Trust) -> list[Alarm]:
        """Return what about the version in force needs a person: that its CA is trusted no more."""
        if self.in_force is None or trust.has(self.in_force.signed.issuer):
            return []
        signed = self.in_force.signed
        message = f"{shown(signed)}, is signed by the CA {signed.issuer}, not trusted any more; it stays in force"
        return [Alarm("policy-signer", message, f"{_PUBLISH}: the CA in use signs it anew")]

    def _take(self, payload: bytes, trust: Trust) -> Literal["installed", "current"]:
        try:
            signed = SignedPolicy.from_bytes(payload)
        except RemoteProtocolError as error:
            raise _RefusedError("malformed", error.message, _PUBLISH) from error
        _verify(signed, trust)
        if self.in_force is not None and signed.version <= self.version:
            return self._same(signed, self.in_force.signed)
        try:
            policy = _parsed(signed)
        except PolicyError as error:
            raise _RefusedError("policy", error.message, error.hint) from error
        try:
            write_durably(self._path, payload)
        except OSError as error:
            message = f"no copy could be kept in {self._path}: {error.strerror or error}"
            raise _RefusedError("storage", message, "make room or mend the permissions") from error
        self.in_force = InForce(signed, payload, policy)
        return "installed"

    def _same(self, signed: SignedPolicy, in_force: SignedPolicy) -> Literal["current"]:
        if signed.version < in_force.version:
            message = f"version {signed.version} is lower than {in_force.version}, which is in force"
            raise _RefusedError("older", message, _PUBLISH)
        if signed.text != in_force.text:
            message = f"another policy with the version {signed.version} is in force"
            hint = "two stations, or a station restored from a backup, sign for one fleet: find out which"
            raise _RefusedError("conflict", message, hint)
        return "current"


def kept_policy(settings: BrokerSettings) -> SignedPolicy | None:
    """Return the fleet's policy that a gateway goes by, if there is one; nothing is written.

    Raises:
        BirthmarkError: as `FleetPolicy.open` and `read_trust`.
    """
    if not (settings.data_folder / FILE_NAME).exists():
        return None
    in_force = FleetPolicy.open(settings.data_folder, read_trust(settings.clients_ca_path)).in_force
    return in_force.signed if in_force else None


def policy_in_force(settings: BrokerSettings) -> tuple[Policy, int]:
    """Return the policy that a gateway goes by, and its version (0: it is that of `policy.toml`).

    Raises:
        BirthmarkError: as `kept_policy` and `read_policy`.
    """
    signed = kept_policy(settings)
    if signed is None:
        return read_policy(settings.policy_path), 0
    return _parsed(signed), signed.version


def shown(signed: SignedPolicy) -> str:
    """Return what a policy of the fleet is called in errors and logs."""
    return f"the fleet's policy, version {signed.version}"


def _verify(signed: SignedPolicy, trust: Trust) -> None:
    if not trust.has(signed.issuer):
        message = f"it is signed by the CA {signed.issuer}, which is no trusted issuing CA"
        raise _RefusedError("issuer", message, "is it another fleet's? Or bring the new clients-ca.pem first")
    issuer = trust[signed.issuer]
    if not signed.is_signed_by(issuer.public_key):
        message = f"it is not signed by '{issuer.name}', which it names"
        raise _RefusedError("signature", message, "find out who else may publish on fleet/policy")


def _parsed(signed: SignedPolicy) -> Policy:
    return parse_policy(signed.text, shown(signed))
