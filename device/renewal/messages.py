"""The messages of a renewal, as values (docs/renewal.md).

    devices/{id}/renewal/request   RenewalRequest, kind `renew`: a request for a certificate, signed by both keys
                                   RenewalRequest, kind `confirm`: the new certificate works; signed by the new key
    devices/{id}/renewal/answer    RenewalAnswer: issued, confirmed, refused, or renew-now (asked for by a person)

Rules: as in `device.messages`. A message says nothing that is believed for being said: each signature is checked
with `device.renewal.proofs`, each certificate by whoever takes it. What costs a device something that it has, or
keeps the station busy, is signed: `confirmed`, `renew-now`, and a refusal after which a key is not used again.
"""

from __future__ import annotations

from typing import Any, Final, Literal, get_args

from birthmark.device.escape import quoted
from birthmark.device.frozen import Frozen
from birthmark.device.json_fields import Fields, base64_text, dump
from birthmark.device.link.bundle import MAX_ANCHORS, MAX_CERTIFICATE_BYTES, MAX_ISSUING
from birthmark.device.link.vocabulary import MAX_CSR_BYTES, SHA256_BYTES

NONCE_BYTES: Final = 16
MAX_SIGNATURE_BYTES: Final = 80
"""ECDSA over P-256, DER: at most 72."""

MAX_WAIT_S: Final = 86_400
"""What an answer may have a device wait: one word must not put off a renewal for good."""
MAX_GRACE_DAYS: Final = 60
"""How long after its end a certificate may be renewed at most, at any gateway: a revoked one stays on the CRL for
longer than this."""
MAX_REASON_CHARACTERS: Final = 300

Kind = Literal["renew", "confirm"]
Outcome = Literal["issued", "confirmed", "refused", "renew-now"]


class RenewalRequest(Frozen):
    """What a device asks for."""

    kind: Kind
    nonce: bytes
    """16 random octets, fresh for every request; the answer carries them."""
    leaf_sha256: bytes
    """`renew`: of the current certificate, DER; `confirm`: of the new one."""
    anchors_sha256: tuple[bytes, ...]
    """Of each trust anchor that the device goes by, in its order."""
    signature: bytes
    """`renew`: of the current key, `confirm`: of the new key; DER."""
    csr_der: bytes = b""
    """`renew`: PKCS#10, signed by the new key, subject CN = the device id."""

    def to_bytes(self) -> bytes:
        """Return the message's payload."""
        value: dict[str, Any] = {
            "kind": self.kind,
            "nonce": self.nonce.hex(),
            "leaf_sha256": self.leaf_sha256.hex(),
            "anchors_sha256": [each.hex() for each in self.anchors_sha256],
            "signature": base64_text(self.signature),
        }
        if self.csr_der:
            value["csr"] = base64_text(self.csr_der)
        return dump(value)

    @classmethod
    def from_bytes(cls, payload: bytes) -> RenewalRequest:
        """Read a payload; raises `RemoteProtocolError` if it is no renewal request."""
        fields = Fields("renewal request", payload)
        told = fields.text("kind")
        kind = next((known for known in get_args(Kind) if known == told), None)
        if kind is None:
            raise fields.error(f"unknown kind {quoted(told)}")
        csr_der = fields.octets("csr", most=MAX_CSR_BYTES, default=b"")
        if bool(csr_der) != (kind == "renew"):
            raise fields.error("`renew` has a certification request, and `confirm` has none")
        return cls(
            kind=kind,
            nonce=fields.hex("nonce", length=NONCE_BYTES),
            leaf_sha256=fields.hex("leaf_sha256", length=SHA256_BYTES),
            anchors_sha256=fields.hexes("anchors_sha256", length=SHA256_BYTES, most=MAX_ANCHORS),
            signature=fields.octets("signature", most=MAX_SIGNATURE_BYTES),
            csr_der=csr_der,
        )


