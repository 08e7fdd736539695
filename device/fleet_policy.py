"""The policy of a whole fleet: signed, numbered, and what a gateway says of it (docs/fleet.md).

    fleet/policy                     SignedPolicy, retained: the text of a `policy.toml`
    gateway/{name}/policy-receipts   PolicyReceipt: what that gateway did with one

Rules:

- An issuing CA of the clients signs it: whoever may say who a device is may say what it may do. Who carries it to
  a gateway is nobody's matter.
- Versions order policies, and nothing else does: the issue time is for people. One version is one text.
- Reading says nothing about the signature; `is_signed_by` does. Any bytes in, `RemoteProtocolError` out.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

from birthmark.device.errors import LocalProtocolError
from birthmark.device.escape import quoted
from birthmark.device.json_fields import Fields, base64_text, dump
from birthmark.device.link.transcript import Label, transcript, verify
from birthmark.device.messages import Outcome, outcome_in

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

MAX_POLICY_BYTES: Final = 256 * 1024
"""Of the text. As JSON it is three times as long at most, and an MQTT packet of 1 MiB still takes it."""
MAX_SIGNED_POLICY_BYTES: Final = 1024 * 1024 - 1024
MAX_VERSION: Final = 2**53 - 1
"""The most that every reader of JSON keeps exactly (RFC 8259 section 6)."""
MAX_SIGNATURE_BYTES: Final = 80
"""ECDSA over P-256, DER: at most 72."""
_MAX_KEY_ID_BYTES: Final = 32
_MAX_TIME: Final = 253_402_300_799
"""The last second of the year 9999."""


def policy_transcript(version: int, issued_at: int, text: bytes) -> bytes:
    """Return what an issuing CA signs: `version`, `issued_at` in seconds since 1970, and the policy's `text`."""
    numbers = (version.to_bytes(8, "big"), issued_at.to_bytes(8, "big"))
    return transcript(Label.POLICY, *numbers, hashlib.sha256(text).digest())


@dataclass(frozen=True, slots=True)
class SignedPolicy:
    """One version of a fleet's policy.

    Raises:
        LocalProtocolError: a part of it is out of bounds.
    """

    version: int
    """From 1."""
    issued_at: int
    """Seconds since 1970, by the station's clock; it orders nothing."""
    issuer: str
    """The issuing CA that signed it, by subject key identifier in lower-case hex."""
    text: bytes
    """Of the policy file: TOML, in UTF-8."""
    signature: bytes
    """Of the issuing CA over `policy_transcript`, DER."""

    def __post_init__(self) -> None:
        cause = _fault(self)
        if cause:
            raise LocalProtocolError(f"could not make a signed policy: {cause}")

    @property
    def text_sha256(self) -> str:
        """Of the text, in lower-case hex: what the gateways' status names a policy by."""
        return hashlib.sha256(self.text).hexdigest()

    def is_signed_by(self, public_key: EllipticCurvePublicKey) -> bool:
        """Whether the key signed this version of this text."""
        return verify(public_key, self.signature, policy_transcript(self.version, self.issued_at, self.text))

    def to_bytes(self) -> bytes:
        """Return the message's payload."""
        return dump(
            {
                "version": self.version,
                "issued_at": self.issued_at,
                "issuer": self.issuer,
                "signature": base64_text(self.signature),
                "policy": self.text.decode("utf-8"),
            }
        )

    @classmethod
    def from_bytes(cls, payload: bytes) -> SignedPolicy:
        """Read a payload; raises `RemoteProtocolError` if it is no signed policy."""
        if len(payload) > MAX_SIGNED_POLICY_BYTES:
            raise Fields("signed policy", {}).error(f"it has more than {MAX_SIGNED_POLICY_BYTES} bytes")
        fields = Fields("signed policy", payload)
        issuer = fields.text("issuer")
        try:
            text = fields.text("policy").encode("utf-8")
        except UnicodeEncodeError as error:
            raise fields.error("'policy' is no Unicode text") from error
        version, issued_at = fields.whole("version"), fields.whole("issued_at")
        try:
            return cls(version, issued_at, issuer, text, fields.octets("signature", most=MAX_SIGNATURE_BYTES))
        except LocalProtocolError as error:
            raise fields.error(error.message.partition(": ")[2]) from error


def _fault(policy: SignedPolicy) -> str:
    if not 1 <= policy.version <= MAX_VERSION:
        return f"the version is not from 1 to {MAX_VERSION}"
    if not 0 <= policy.issued_at <= _MAX_TIME:
        return "the issue time is out of range"
    if not policy.issuer or len(policy.issuer) > 2 * _MAX_KEY_ID_BYTES or policy.issuer.strip("0123456789abcdef"):
        return f"{quoted(policy.issuer[: 2 * _MAX_KEY_ID_BYTES + 1])} is no key identifier in lower-case hex"
    if not 1 <= len(policy.text) <= MAX_POLICY_BYTES:
        return f"the policy does not have 1 to {MAX_POLICY_BYTES} bytes"
    if not 1 <= len(policy.signature) <= MAX_SIGNATURE_BYTES:
        return "there is no signature"
    try:
        policy.text.decode("utf-8")
    except UnicodeDecodeError:
        return "the policy is not in UTF-8"
    return ""


@dataclass(frozen=True, slots=True)
class PolicyReceipt:
    """What a gateway did with a policy of its fleet, on `gateway/{name}/policy-receipts`."""

    gateway: str
    outcome: Outcome
    """`current`: the very same version was in force already; `refused`: nothing changed, `reason` says why."""
    version: int
    """Of the fleet's policy in force after this (0: none)."""
    sha256: str
    """Of the message that arrived, in lower-case hex."""
    installed_at: float
    elapsed_ms: float
    """From the arrival of the message until the gateway went by it, or refused it."""
    subscriptions_ended: int = 0
    """Subscriptions that the new policy does not allow, and that were dropped."""
    reason: str = ""

    def to_bytes(self) -> bytes:
        """Return the message's payload."""
        return dump(asdict(self))

    @classmethod
    def from_bytes(cls, payload: bytes) -> PolicyReceipt:
        """Read a payload; raises `RemoteProtocolError` if it is no receipt."""
        fields = Fields("policy receipt", payload)
        return cls(
            gateway=fields.text("gateway"),
            outcome=outcome_in(fields),
            version=fields.whole("version"),
            sha256=fields.text("sha256"),
            installed_at=fields.number("installed_at"),
            elapsed_ms=fields.number("elapsed_ms"),
            subscriptions_ended=fields.whole("subscriptions_ended", default=0),
            reason=fields.text("reason", default=""),
        )
