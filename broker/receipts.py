"""What the gateway says about each CRL that it was brought (`device.messages.Receipt`).

Rules for the files: the receipt for a CRL file is beside it, its name with `.receipt` appended. If the file holds
the CRLs of several issuing CAs, each has one of its own, with the CA's key identifier before `.receipt`, and the
one without is the worst of them: refused, then installed, then current.
"""

from __future__ import annotations

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