class AnchorUpdate(Frozen):
    """New trust anchors, all of them: they take the place of those that the device has."""

    anchors_der: tuple[bytes, ...]
    signer_der: bytes
    """The certificate of the CA that signed: an anchor of the device, or directly issued by one."""
    signature: bytes
    """Over the device id, the request's nonce and the new anchors: an old update cannot be played again."""

    def to_fields(self) -> dict[str, Any]:
        """Return it as it stands in an answer."""
        return {
            "anchors": [base64_text(each) for each in self.anchors_der],
            "signer": base64_text(self.signer_der),
            "signature": base64_text(self.signature),
        }

    @classmethod
    def from_fields(cls, fields: Fields) -> AnchorUpdate:
        """Read it from an answer; raises `RemoteProtocolError`."""
        anchors = fields.octets_list("anchors", most=MAX_ANCHORS, most_each=MAX_CERTIFICATE_BYTES)
        if not anchors:
            raise fields.error("'anchors' is empty")
        return cls(
            anchors_der=anchors,
            signer_der=fields.octets("signer", most=MAX_CERTIFICATE_BYTES),
            signature=fields.octets("signature", most=MAX_SIGNATURE_BYTES),
        )


class RenewalAnswer(Frozen):
    """What the station says to a device."""

    outcome: Outcome
    nonce: bytes = b""
    """Of the request that is answered; empty for `renew-now`."""
    leaf_der: bytes = b""
    """`issued`: the new certificate."""
    chain_der: tuple[bytes, ...] = ()
    """`issued`: what the device presents after its leaf."""
    anchors: AnchorUpdate | None = None
    """`issued`: new trust anchors, if there are any."""
    reason: str = ""
    """`refused`: why."""
    retry: bool = False
    """`refused`: whether asking again later makes sense."""
    retry_after_s: int = 0
    """`refused` with `retry`: not before so many seconds; `renew-now`: within so many, when the device draws. At
    most `MAX_WAIT_S`."""
    signature: bytes = b""
    """Of the CA that issued the certificate which the request was made with, or, for `renew-now`, the one in use;
    over the outcome, the nonce and that certificate. Empty where anybody may have said it."""

    def to_bytes(self) -> bytes:
        """Return the message's payload."""
        value: dict[str, Any] = {"outcome": self.outcome, "nonce": self.nonce.hex()}
        if self.leaf_der:
            value["leaf"] = base64_text(self.leaf_der)
            value["chain"] = [base64_text(each) for each in self.chain_der]
        if self.anchors is not None:
            value["anchors"] = self.anchors.to_fields()
        if self.outcome == "refused":
            value |= {"reason": self.reason, "retry": self.retry}
        if self.retry_after_s:
            value["retry_after_s"] = self.retry_after_s
        if self.signature:
            value["signature"] = base64_text(self.signature)
        return dump(value)

    @classmethod
    def from_bytes(cls, payload: bytes) -> RenewalAnswer:
        """Read a payload; raises `RemoteProtocolError` if it is no renewal answer."""
        fields = Fields("renewal answer", payload)
        told = fields.text("outcome")
        outcome = next((known for known in get_args(Outcome) if known == told), None)
        if outcome is None:
            raise fields.error(f"unknown outcome {quoted(told)}")
        leaf_der = fields.octets("leaf", most=MAX_CERTIFICATE_BYTES, default=b"")
        if bool(leaf_der) != (outcome == "issued"):
            raise fields.error("`issued` has a certificate, and nothing else has")
        anchors = fields.inner("anchors")
        retry_after_s = fields.whole("retry_after_s", default=0)
        if retry_after_s > MAX_WAIT_S:
            raise fields.error(f"'retry_after_s' is more than {MAX_WAIT_S}")
        return cls(
            outcome=outcome,
            nonce=fields.hex("nonce", length=NONCE_BYTES, default=b""),
            leaf_der=leaf_der,
            chain_der=fields.octets_list("chain", most=MAX_ISSUING, most_each=MAX_CERTIFICATE_BYTES),
            anchors=None if anchors is None else AnchorUpdate.from_fields(anchors),
            reason=fields.text("reason", default="")[:MAX_REASON_CHARACTERS],
            retry=fields.boolean("retry") if outcome == "refused" else False,
            retry_after_s=retry_after_s,
            signature=fields.octets("signature", most=MAX_SIGNATURE_BYTES, default=b""),
        )
