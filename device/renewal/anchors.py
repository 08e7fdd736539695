"""Whether new trust anchors may take the place of a device's own (docs/renewal.md).

Rules, in this order; the first that is broken is the refusal:

1. One to four certificates, all different, each a CA's that may sign certificates.
2. The signer is a CA that may sign certificates, and is valid now; a device's or a broker's certificate is none.
3. The signer is one of the anchors that the device goes by now, or directly issued by one of them.
4. The signer's key signed the device's own id, the nonce of the device's own request and these anchors in this
   order. The nonce is fresh for every request: no update of before, and of no other device, passes.

Nobody else is asked: not the broker it came through, and no CA that the device does not trust already.

Loads `cryptography`: a client imports this when it renews, and not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from birthmark.device.certificate_facts import certificate_facts
from birthmark.device.clock import out_of_time
from birthmark.device.errors import RemoteProtocolError
from birthmark.device.link.bundle import MAX_ANCHORS
from birthmark.device.link.transcript import verify
from birthmark.device.renewal.proofs import anchors_transcript

if TYPE_CHECKING:
    from collections.abc import Sequence

    from birthmark.device.clock import Moment
    from birthmark.device.identity import DeviceId
    from birthmark.device.renewal.messages import AnchorUpdate

_HINT: Final = "nothing was changed; ask the station's operator: its CA, or the broker, is not what it should be"


def verified_anchors(
    update: AnchorUpdate, *, device_id: DeviceId, nonce: bytes, trusted_der: Sequence[bytes], moment: Moment
) -> tuple[bytes, ...]:
    """Check an update, and return the anchors that the device goes by from now on.

    Args:
        update: as it came.
        device_id: the device's own.
        nonce: of the device's own request that is answered.
        trusted_der: the anchors that the device goes by now.
        moment: the time, as far as the device knows it.

    Raises:
        RemoteProtocolError: a rule of this module is broken; nothing may be taken from the update.
    """
    try:
        cause = _fault(update, device_id, nonce, trusted_der, moment)
    except Exception as error:  # noqa: BLE001 - hostile DER: whatever the parser trips over is a refusal
        cause = f"a certificate does not parse ({type(error).__name__})"
    if cause:
        raise RemoteProtocolError(f"could not take new trust anchors: {cause}", hint=_HINT)
    return update.anchors_der


def _fault(
    update: AnchorUpdate, device_id: DeviceId, nonce: bytes, trusted_der: Sequence[bytes], moment: Moment
) -> str:
    anchors = [x509.load_der_x509_certificate(der) for der in update.anchors_der]
    if not 1 <= len(anchors) <= MAX_ANCHORS or len(set(update.anchors_der)) != len(anchors):
        return f"they are not 1 to {MAX_ANCHORS} different certificates"
    if not all(may_sign_certificates(anchor) for anchor in anchors):
        return "one of them is no CA's"
    signer = x509.load_der_x509_certificate(update.signer_der)
    if not may_sign_certificates(signer):
        return "they are signed by somebody who is no CA"
    if out_of_time([certificate_facts(update.signer_der)], moment) is not None:
        return "the CA that signed them is not valid now"
    if not any(_leads_to(signer, update.signer_der, der) for der in trusted_der):
        return "they are signed by a CA that leads to no anchor of this device"
    signed = anchors_transcript(device_id, nonce=nonce, anchors_der=update.anchors_der)
    key = signer.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not verify(key, update.signature, signed):
        return "their signature does not verify for this device and this request"
    return ""


def may_sign_certificates(certificate: x509.Certificate) -> bool:
    """Whether a certificate says that it is a CA's and may sign others (RFC 5280 sections 4.2.1.3, 4.2.1.9)."""
    extensions = certificate.extensions
    try:
        return (
            extensions.get_extension_for_class(x509.BasicConstraints).value.ca
            and extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
        )
    except x509.ExtensionNotFound:
        return False


def _leads_to(signer: x509.Certificate, signer_der: bytes, anchor_der: bytes) -> bool:
    if signer_der == anchor_der:
        return True
    anchor = x509.load_der_x509_certificate(anchor_der)
    try:
        signer.verify_directly_issued_by(anchor)
    except Exception:  # noqa: BLE001 - another name, a bad signature, an odd key: it did not issue this one
        return False
    return may_sign_certificates(anchor)
