"""Bringing the CRLs to every gateway behind an upstream, over one connection to it.

Rules:

- Each CRL is published as DER, retained, on `fleet/crl/{issuer}`: a gateway that is away finds it there when it is
  back. That of the CA which issues now goes last, so that what a gateway says of it comes after all else.
- The receipts come on `gateway/{name}/receipts`. A gateway whose status has the number of our CRL goes by it: no
  two CRLs of a CA share one. That counts where no receipt is to come: nothing was published, or it is away.
- When all that are there have answered, those whose link is down are PENDING: nobody waits for them.
- The upstream must end up with the newest CRL, whoever published last. What it holds that is newer, of our CA, and
  lists all that ours does counts as ours (another station with the same registry, another command); one that lacks
  something of ours ends this, and says so. What is older, or is none of ours, is replaced.
- Topics are asked for one by one where a retained message is to be had: RabbitMQ gives none to a wildcard.
"""

from __future__ import annotations

import contextlib
import queue
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from birthmark.device.errors import BirthmarkError, RemoteProtocolError
from birthmark.device.identity import BrokerName
from birthmark.device.messages import GatewayStatus, Receipt
from birthmark.device.topics import fleet_crl, gateway_receipts, gateway_status
from birthmark.provisioning.cas import SHORT
from birthmark.provisioning.crls import signed_crl
from birthmark.provisioning.delivery import Delivery, Latest, Outcome, check_receipt, concluded
from birthmark.provisioning.gateway_contact import left

if TYPE_CHECKING:
    from birthmark.device.client import Client
    from birthmark.device.received import Message
    from birthmark.provisioning.crls import StoredCrl
    from birthmark.provisioning.gateway_contact import Contact

_QUIET_S: Final = 0.05
"""What is retained has come when nothing has for so long, after the last subscription was acknowledged."""
_MOST_PUBLICATIONS: Final = 3
"""Of one CRL: whoever overwrites it that often is somebody else's station, or is replaying."""


@dataclass(slots=True)
class _Known:
    """What one gateway said."""

    name: str
    status: GatewayStatus | None = None
    receipts: dict[str, Receipt] = field(default_factory=dict)
    """By the SHA-256 of the CRL that each is for."""
    trouble: str = ""
    """What was wrong with a receipt."""

    @property
    def is_away(self) -> bool:
        return self.status is not None and not self.status.online

    def told(self, latest: Latest, *, by_status: bool) -> dict[str, Receipt]:
        """Return the receipts for the CRLs that it is to have; `by_status`: its status speaks for missing ones."""
        told = {crl.sha256: self.receipts[crl.sha256] for crl in latest.crls.crls if crl.sha256 in self.receipts}
        if by_status and self.status is not None:
            for crl in latest.crls.crls:
                if crl.sha256 not in told and self.status.crl_numbers.get(crl.issuer) == crl.number:
                    told[crl.sha256] = _receipt_of(self.status, crl)
        return told


def by_upstream(contact: Contact, latest: Latest, deadline: float) -> list[Delivery]:
    """Bring the CRLs to the gateways behind an upstream; return what became of them at each.

    Raises:
        BirthmarkError: the upstream could not be used by the deadline (`time.monotonic`); no gateway is known to
            have anything.
    """
    latest.check_size()
    with contact.client("crl", deadline) as client:
        bringing = _Bringing(contact, latest, client, deadline)
        bringing.listen()
        bringing.bring()
    return bringing.deliveries()


