"""What stopped a connection, said so that somebody can act on it.

Whatever failed (a name, a port, a certificate, a TLS alert, a CONNACK) becomes a `RefusedError` or an
`UnreachableError` whose message names the check that failed, whose hint says what to do, and whose `check` is one
word of `connection_checks.Check` for a machine.

Rules:

- Refused: asking again soon gives the same answer. Unreachable: it may be different in a minute; a clock that is
  wrong belongs here, since it is usually set within a minute of start-up.
- With TLS 1.3 our side of the handshake is over before the broker judges our certificate (RFC 8446 §4.4.2.4): an
  alert, or a connection closed before CONNACK, is its verdict on us.
- What the other side sent is never quoted raw.
"""

from __future__ import annotations

import errno
import re
import socket
import ssl
from datetime import timedelta
from typing import TYPE_CHECKING

from birthmark.device.clock import SET_BACK
from birthmark.device.connection_checks import ALERTS, CONNACKS, Check
from birthmark.device.errors import ConnectionFailedError, RefusedError, UnreachableError
from birthmark.device.escape import escaped
from birthmark.device.frozen import Frozen
from birthmark.device.tls import OutOfTimeError

if TYPE_CHECKING:
    from datetime import datetime

    from birthmark.device.certificate_facts import CertificateFacts
    from birthmark.device.credentials import BrokerAddress
    from birthmark.device.identity import DeviceId


LONGEST_ABSENCE = timedelta(days=30)
"""A clock that is further ahead of the last time that is known may be wrong: the device was off, or it jumped."""


class Circumstances(Frozen):
    """What is known around a connection attempt."""

    broker: BrokerAddress
    device_id: DeviceId
    own: CertificateFacts
    now: datetime
    """By this machine's clock."""
    floor: datetime | None = None
    """A moment that has passed for certain (`clock`)."""
    server: CertificateFacts | None = None
    """The broker's certificate, unverified, where it could be had."""

    @property
    def believed_now(self) -> datetime:
        """The best guess at the time."""
        return self.now if self.floor is None else max(self.now, self.floor)

    def refused(self, check: Check, cause: str, hint: str) -> RefusedError:
        """Return a refusal of this attempt."""
        return RefusedError(f"could not connect to {self.broker} as {self.device_id}: {cause}", hint, check)

    def unreachable(self, check: Check, cause: str, hint: str) -> UnreachableError:
        """Return a failure of this attempt that may pass."""
        return UnreachableError(f"could not connect to {self.broker}: {cause}", hint, check)


_ALERT = re.compile(r"(?:^|_)ALERT_([A-Z_]+)$")

_EXPIRED_CODE, _NOT_YET_VALID_CODE = 10, 9
_UNKNOWN_CA_CODES = frozenset({2, 18, 19, 20, 21, 27})
_NAME_CODES = frozenset({62, 64})
_TIME = "%Y-%m-%d %H:%M:%S UTC"


def explained(error: Exception, around: Circumstances) -> ConnectionFailedError:
    """Say what `error`, raised while connecting or by the socket before CONNACK, means."""
    if isinstance(error, ConnectionFailedError):
        return error
    if isinstance(error, socket.gaierror | UnicodeError):
        return around.unreachable(
            Check.HOST_NAME,
            f"no host of the name {escaped(around.broker.host)} is known",
            "check the spelling, and that this machine has a name server (/etc/resolv.conf)",
        )
    if isinstance(error, ssl.SSLCertVerificationError):
        return _server_refused(error, around)
    if isinstance(error, ssl.SSLError):
        return _handshake_failed(error, around)
    if isinstance(error, TimeoutError):
        return _timed_out(error, around)
    if isinstance(error, OSError):
        return _network_failed(error, around)
    raise error


def ended_before_connack(error: OSError | None, around: Circumstances) -> ConnectionFailedError:
    """Say what it means that the connection ended, by `error` or in order, before CONNECT was answered."""
    if error is None or _is_mere_close(error):
        return _closed_before_connack(around)
    return explained(error, around)


def _is_mere_close(error: OSError) -> bool:
    """Whether `error` tells no more than that the other side closed: a reset is a close with CONNECT unread."""
    return isinstance(error, ConnectionError | ssl.SSLEOFError | ssl.SSLZeroReturnError)


def _closed_before_connack(around: Circumstances) -> RefusedError:
    if verdict := around.own.out_of_time_at(around.believed_now):
        return around.refused(
            Check.EXPIRED,
            f"the broker closed the connection without a word; our certificate is {verdict}: {_validity(around)}",
            "renew it or enrol again; if it should be valid, set this machine's clock",
        )
    return around.refused(
        Check.CLOSED,
        "the broker closed the connection without a word when it saw our certificate",
        "see in the broker's log which it is: revoked, of another CA, or not a device's",
    )


