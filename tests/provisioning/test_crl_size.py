"""What 200,000 revocations cost: a CRL grows with what is on it, and with nothing else."""

from __future__ import annotations

import os
import secrets
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from cryptography import x509

from birthmark.provisioning import profile

if TYPE_CHECKING:
    from collections.abc import Callable

    from birthmark.provisioning.station import Station

WHOLE = os.environ.get("BIRTHMARK_PROOF") == "whole"
COUNT = 200_000 if WHOLE else 2_000
ENTRY_BYTES = 56
"""A serial number of 20 octets, a time and a reason, each in its DER."""


@pytest.mark.proof
def test_a_crl_of_many_revocations(station: Station, proven: Callable[[str], None]) -> None:
    authority, now = station.authority, station.clock()
    for count in (COUNT // 4, COUNT // 2, COUNT):
        revoked = [
            profile.Revoked(profile.new_cert_serial(secrets.token_bytes), now, x509.ReasonFlags.key_compromise)
            for _ in range(count)
        ]
        began = time.process_time()
        der = authority.sign_crl(number=1, this_update=now, next_update=now + timedelta(days=30), revoked=revoked)
        spent_s = time.process_time() - began
        proven(f"{count:,} revocations: {spent_s:.2f} s of CPU time, {len(der) / 1e6:.2f} MB")
        assert len(der) < 1_000 + count * ENTRY_BYTES
    crl = x509.load_der_x509_crl(der)
    assert {entry.serial_number for entry in crl} == {item.cert_serial for item in revoked}
