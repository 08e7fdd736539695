"""The policy of the station's fleet: numbered, signed and kept, for `policy_delivery` to bring to every gateway.

Rules:

- The issuing CA of devices and services signs it. Version, signature and text are durable in one transaction of
  the registry, before anybody is told: stations that share it never give one version twice, and a backup has it.
- The same text again is the same version, as long as that is the last one, and the CA that signed it issues still:
  after a rollover it is signed anew, before the old CA is trusted no more.
- Only what can be known without a gateway is checked here: that it is TOML in UTF-8, of a policy's two parts, and
  not too long. Each gateway judges the rest, and says so in its receipt; `birthmark-broker policy check` says it
  before.
- A station that was restored has given versions that it does not know of: they jump (`restore`). One that is found
  at a broker, signed by a CA of ours, is not given again.
"""

from __future__ import annotations

import base64
import binascii
import tomllib
from dataclasses import replace
from typing import TYPE_CHECKING, Final, cast

from birthmark.device.errors import LocalProtocolError, PolicyError, RegistryError, RemoteProtocolError
from birthmark.device.escape import escaped
from birthmark.device.fleet_policy import MAX_POLICY_BYTES, SignedPolicy, policy_transcript
from birthmark.provisioning.cas import read_cas

if TYPE_CHECKING:
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    from birthmark.provisioning.cas import Cas
    from birthmark.provisioning.registry.interface import Transaction, View
    from birthmark.provisioning.station import Station

POLICY_VERSION: Final = "policy_version"
"""The registry's counter of the versions that were given."""
TOPIC: Final = "fleet-policy"
"""Where the registry notes the last one."""
_KEY: Final = "current"
_UNSIGNED: Final = b"\0"


def read_policy_text(path: Path) -> bytes:
    """Read a policy file, as far as a station can judge it.

    Raises:
        PolicyError: it cannot be read, or no gateway could use it.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_POLICY_BYTES + 1)
    except OSError as error:
        raise PolicyError(f"could not read {path}: {error.strerror}", hint="name a policy.toml") from error
    cause = _fault(text)
    if cause:
        raise PolicyError(f"could not publish {path}: {cause}", hint=f"birthmark-broker policy check {path}")
    return text


def _fault(text: bytes) -> str:
    if len(text) > MAX_POLICY_BYTES:
        return f"it has more than {MAX_POLICY_BYTES} bytes"
    try:
        tables = tomllib.loads(text.decode("utf-8"))
    except UnicodeDecodeError:
        return "it is not UTF-8 text"
    except (ValueError, RecursionError) as error:
        return f"it is no TOML: {escaped(str(error))}"
    roles, assignments = tables.get("roles"), tables.get("assignments")
    if not isinstance(roles, dict) or not roles:
        return "it has no roles, so nobody could do anything"
    if not isinstance(assignments, list) or not assignments:
        return "it has no assignments, so nobody would have a role"
    return ""


def current_policy(view: View) -> SignedPolicy | None:
    """Return the last policy that was signed; None if none was.

    Raises:
        RegistryError: what the registry notes of it is damaged.
    """
    note = view.notes(TOPIC).get(_KEY)
    if note is None:
        return None
    try:
        return SignedPolicy(
            version=note["version"],
            issued_at=note["issued_at"],
            issuer=note["issuer"],
            text=note["text"].encode("utf-8"),
            signature=base64.b64decode(note["signature"], validate=True),
        )
    except (AttributeError, KeyError, TypeError, binascii.Error, UnicodeError, LocalProtocolError) as error:
        raise RegistryError(
            "could not read the registry: what it notes of the fleet's policy is damaged",
            hint="restore it from a backup, together with the audit log",
        ) from error


def sign_policy(station: Station, text: bytes) -> tuple[SignedPolicy, bool]:
    """Give a policy the next version, sign it and keep it, durable when this returns.

    Returns:
        It, and whether it is new.

    Raises:
        AuthorityError: the issuing CA cannot be unlocked, or cannot sign; nothing was changed.
        RegistryError: the registry cannot be used; nothing was changed.
    """
    with station.registry.view() as view:
        before = _standing(view, text)
    if before is not None:
        return before, False  # without a passphrase
    authority = station.authority  # a wrong passphrase ends this here
    with station.registry.transaction() as transaction:
        before = _standing(transaction, text)
        if before is not None:
            return before, False
        version = transaction.counter(POLICY_VERSION) + 1
        issued_at = int(station.clock().timestamp())
        draft = SignedPolicy(version, issued_at, authority.key_id, text, _UNSIGNED)
        policy = replace(draft, signature=authority.sign_transcript(policy_transcript(version, issued_at, text)))
        transaction.set_counter(POLICY_VERSION, version)
        keep_policy(transaction, policy)
        transaction.record(
            "policy-sign", "fleet", version=version, sha256=policy.text_sha256, issuer=policy.issuer
        )
    return policy, True


def _standing(view: View, text: bytes) -> SignedPolicy | None:
    """Return the last policy if it is this one, and needs no other version or signature."""
    last = current_policy(view)
    if last is None or last.text != text or last.version != view.counter(POLICY_VERSION):
        return None
    return last if last.issuer == read_cas(view).for_clients.key_id else None


def note_version(station: Station, version: int) -> None:
    """Have every version from now on be above this one; durable when this returns."""
    with station.registry.transaction() as transaction:
        transaction.set_counter(POLICY_VERSION, max(transaction.counter(POLICY_VERSION), version))


def keep_policy(transaction: Transaction, policy: SignedPolicy) -> None:
    """Note a policy as the last one."""
    transaction.put_note(
        TOPIC,
        _KEY,
        {
            "version": policy.version,
            "issued_at": policy.issued_at,
            "issuer": policy.issuer,
            "text": policy.text.decode("utf-8"),
            "signature": base64.b64encode(policy.signature).decode("ascii"),
        },
    )


def trusted_policy(payload: bytes, cas: Cas) -> SignedPolicy | None:
    """Return a signed policy that one of these CAs signed; None if it is none."""
    try:
        policy = SignedPolicy.from_bytes(payload)
    except RemoteProtocolError:
        return None
    ca = next((each for each in cas.issuing if each.key_id == policy.issuer), None)
    if ca is None or not policy.is_signed_by(cast("EllipticCurvePublicKey", ca.certificate.public_key())):
        return None
    return policy
