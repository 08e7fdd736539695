"""Bringing the CRLs to a gateway that watches a file.

Rules:

- The CRLs are written durably to the gateway's `crl_path` (PEM); the receipt appears beside it, under the same
  name with `.receipt` appended, or, for one of several, with its CA's key identifier before that. Once the one
  without has changed, all of them are there.
- Another command may sign and bring a newer CRL meanwhile. It lists all that this one does, so it counts as well;
  and a gateway's file that ours has overwritten is given the newer one again.
"""

from __future__ import annotations

import os
import stat
import time
from typing import TYPE_CHECKING, Final

from birthmark.device.durable import write_durably
from birthmark.device.errors import BirthmarkError
from birthmark.device.messages import Receipt
from birthmark.provisioning.cas import SHORT
from birthmark.provisioning.delivery import Latest, check_receipt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import TypeAlias

    from birthmark.provisioning.crl_store import CrlSet

    _Identity: TypeAlias = tuple[int, int, int]

CRL_FILE_MODE: Final = 0o644
_POLL_S: Final = 0.02
_MAX_RECEIPT_BYTES: Final = 16 * 1024 * 1024


def by_path(name: str, crl_path: Path, latest: Latest, deadline: float) -> dict[str, Receipt]:
    """Return the receipts by the SHA-256 of the CRL that each is for.

    Raises:
        BirthmarkError: what was wrong with what was there by the deadline (`time.monotonic`).
        OSError: the CRLs could not be written.
    """
    paths = _receipt_paths(crl_path, latest.crls)
    before = {path: _identity(path) for path in paths}
    write_durably(crl_path, latest.crls.pem, mode=CRL_FILE_MODE)
    while latest.has_moved():
        # Whoever signed it may have brought it already: then ours has just overwritten it.
        write_durably(crl_path, latest.crls.pem, mode=CRL_FILE_MODE)
    looked_at = None
    while True:
        told = _identity(paths[0])  # before the receipts are read: when it changes, they all have
        receipts, last_problem = _receipts_in(paths, before, latest.crls)
        missing = latest.missing(receipts)
        if missing and told != looked_at:
            looked_at = told
            if latest.has_moved():
                continue
        for crl in latest.crls.crls:
            if crl.sha256 in receipts:
                check_receipt(receipts[crl.sha256], name, crl)
        is_over = time.monotonic() >= deadline
        if not missing and (len(receipts) == len(latest.crls.crls) or told != before[paths[0]] or is_over):
            return receipts
        if is_over:
            raise BirthmarkError(last_problem)
        time.sleep(_POLL_S)


def _receipt_paths(crl_path: Path, crls: CrlSet) -> list[Path]:
    """Return where receipts may be, the one for the whole file first."""
    names = ["", *(f".{crl.issuer}" for crl in crls.crls)]
    return [crl_path.with_name(f"{crl_path.name}{name}.receipt") for name in names]


def _receipts_in(
    paths: Sequence[Path], before: Mapping[Path, _Identity | None], crls: CrlSet
) -> tuple[dict[str, Receipt], str]:
    """Return the receipts for our CRLs by SHA-256, and what was wrong with what else is there."""
    wanted = {crl.sha256 for crl in crls.crls}
    receipts: dict[str, Receipt] = {}
    problem = f"no receipt at {paths[0]}"
    for path in reversed(paths):
        try:
            receipt = _read_receipt(path)
        except BirthmarkError as error:
            problem = error.message
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                problem = f"could not read the receipt {path}: {error.strerror}"
        else:
            # A refusal that was there before is of an earlier attempt: this one may fare better.
            is_new = _identity(path) != before[path] or receipt.outcome != "refused"
            if receipt.crl_sha256 in wanted and is_new:
                receipts[receipt.crl_sha256] = receipt
            else:
                problem = f"the receipt {path} is for another CRL"
    if receipts and len(wanted) > 1:
        lacking = next((crl for crl in crls.crls if crl.sha256 not in receipts), None)
        problem = (
            f"no receipt for the CRL of {lacking.issuer[:SHORT]}: does it trust that CA?" if lacking else problem
        )
    return receipts, problem


def _read_receipt(path: Path) -> Receipt:
    # Not blocking: whoever may write there may also have put a pipe there, which nobody ever writes to.
    with open(path, "rb", opener=_without_blocking) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise BirthmarkError(f"could not read the receipt {path}: it is no regular file")
        content = file.read(_MAX_RECEIPT_BYTES + 1)
    if len(content) > _MAX_RECEIPT_BYTES:
        raise BirthmarkError(f"could not read the receipt {path}: it is too long")
    return Receipt.from_bytes(content)


def _without_blocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _identity(path: Path) -> _Identity | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