def refused_by_connack(code: int, around: Circumstances) -> ConnectionFailedError:
    """Say what a CONNACK with a return code other than 0 means (MQTT 3.1.1 §3.2.2.3)."""
    if code == 3:
        return around.unreachable(
            Check.BROKER_UNAVAILABLE, "the broker is there and not ready (CONNACK 3)", "try again in a moment"
        )
    if code not in CONNACKS:
        return around.refused(
            Check.MQTT, f"the broker refused with the unknown CONNACK code {code}", "is this an MQTT 3.1.1 broker?"
        )
    check, cause, hint = CONNACKS[code]
    if code == 5 and (verdict := around.own.out_of_time_at(around.believed_now)):
        check, cause = Check.EXPIRED, f"{cause}: it is {verdict}: {_validity(around)}"
    return around.refused(check, f"{cause} (CONNACK {code})", hint)


def not_mqtt(around: Circumstances) -> RefusedError:
    """Say that something else than MQTT answered."""
    return around.refused(
        Check.MQTT,
        "what answers there does not speak MQTT 3.1.1",
        "check the port: MQTT over TLS is usually on 8883",
    )


def no_connack(waited_s: float, around: Circumstances) -> UnreachableError:
    """Say that CONNECT was not answered in time."""
    return around.unreachable(
        Check.NO_ANSWER,
        f"the broker took our connection and did not answer CONNECT within {waited_s:g} s",
        "it is overloaded or stuck: look at the gateway",
    )


def lost(error: OSError | None, around: Circumstances) -> ConnectionFailedError:
    """Say why a connection that was up ended; `error` is the socket's, None where it was closed in order."""
    if isinstance(error, ssl.SSLError) and (alert := _alert(error)):
        return _alerted(alert, around)
    if error is None or _is_mere_close(error):
        check, cause = Check.CLOSED, "the broker closed it"
    else:
        check, cause = Check.NETWORK, escaped(error.strerror or "the network broke")
    return UnreachableError(
        f"could not stay connected to {around.broker}: {cause}",
        "the broker stopped, or another session took this identity over, or it was revoked: the next attempt says",
        check,
    )


def broke_mqtt(around: Circumstances) -> UnreachableError:
    """Say that a connection that was up ended because the broker did not keep to MQTT."""
    return UnreachableError(
        f"could not stay connected to {around.broker}: it sent what MQTT 3.1.1 does not know",
        "look at the broker: its version, and what stands between it and this machine",
        Check.MQTT,
    )


def fell_silent(keepalive_s: int, around: Circumstances) -> UnreachableError:
    """Say that a connection that was up got no answer to its pings."""
    return UnreachableError(
        f"could not stay connected to {around.broker}: nothing was heard for {keepalive_s} s (keepalive)",
        "the network between here and the broker is gone, or the broker is stuck",
        Check.NO_ANSWER,
    )


def is_about_time(error: Exception) -> bool:
    """Whether the dates in the broker's certificate would help to explain `error`."""
    if not isinstance(error, ssl.SSLCertVerificationError) or isinstance(error, OutOfTimeError):
        return False  # the latter has them
    return error.verify_code in (_EXPIRED_CODE, _NOT_YET_VALID_CODE)


def _server_refused(error: ssl.SSLCertVerificationError, around: Circumstances) -> ConnectionFailedError:
    if isinstance(error, OutOfTimeError):
        return _server_ended(error, around)
    code, broker = error.verify_code, around.broker
    if code in (_EXPIRED_CODE, _NOT_YET_VALID_CODE):
        return _server_out_of_time(around, not_yet=code == _NOT_YET_VALID_CODE)
    if code in _UNKNOWN_CA_CODES:
        return around.refused(
            Check.SERVER_CA,
            "the broker's certificate is not from a CA that this identity trusts",
            "is it the right broker? After a change of CA the device needs a renewed bundle",
        )
    if code in _NAME_CODES:
        return around.refused(
            Check.SERVER_NAME,
            f"the broker's certificate is not for {escaped(broker.host)}",
            f"connect by a name in it, or issue it anew: `birthmark issue-broker {escaped(broker.host)} ...`",
        )
    return around.refused(
        Check.SERVER_CERTIFICATE,
        f"the broker's certificate was not accepted: {escaped(error.verify_message)}",
        "issue the broker's certificate anew with `birthmark issue-broker`",
    )