class _Bringing:
    """One delivery to the gateways behind one upstream."""

    def __init__(self, contact: Contact, latest: Latest, client: Client, deadline: float) -> None:
        self._upstream = contact.upstream
        self._latest = latest
        self._client = client
        self._deadline = deadline
        self._inbox: queue.Queue[Message] = queue.Queue()
        self._gateways = {gateway.name.lower(): _Known(gateway.name) for gateway in contact.gateways}
        self._held: dict[str, bytes] = {}
        """What the upstream holds, by issuer, as far as it has said."""
        self._publications: dict[str, int] = {}
        """How often each CRL was published, by issuer; empty: none was."""
        self._conflict = ""
        """Why this cannot end well."""

    def listen(self) -> None:
        """Ask for everything, and take what is retained."""
        names = [BrokerName(known.name) for known in self._gateways.values()]
        topics = [gateway_receipts(name) for name in names]  # first, so that none is missed
        topics += [fleet_crl(crl.issuer) for crl in self._latest.crls.crls]
        topics += [gateway_status(name) for name in names]
        for asked in [self._client.subscribe(topic, self._inbox.put) for topic in topics]:
            asked.wait(left(self._deadline))
        with contextlib.suppress(queue.Empty):
            while not self._has_heard_all():
                self._take(self._inbox.get(timeout=_QUIET_S))

    def bring(self) -> None:
        """Publish what is lacking somewhere, and wait for the answers."""
        self._latest.has_moved()
        if not self._conflict and not self._is_in_place():
            for crl in reversed(self._latest.crls.crls):
                self._publish(crl)
        with contextlib.suppress(queue.Empty):
            while not self._conflict and not all(map(self._is_settled, self._gateways.values())):
                self._take(self._inbox.get(timeout=max(0.0, self._deadline - time.monotonic())))

    def deliveries(self) -> list[Delivery]:
        """Return what became of the CRLs at each gateway, by what is known now."""
        return [self._delivery(known) for known in self._gateways.values()]

    def _has_heard_all(self) -> bool:
        return len(self._held) == len(self._latest.crls.crls) and all(
            known.status is not None for known in self._gateways.values()
        )

    def _is_in_place(self) -> bool:
        """Whether the upstream holds every CRL, and whoever is there goes by it."""
        crls = self._latest.crls.crls
        return all(self._held.get(crl.issuer) == crl.der for crl in crls) and all(
            known.is_away or len(known.told(self._latest, by_status=True)) == len(crls)
            for known in self._gateways.values()
        )

    def _is_settled(self, known: _Known) -> bool:
        told = self._told(known)
        refused = any(receipt.outcome == "refused" for receipt in told.values())
        return known.is_away or refused or bool(known.trouble) or not self._latest.missing(told)

    def _told(self, known: _Known, *, is_over: bool = False) -> dict[str, Receipt]:
        return known.told(self._latest, by_status=is_over or known.is_away or not self._publications)

    def _publish(self, crl: StoredCrl) -> None:
        count = self._publications[crl.issuer] = self._publications.get(crl.issuer, 0) + 1
        if count > _MOST_PUBLICATIONS:
            self._conflict = (
                f"somebody else keeps putting another CRL of {crl.issuer[:SHORT]} in the place of ours at "
                f"{self._upstream}: is that another station?"
            )
            return
        self._client.publish(fleet_crl(crl.issuer), crl.der, retain=True, wait=left(self._deadline))

    def _take(self, message: Message) -> None:
        """Go by a message; what is no such message is nobody's word."""
        first, second, last = message.topic.split("/", 2)
        if first == "fleet":
            self._take_held(last, message.payload)
            return
        known = self._gateways[second.lower()]
        with contextlib.suppress(RemoteProtocolError):
            if last == "status":
                known.status = GatewayStatus.from_bytes(message.payload)
            elif not message.retained:  # a receipt of before: this attempt may fare better, or worse
                self._take_receipt(known, Receipt.from_bytes(message.payload))

    def _take_receipt(self, known: _Known, receipt: Receipt) -> None:
        for crl in self._latest.crls.crls:
            if crl.sha256 == receipt.crl_sha256:
                try:
                    check_receipt(receipt, known.name, crl)
                except BirthmarkError as error:
                    known.trouble = error.message
                else:
                    known.receipts[receipt.crl_sha256] = receipt

    def _take_held(self, issuer: str, payload: bytes) -> None:
        """See to it that the newest CRL is what the upstream holds last."""
        self._held[issuer] = payload
        wanted = next(crl for crl in self._latest.crls.crls if crl.issuer == issuer)
        if payload == wanted.der:
            return
        held = signed_crl(payload, self._latest.cas.issuing)
        if held is not None and held.issuer == issuer and held.number > wanted.number:
            if held.cert_serials >= wanted.cert_serials:
                self._latest.take(held)
            else:
                self._conflict = (
                    f"{self._upstream} holds CRL {held.number} of {issuer[:SHORT]}, and it lacks what our CRL "
                    f"{wanted.number} lists: was this station restored? take it over: birthmark restore --crl FILE"
                )
        elif self._publications:
            self._publish(wanted)

    def _delivery(self, known: _Known) -> Delivery:
        told = self._told(known, is_over=True)
        refused = any(receipt.outcome == "refused" for receipt in told.values())
        if refused or not (self._conflict or self._latest.missing(told)):
            return concluded(known.name, self._latest, told)
        return Delivery(known.name, Outcome.PENDING, self._conflict or known.trouble or self._silence(known))

    def _silence(self, known: _Known) -> str:
        if known.status is None:
            return f"{self._upstream} knows nothing of it: has it a link there, with fleet = true?"
        if known.is_away:
            return f"its link to {self._upstream} is down"
        return f"no receipt by way of {self._upstream}"


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
