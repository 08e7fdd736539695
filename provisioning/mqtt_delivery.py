"""Bringing the CRLs to a gateway over MQTT, at its own broker.

Rules: each is published as DER on `gateway/{name}/crl` with QoS 1 by an operator; the receipts come on
`gateway/{name}/receipts`. What another command signs meanwhile lists all that ours does, and is brought instead.
"""

from __future__ import annotations

import contextlib
import queue
import time
from typing import TYPE_CHECKING

from birthmark.device.errors import RemoteProtocolError, UnreachableError
from birthmark.device.identity import BrokerName
from birthmark.device.messages import Receipt
from birthmark.device.topics import gateway_crl, gateway_receipts
from birthmark.provisioning.delivery import check_receipt
from birthmark.provisioning.gateway_contact import left

if TYPE_CHECKING:
    from birthmark.device.received import Message
    from birthmark.provisioning.crl_store import StoredCrl
    from birthmark.provisioning.delivery import Latest
    from birthmark.provisioning.gateway_contact import Contact


def by_mqtt(contact: Contact, latest: Latest, deadline: float) -> dict[str, Receipt]:
    """Return the receipts by the SHA-256 of the CRL that each is for.

    Raises:
        BirthmarkError: the gateway could not be reached by the deadline (`time.monotonic`), or gave no receipt.
    """
    latest.check_size()
    (gateway,) = contact.gateways
    name = BrokerName(gateway.name)
    payloads: queue.Queue[bytes] = queue.Queue()

    def keep(message: Message) -> None:
        if not message.retained:  # of an attempt before: this one may fare better, or worse
            payloads.put(message.payload)

    with contact.client("crl", deadline) as client:
        # Listen first, so that no receipt is missed.
        client.subscribe(gateway_receipts(name), keep, wait=left(deadline))
        receipts: dict[str, Receipt] = {}
        while True:
            for crl in [crl for crl in latest.crls.crls if crl.sha256 not in receipts]:
                client.publish(gateway_crl(name), crl.der, wait=left(deadline))
                try:
                    receipts[crl.sha256] = _receipt_for(crl, payloads, deadline)
                except queue.Empty as error:
                    raise UnreachableError(f"no receipt from {gateway.reached_by}") from error
            refused = any(receipt.outcome == "refused" for receipt in receipts.values())
            if not refused or not latest.has_moved():
                for crl in latest.crls.crls:
                    check_receipt(receipts[crl.sha256], gateway.name, crl)
                return {crl.sha256: receipts[crl.sha256] for crl in latest.crls.crls}


def _receipt_for(crl: StoredCrl, payloads: queue.Queue[bytes], deadline: float) -> Receipt:
    """Return the first receipt for `crl`; others, and what is no receipt, are not ours to judge."""
    while True:
        payload = payloads.get(timeout=left(deadline))
        with contextlib.suppress(RemoteProtocolError):
            receipt = Receipt.from_bytes(payload)
            if receipt.crl_sha256 == crl.sha256:
                return receipt
        if time.monotonic() >= deadline:
            raise queue.Empty
