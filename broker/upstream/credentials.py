"""How the gateway shows itself to an upstream, and whom it takes for it.

Rules (RFC 9325, and as a device does it: `device/tls.py`):

- TLS 1.2 or newer, mutual. The upstream's certificate leads to one of the CAs in `ca` and to nothing else (an
  issuing CA may stand there without its root), and is for the name or address that was asked for.
- Every handshake is a full one: the upstream's certificate is judged each time, its dates included.
- The key is in a file of its owner alone. The certificate is a client's; what else is in it is for the upstream to
  judge, which need not be of our CA.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from birthmark.broker.alarms import Alarm
from birthmark.device.certificate_facts import CertificateFacts, certificate_facts
from birthmark.device.errors import ConfigurationError, CredentialError, IdentityError
from birthmark.device.escape import escaped
from birthmark.device.identity import DeviceId
from birthmark.device.pem import CERTIFICATE, read_blocks

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from birthmark.broker.upstream.settings import UpstreamSettings

DUE_BEFORE = timedelta(days=30)
"""How long before its end our certificate is to be renewed; a third of its life, if that is less."""
_OTHERS = 0o077
_HINT = "it holds key, certificate and chain of this gateway: birthmark issue-operator NAME --role service-gateway"


class _Socket(ssl.SSLSocket):
    """One that closes itself: `wrap_socket` drops it, open, if the peer resets the connection at that moment."""

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class UpstreamCredentials:
    """What is read from the files of an upstream."""

    context: ssl.SSLContext
    facts: CertificateFacts
    """Of our certificate."""
    common_name: str
    path: Path

    @property
    def identity(self) -> DeviceId:
        """Our name, as far as it is one by our grammar; for messages."""
        try:
            return DeviceId(self.common_name)
        except IdentityError:
            return DeviceId("this-gateway")

    def alarms(self, upstream: str, now: datetime) -> list[Alarm]:
        """Return whether our certificate is about to expire, or out of time."""
        since, until = self.facts.not_before, self.facts.not_after
        if since <= now and until - now >= min(DUE_BEFORE, (until - since) / 3):
            return []
        verdict = self.facts.out_of_time_at(now) or f"expires on {until:%F %T} UTC"
        message = f"our certificate for the upstream {upstream}, in {self.path}, {_is(verdict)}"
        hint = f"`birthmark issue-operator {escaped(self.common_name)} --renew` at the station, then bring it here"
        return [Alarm("upstream-certificate-due", message, hint)]


def _is(verdict: str) -> str:
    return verdict if verdict.startswith("expires") else f"is {verdict}"


def read_credentials(settings: UpstreamSettings) -> UpstreamCredentials:
    """Read the files of an upstream.

    Raises:
        ConfigurationError: one is missing, unreadable or not what it should be.
    """
    path, ca_path = settings.credentials_path, settings.ca_path
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.sslsocket_class = _Socket
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VERIFY_X509_STRICT
    try:
        context.load_cert_chain(path, password=_no_passphrase)
        is_open = bool(path.stat().st_mode & _OTHERS)
        facts = _leaf(path)
    except (OSError, ValueError, CredentialError) as error:
        raise _unusable(settings, path, _cause(error), _HINT) from error
    if is_open:
        raise _unusable(settings, path, "others than its owner may read the key", f"chmod 600 {path}")
    if len(facts.common_names) != 1:
        raise _unusable(settings, path, f"its certificate has {len(facts.common_names)} CNs instead of one", _HINT)
    try:
        context.load_verify_locations(cafile=ca_path)
    except (OSError, ValueError) as error:
        hint = "it holds the CA that has signed the upstream's certificate, in PEM"
        raise _unusable(settings, ca_path, _cause(error), hint) from error
    return UpstreamCredentials(context, facts, facts.common_names[0], path)


def _leaf(path: Path) -> CertificateFacts:
    found = [der for label, der in read_blocks(path.read_bytes()) if label == CERTIFICATE]
    return certificate_facts(found[0])  # OpenSSL has found one


def _unusable(settings: UpstreamSettings, path: Path, cause: str, hint: str) -> ConfigurationError:
    return ConfigurationError(f"could not use {path} for the upstream {settings.name}: {cause}", hint=hint)


def _no_passphrase() -> str:
    raise ValueError("its key is encrypted")


def _cause(error: Exception) -> str:
    if isinstance(error, CredentialError):
        return error.message
    if isinstance(error, ssl.SSLError):
        if error.reason == "KEY_VALUES_MISMATCH":
            return "the key is not the certificate's"
        return "it holds no PEM of the kind expected"
    if isinstance(error, OSError):
        return error.strerror or escaped(str(error))
    return escaped(str(error))
