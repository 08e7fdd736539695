"""Bringing the CRLs to every gateway behind an upstream, over a connection to each of its servers (`broadcast`).

Rules:

- Each CRL is published as DER on `fleet/crl/{issuer}`. That of the CA which issues now goes last, so that what a
  gateway says of it comes after all else.
- The receipts come on `gateway/{name}/receipts`. A gateway whose status has the number of our CRL goes by it: no
  two CRLs of a CA share one.
- What the upstream holds that is newer, of our CA, and lists all that ours does counts as ours (another station
  with the same registry, another command). One that lacks something of ours ends this, and says so.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from birthmark.device.errors import BirthmarkError
from birthmark.device.messages import GatewayStatus, Receipt
from birthmark.device.topics import fleet_crl, gateway_receipts
from birthmark.provisioning.broadcast import Broadcast, Known
from birthmark.provisioning.cas import SHORT
from birthmark.provisioning.crl_store import signed_crl
from birthmark.provisioning.delivery import Delivery, Latest, Outcome, check_receipt, concluded

if TYPE_CHECKING:
    from birthmark.device.identity import BrokerName
    from birthmark.provisioning.crl_store import StoredCrl
    from birthmark.provisioning.gateway_contact import Connected, Contact


def by_upstream(contact: Contact, latest: Latest, deadline: float) -> list[Delivery]:
    """Bring the CRLs to the gateways behind an upstream; return what became of them at each.

    Raises:
        BirthmarkError: the upstream could not be used by the deadline (`time.monotonic`); no gateway is known to
            have anything.
    """
    latest.has_moved()
    latest.check_size()
    with contact.connected("crl", deadline) as connected:
        broadcast = _CrlBroadcast(contact, latest, connected, deadline)
        broadcast.run()
    return [broadcast.delivery(known) for known in broadcast.gateways.values()]


class _CrlBroadcast(Broadcast[Receipt]):
    """The CRLs, put before the gateways behind an upstream."""

    def __init__(self, contact: Contact, latest: Latest, connected: Connected, deadline: float) -> None:
        super().__init__(contact, connected, deadline)
        self._latest = latest

    @property
    def wanted(self) -> dict[str, bytes]:
        return {fleet_crl(crl.issuer): crl.der for crl in reversed(self._latest.crls.crls)}

    def receipts_topic(self, name: BrokerName) -> str:
        return gateway_receipts(name)

    def take_receipt(self, known: Known[Receipt], payload: bytes) -> None:
        receipt = Receipt.from_bytes(payload)
        for crl in self._latest.crls.crls:
            if crl.sha256 == receipt.crl_sha256:
                try:
                    check_receipt(receipt, known.name, crl)
                except BirthmarkError as error:
                    known.trouble = error.message
                else:
                    known.keep(receipt.crl_sha256, receipt)
                    known.trouble = ""

    def told(self, known: Known[Receipt], *, by_status: bool) -> dict[str, Receipt]:
        crls = self._latest.crls.crls
        told = {crl.sha256: known.receipts[crl.sha256] for crl in crls if crl.sha256 in known.receipts}
        if by_status and known.status is not None:
            for crl in crls:
                if crl.sha256 not in told and known.status.crl_numbers.get(crl.issuer) == crl.number:
                    told[crl.sha256] = _receipt_of(known.status, crl)
        return told

    def is_complete(self, told: dict[str, Receipt]) -> bool:
        return not self._latest.missing(told)

    def supersedes(self, topic: str, payload: bytes) -> bool:
        wanted = next(crl for crl in self._latest.crls.crls if fleet_crl(crl.issuer) == topic)
        held = signed_crl(payload, self._latest.cas.issuing)
        if held is None or held.issuer != wanted.issuer or held.number <= wanted.number:
            return False
        if held.cert_serials >= wanted.cert_serials:
            self._latest.take(held)
        else:
            self.conflict = (
                f"{self.where} holds CRL {held.number} of {wanted.issuer[:SHORT]}, and it lacks what our CRL "
                f"{wanted.number} lists: was this station restored? take it over: birthmark restore --crl FILE"
            )
        return True

    def delivery(self, known: Known[Receipt]) -> Delivery:
        """Return what became of the CRLs at a gateway."""
        told = self.final(known)
        refused = any(receipt.outcome == "refused" for receipt in told.values())
        if refused or (self.is_complete(told) and not self.conflict):
            return replace(concluded(known.name, self._latest, told), missed=self.missed)
        cause = self.conflict or known.trouble or self.silence(known)
        return Delivery(known.name, Outcome.PENDING, cause, missed=self.missed)


def _receipt_of(status: GatewayStatus, crl: StoredCrl) -> Receipt:
    """Return the receipt that a gateway with this CRL in force would give."""
    return Receipt(
        gateway=status.gateway,
        outcome="current",
        issuer=crl.issuer,
        crl_number=crl.number,
        crl_sha256=crl.sha256,
        revoked_count=len(crl.cert_serials),
        installed_at=status.clock,
        elapsed_ms=0.0,
    )
