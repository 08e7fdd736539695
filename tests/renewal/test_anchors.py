"""New trust anchors are taken from a CA that the device trusts already, for this device and this request alone."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, cast

import pytest
from support.pki import Authority, Pki, new_key, now

from birthmark.device.clock import Moment
from birthmark.device.errors import RemoteProtocolError
from birthmark.device.identity import DeviceId
from birthmark.device.link.transcript import sign, transcript
from birthmark.device.renewal.anchors import verified_anchors
from birthmark.device.renewal.messages import AnchorUpdate
from birthmark.device.renewal.proofs import anchors_transcript

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from support.pki import Issued

PKI = Pki.create()
NEXT = Authority.create("Next Root CA")
DEVICE, NONCE = DeviceId("sensor-1"), b"n" * 16


def update(
    anchors: Sequence[bytes] = (PKI.root.der, NEXT.der),
    *,
    signer: Authority | Issued = PKI.issuing,
    device_id: DeviceId = DEVICE,
    nonce: bytes = NONCE,
) -> AnchorUpdate:
    signed = anchors_transcript(device_id, nonce=nonce, anchors_der=anchors)
    return AnchorUpdate(tuple(anchors), signer.der, sign(cast("EllipticCurvePrivateKey", signer.key), signed))


def taken(told: AnchorUpdate, *, trusted: Sequence[bytes] = (PKI.root.der,)) -> tuple[bytes, ...]:
    return verified_anchors(told, device_id=DEVICE, nonce=NONCE, trusted_der=trusted, moment=Moment(now()))


@pytest.mark.parametrize("signer", [PKI.issuing, PKI.root], ids=["issued by an anchor", "an anchor itself"])
def test_a_ca_under_an_anchor_may_bring_new_ones(signer: Authority) -> None:
    assert taken(update(signer=signer)) == (PKI.root.der, NEXT.der)
    assert taken(update((NEXT.der,), signer=signer), trusted=(NEXT.der, PKI.root.der)) == (NEXT.der,)


def rogue_issuing() -> Authority:
    return Authority.create("Test Issuing CA", parent=Authority.create("Test Root CA", key=new_key()))


@pytest.mark.parametrize(
    ("told", "cause"),
    [
        (update(signer=PKI.stranger), "leads to no anchor"),
        (update(signer=rogue_issuing()), "leads to no anchor"),
        (update(signer=NEXT), "leads to no anchor"),
        (update(signer=PKI.device("sensor-1")), "no CA"),
        (update(signer=PKI.issuing.server("localhost")), "no CA"),
        (update(signer=Authority.create("Below", parent=PKI.issuing)), "leads to no anchor"),
        (update(signer=PKI.stranger).changed(signer_der=PKI.issuing.der), "signature does not verify"),
        (update().changed(anchors_der=(NEXT.der,)), "signature does not verify"),
        (update().changed(anchors_der=(NEXT.der, PKI.root.der)), "signature does not verify"),
        (update(device_id=DeviceId("sensor-2")), "signature does not verify"),
        (update(nonce=b"o" * 16), "signature does not verify"),
        (update().changed(signature=b""), "signature does not verify"),
        (update((NEXT.der, NEXT.der)), "different certificates"),
        (update((NEXT.der, PKI.device().der)), "no CA's"),
        (update((b"junk",)), "does not parse"),
        (update().changed(signer_der=b"junk"), "does not parse"),
    ],
)
def test_anything_else_is_refused(told: AnchorUpdate, cause: str) -> None:
    with pytest.raises(RemoteProtocolError, match=cause):
        taken(told)


def test_a_signature_for_another_purpose_is_none_for_this() -> None:
    digests = anchors_transcript(DEVICE, nonce=NONCE, anchors_der=(NEXT.der,))[-32:]
    signed = transcript("BIRTHMARK-UNLOCK-1", b"sensor-1", NONCE, digests)
    told = AnchorUpdate(
        (NEXT.der,), PKI.issuing.der, sign(cast("EllipticCurvePrivateKey", PKI.issuing.key), signed)
    )
    with pytest.raises(RemoteProtocolError, match="signature does not verify"):
        taken(told)


def test_a_stolen_issuing_ca_is_believed_for_as_long_as_the_device_holds_its_root() -> None:
    """No device looks at a root's CRL: only a new root shuts out an issuing CA under the old one."""
    stolen, attackers = Authority.create("Stolen", parent=PKI.root), Authority.create("Attacker's Root")
    told = update((attackers.der,), signer=stolen)
    assert taken(told, trusted=(PKI.root.der,)) == (attackers.der,)
    assert taken(told, trusted=(PKI.root.der, NEXT.der)) == (attackers.der,), "while it holds both"
    with pytest.raises(RemoteProtocolError, match="leads to no anchor"):
        taken(told, trusted=(NEXT.der,))


def test_a_ca_that_has_expired_signs_nothing() -> None:
    ended = Authority.create("Ended", parent=PKI.root, not_after=now() - dt.timedelta(days=1))
    with pytest.raises(RemoteProtocolError, match="not valid now"):
        taken(update(signer=ended))


def test_a_key_of_another_kind_is_a_refusal_and_no_crash() -> None:
    root = Authority.create("RSA Root", key=new_key("rsa"))
    told = AnchorUpdate((root.der,), root.der, b"0" * 64)
    with pytest.raises(RemoteProtocolError, match="signature does not verify"):
        taken(told, trusted=(root.der,))
