"""The device's keys in a renewal: made, asked for, and what comes back checked (docs/renewal.md).

What comes back is taken only if

1. it answers our own request (its nonce),
2. new trust anchors, if there are any, are signed by a CA under an anchor that we have (`anchors`),
3. the certificate is for our new key and our id, and fits its chain (docs/serial-protocol.md section 5),
4. the chain leads to an anchor, old or new: a broker cannot talk us out of the identity that we have.

An answer that is no certificate is the station's if the CA that issued our certificate signed it
(`is_from_station`); any other may be the gateway's alone.

Loads `cryptography`: a client imports this when it renews, and not before.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from birthmark.device.agent.keys import key_from_der, key_to_der, make_key, signing_request
from birthmark.device.agent.slots import Slot
from birthmark.device.certificate_facts import certificate_facts
from birthmark.device.errors import CredentialError, RemoteProtocolError
from birthmark.device.link.bundle import Bundle, check_bundle
from birthmark.device.link.transcript import sign, verify
from birthmark.device.renewal.anchors import may_sign_certificates, verified_anchors
from birthmark.device.renewal.messages import NONCE_BYTES, RenewalAnswer, RenewalRequest
from birthmark.device.renewal.proofs import answer_transcript, confirm_transcript, request_transcript
from birthmark.device.renewal.store import AskedKey

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from birthmark.device.clock import Moment
    from birthmark.device.identity import DeviceId


def new_key(device_id: DeviceId) -> AskedKey:
    """Make a key, and the certification request for it."""
    key = make_key()
    return AskedKey(key_to_der(key), signing_request(key, device_id.text))


def key_of(candidate: Slot) -> AskedKey:
    """Return the key of a certificate that was granted, to ask for it once more."""
    key = key_from_der(candidate.key_der)
    return AskedKey(candidate.key_der, signing_request(key, candidate.bundle.config.device_id.text))


def renewal_request(current: Slot, asked: AskedKey) -> RenewalRequest:
    """Ask for a certificate of the new key, with the current one."""
    nonce, anchors_sha256 = secrets.token_bytes(NONCE_BYTES), _digests(current.bundle.anchors_der)
    signed = request_transcript(
        current.bundle.config.device_id,
        nonce=nonce,
        leaf_sha256=current.leaf_sha256,
        csr_der=asked.csr_der,
        anchors_sha256=anchors_sha256,
    )
    signature = sign(key_from_der(current.key_der), signed)
    return RenewalRequest("renew", nonce, current.leaf_sha256, anchors_sha256, signature, asked.csr_der)


def confirmation(renewed: Slot) -> RenewalRequest:
    """Say that the new certificate works."""
    nonce, anchors_sha256 = secrets.token_bytes(NONCE_BYTES), _digests(renewed.bundle.anchors_der)
    signed = confirm_transcript(
        renewed.bundle.config.device_id,
        nonce=nonce,
        leaf_sha256=renewed.leaf_sha256,
        anchors_sha256=anchors_sha256,
    )
    signature = sign(key_from_der(renewed.key_der), signed)
    return RenewalRequest("confirm", nonce, renewed.leaf_sha256, anchors_sha256, signature)


def granted(
    answer: RenewalAnswer, request: RenewalRequest, *, current: Slot, asked: AskedKey, moment: Moment
) -> Slot:
    """Check what came back, by the rules of this module, and return the slot that is to be tried.

    Raises:
        RemoteProtocolError: a rule is broken; nothing may be taken from the answer.
        ProtocolError: the certificate does not fit its chain, the key or the id.
    """
    if answer.outcome != "issued" or answer.nonce != request.nonce:
        raise RemoteProtocolError("could not take a renewed certificate: it answers another request")
    config, trusted = current.bundle.config, current.bundle.anchors_der
    anchors = trusted
    if answer.anchors is not None:
        anchors = verified_anchors(
            answer.anchors, device_id=config.device_id, nonce=request.nonce, trusted_der=trusted, moment=moment
        )
    try:
        begins_at = int(certificate_facts(answer.leaf_der).not_before.timestamp())
    except CredentialError as error:
        raise RemoteProtocolError(f"could not take a renewed certificate: {error.message}") from error
    bundle = Bundle(
        leaf_der=answer.leaf_der,
        issuing_der=answer.chain_der,
        anchors_der=anchors,
        config=config,
        issued_at=max(current.bundle.issued_at, begins_at),
    )
    check_bundle(bundle, key_from_der(asked.key_der).public_key())
    if not _leads_to_one(bundle, {*trusted, *anchors}):
        raise RemoteProtocolError("could not take a renewed certificate: it leads to no anchor of this device")
    return Slot(current.txn, asked.key_der, bundle)


def is_from_station(answer: RenewalAnswer, slot: Slot) -> bool:
    """Whether the CA that issued the slot's certificate signed the answer, for that certificate."""
    bundle = slot.bundle
    signed = answer_transcript(
        bundle.config.device_id, outcome=answer.outcome, nonce=answer.nonce, leaf_sha256=slot.leaf_sha256
    )
    issuer = _issuer_of(bundle.leaf_der, (*bundle.issuing_der, *bundle.anchors_der))
    key = None if issuer is None else issuer.public_key()
    return isinstance(key, EllipticCurvePublicKey) and verify(key, answer.signature, signed)


def _leads_to_one(bundle: Bundle, anchors_der: set[bytes]) -> bool:
    last_der = (bundle.leaf_der, *bundle.issuing_der)[-1]
    return last_der in anchors_der or _issuer_of(last_der, anchors_der) is not None


def _issuer_of(certificate_der: bytes, among_der: Iterable[bytes]) -> x509.Certificate | None:
    """Return the CA that issued a certificate; None if it is none of these."""
    certificate = x509.load_der_x509_certificate(certificate_der)
    for issuer in map(x509.load_der_x509_certificate, among_der):
        try:
            certificate.verify_directly_issued_by(issuer)
        except Exception:  # noqa: BLE001, S112 - another name, a bad signature, an odd key: it did not issue this one
            continue
        if may_sign_certificates(issuer):
            return issuer
    return None


def _digests(certificates_der: Sequence[bytes]) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(each).digest() for each in certificates_der)
