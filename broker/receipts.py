"""What the gateway says about each CRL that it was brought (`device.messages.Receipt`).

Rules for the files: the receipt for a CRL file is beside it, its name with `.receipt` appended. If the file holds
the CRLs of several issuing CAs, each has one of its own, with the CA's key identifier before `.receipt`, and the
one without is the worst of them: refused, then installed, then current.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from birthmark.device.durable import write_durably
from birthmark.device.messages import ClosedIdentity, Receipt

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from birthmark.broker.revocation import Installation

FILE_MODE = 0o644
"""The station may read it as another user; nothing in it is secret."""
_SEVERITY = ("refused", "installed", "current")

_log = logging.getLogger(__name__)


def receipt_of(
    answer: Installation,
    *,
    gateway: str,
    installed_at: float,
    elapsed_ms: float,
    closed: tuple[ClosedIdentity, ...],
) -> Receipt:
    """Return the receipt for one CRL; what was done, and when, comes from the caller."""
    reason = f"{answer.reason} ({answer.hint})" if answer.hint else answer.reason
    return Receipt(
        gateway=gateway,
        outcome=answer.outcome,
        issuer=answer.issuer,
        crl_number=answer.number,
        crl_sha256=answer.sha256,
        revoked_count=answer.revoked_count,
        installed_at=installed_at,
        elapsed_ms=elapsed_ms,
        closed=closed,
        reason=reason,
    )


def write_receipts(receipt_path: Path, receipts: Sequence[Receipt]) -> None:
    """Write the receipts for a CRL file.

    Raises:
        OSError: one could not be written; an older one is still there.
    """
    if not receipts:
        return
    if len(receipts) > 1:
        for receipt in receipts:
            beside = receipt_path.with_name(f"{receipt_path.stem}.{receipt.issuer}{receipt_path.suffix}")
            write_durably(beside, receipt.to_bytes(), mode=FILE_MODE)
    worst = min(receipts, key=lambda receipt: _SEVERITY.index(receipt.outcome))
    write_durably(receipt_path, worst.to_bytes(), mode=FILE_MODE)


def try_to_write_receipts(receipt_path: Path, receipts: Sequence[Receipt]) -> None:
    """As `write_receipts`, but what cannot be written is logged: the CRL was judged all the same."""
    try:
        write_receipts(receipt_path, receipts)
    except OSError as error:
        cause = error.strerror or error
        _log.error("could not write the receipt %s: %s; the station will call it pending", receipt_path, cause)


def log_receipt(receipt: Receipt, origin: str) -> None:
    """Log what became of a CRL that came from `origin`."""
    fields: dict[str, object] = {"event": f"crl_{receipt.outcome}", "origin": origin}
    if receipt.outcome == "refused":
        fields |= {"reason": receipt.reason}
        _log.error(
            "refused a CRL from %s: %s; what was in force stays", origin, receipt.reason, extra={"fields": fields}
        )
        return
    fields |= {"crl_number": receipt.crl_number, "revoked": receipt.revoked_count, "closed": len(receipt.closed)}
    _log.info(
        "CRL %s from %s: %s; certificates revoked: %s, identities closed: %s, %.1f ms",
        receipt.crl_number,
        origin,
        receipt.outcome,
        receipt.revoked_count,
        len(receipt.closed),
        receipt.elapsed_ms,
        extra={"fields": fields},
    )
