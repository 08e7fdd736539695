"""The gateway's own certificate: how long its clients will take it.

Rules:

- It is an alarm before it expires, in time for a person to renew it: 30 days, or the last third of its life if
  that is less. It is one, at error level, once it has expired or while it is not valid yet by this clock.
- None of these stops the gateway. Its clients judge the certificate, by clocks of their own, and the gateway's own
  clock may be the one that is wrong.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509

from birthmark.broker.alarms import Alarm
from birthmark.device.escape import escaped

if TYPE_CHECKING:
    from pathlib import Path

DUE_BEFORE = timedelta(days=30)
"""How long before its end a certificate is to be renewed; a third of its life, if that is less."""


@dataclass(frozen=True, slots=True)
class OwnCertificate:
    """What the alarms need to know of it."""

    hosts: tuple[str, ...]
    """The names and addresses it is for, fit for a terminal."""
    not_before: datetime
    not_after: datetime
    path: Path
    """The file it is from."""

    def is_current(self, now: datetime) -> bool:
        """Return whether it is valid at that time."""
        return self.not_before <= now <= self.not_after

    def alarms(self, now: datetime) -> list[Alarm]:
        """Return what about it needs a person: not valid yet, due for renewal, expired."""
        shown = f"the gateway's own certificate, in {self.path},"
        hosts = " ".join(self.hosts) or "HOST"
        renew = f"`birthmark issue-broker {hosts} --renew` at the station, then bring server.pem here"
        if now < self.not_before:
            message = f"{shown} is not valid before {_shown(self.not_before)}: clients refuse it until then"
            hint = f"compare this gateway's clock with the station's; if both are right: {renew}"
            return [Alarm("certificate-not-yet-valid", message, hint, logging.ERROR)]
        if now > self.not_after:
            message = f"{shown} expired on {_shown(self.not_after)}: clients refuse it"
            return [Alarm("certificate-expired", message, renew, logging.ERROR)]
        if self.not_after - now < min(DUE_BEFORE, (self.not_after - self.not_before) / 3):
            message = f"{shown} expires on {_shown(self.not_after)}; clients refuse it from then on"
            return [Alarm("certificate-due", message, renew)]
        return []


def read_own_certificate(path: Path) -> OwnCertificate | None:
    """Read the first certificate of a PEM file that `tls.server_context` has taken.

    Returns:
        None if OpenSSL reads it but `cryptography` does not: there is nothing to warn by, and clients judge it.

    Raises:
        OSError: the file cannot be read any more.
    """
    content = path.read_bytes()
    try:
        leaf = x509.load_pem_x509_certificates(content)[0]
        return OwnCertificate(_hosts(leaf), leaf.not_valid_before_utc, leaf.not_valid_after_utc, path)
    except ValueError:
        return None


def _hosts(leaf: x509.Certificate) -> tuple[str, ...]:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(escaped(str(name.value)) for name in names if isinstance(name, x509.DNSName | x509.IPAddress))


def _shown(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%F %T} UTC"