def _server_out_of_time(around: Circumstances, *, not_yet: bool) -> ConnectionFailedError:
    dates = f": it is valid {_dates(around.server)}" if around.server is not None else ""
    clock = f"by this clock it is {around.now:{_TIME}}"
    if not_yet:
        return around.unreachable(
            Check.CLOCK,
            f"the broker's certificate is not yet valid{dates}; {clock}",
            "set this machine's clock (NTP, or an RTC), or the clock of the station that issued the certificate",
        )
    if _is_doubtful(around):
        return around.unreachable(
            Check.CLOCK,
            f"the broker's certificate has expired if this machine's clock is right{dates}; {clock}, and the last"
            f" time that is known for certain is {around.floor:{_TIME}}",
            "set the clock (NTP, or an RTC), then it connects by itself; if it is right, renew the broker's"
            " certificate with `birthmark issue-broker`",
        )
    return around.refused(
        Check.SERVER_EXPIRED,
        f"the broker's certificate has expired{dates}; {clock}",
        "renew it with `birthmark issue-broker`; if it should be valid, set this machine's clock",
    )


def _is_doubtful(around: Circumstances) -> bool:
    """Whether the clock is so far ahead of what is known that it, and not the certificate, may be at fault."""
    if around.floor is None or around.now - around.floor <= LONGEST_ABSENCE:
        return False
    return around.server is None or around.server.not_after >= around.floor


def _server_ended(error: OutOfTimeError, around: Circumstances) -> ConnectionFailedError:
    """Say what our own check of the broker's validity found (`clock.out_of_time`)."""
    if not error.moment.or_later:
        seen = around.changed(server=error.certificate, now=error.moment.at)
        return _server_out_of_time(seen, not_yet=error.moment.at < error.certificate.not_before)
    return around.refused(
        Check.SERVER_EXPIRED,
        f"a certificate of the broker has expired: it is valid {_dates(error.certificate)};"
        f" {error.moment.at:{_TIME}} has passed for certain, though by this clock it is {around.now:{_TIME}}",
        "renew it with `birthmark issue-broker`",
    )


def _dates(certificate: CertificateFacts) -> str:
    return f"from {certificate.not_before:{_TIME}} to {certificate.not_after:{_TIME}}"


def _handshake_failed(error: ssl.SSLError, around: Circumstances) -> ConnectionFailedError:
    if alert := _alert(error):
        return _alerted(alert, around)
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return around.unreachable(
            Check.TLS,
            "the other side closed the connection in the middle of the TLS handshake",
            "the broker is stopping or overloaded, or something between here and there cut it",
        )
    reason = error.reason or ""
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "RECORD_LAYER_FAILURE"):
        return around.refused(
            Check.TLS, "what answers there does not speak TLS", "check the port: MQTT over TLS is usually on 8883"
        )
    shown = escaped(reason.replace("_", " ").lower()) or "an unknown TLS failure"
    return around.refused(Check.TLS, f"the TLS handshake failed: {shown}", "the broker's log may say more")


def _alert(error: ssl.SSLError) -> str:
    found = _ALERT.search(error.reason or "")
    return found[1] if found else ""


def _alerted(alert: str, around: Circumstances) -> RefusedError:
    check, cause, hint = ALERTS.get(
        alert,
        (
            Check.TLS,
            f"the broker ended the TLS connection: {escaped(alert.replace('_', ' ').lower())}",
            "the broker's log says why",
        ),
    )
    if check is Check.EXPIRED:
        cause = f"{cause}: {_validity(around)}"
    return around.refused(check, cause, hint)


def _validity(around: Circumstances) -> str:
    own = around.own
    return f"it is valid {_dates(own)}, and by this clock it is {around.now:{_TIME}}{_floor(around)}"


def _floor(around: Circumstances) -> str:
    """Say what is known of the time where this machine's clock is certainly wrong."""
    if around.floor is None or around.now >= around.floor - SET_BACK:
        return ""
    return f", which is wrong: {around.floor:{_TIME}} has passed"


def _timed_out(error: TimeoutError, around: Circumstances) -> UnreachableError:
    if "handshake" in str(error):
        return around.unreachable(
            Check.NO_ANSWER,
            "something took our connection and did not finish the TLS handshake in time",
            "the broker is overloaded or stuck, or this is not its TLS port",
        )
    return around.unreachable(
        Check.NETWORK, "nothing answers there (time-out)", "is the machine on, and does a firewall drop the port?"
    )


def _network_failed(error: OSError, around: Circumstances) -> UnreachableError:
    if isinstance(error, ConnectionRefusedError):
        return around.unreachable(
            Check.NETWORK,
            "the machine is there and nothing listens on that port",
            "is the broker running, and is this its port?",
        )
    if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN):
        return around.unreachable(
            Check.NETWORK, "there is no way to that address", "is the network up? Look at `ip route`"
        )
    return around.unreachable(
        Check.NETWORK, escaped(error.strerror or str(error)) or "the network failed", "look at the network"
    )
