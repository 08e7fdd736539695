"""The checks that a connection has to pass, and what a refusal by alert or CONNACK means, as tables.

Each refusal is (check, cause, hint), in the words that `connection_errors` puts into an error.
"""

from __future__ import annotations

from enum import StrEnum


class Check(StrEnum):
    """The check that failed."""

    HOST_NAME = "host-name"
    """The broker's name leads to no address."""
    NETWORK = "network"
    """No connection to the address: no route, no answer, nobody on the port."""
    TLS = "tls"
    """The handshake failed before any certificate mattered."""
    CLOCK = "clock"
    """The broker's certificate is not valid at the time that this machine believes it is."""
    SERVER_EXPIRED = "server-expired"
    SERVER_CA = "server-ca"
    """The broker's certificate leads to none of our anchors."""
    SERVER_NAME = "server-name"
    """The broker's certificate is for other names."""
    SERVER_CERTIFICATE = "server-certificate"
    """The broker's certificate breaks another rule."""
    REVOKED = "revoked"
    EXPIRED = "expired"
    UNKNOWN_CA = "unknown-ca"
    CERTIFICATE = "certificate"
    """Our certificate breaks another of the broker's rules."""
    MQTT_VERSION = "mqtt-version"
    CLIENT_ID = "client-id"
    BROKER_UNAVAILABLE = "broker-unavailable"
    NOT_AUTHORISED = "not-authorised"
    MQTT = "mqtt"
    """The other side does not keep to MQTT 3.1.1."""
    CLOSED = "closed"
    """Closed without a word."""
    NO_ANSWER = "no-answer"


_ENROL_AGAIN = (
    "a revoked identity does not come back: ask who revoked it (`birthmark show`), or enrol the board anew"
)
ALERTS: dict[str, tuple[Check, str, str]] = {
    "CERTIFICATE_REVOKED": (Check.REVOKED, "the broker says that our certificate is revoked", _ENROL_AGAIN),
    "CERTIFICATE_EXPIRED": (
        Check.EXPIRED,
        "the broker says that our certificate is not valid now",
        "renew it or enrol again; if it should be valid, check the broker's clock",
    ),
    "UNKNOWN_CA": (
        Check.UNKNOWN_CA,
        "the broker does not know the CA of our certificate",
        "was the device enrolled at this broker's station? If the CA was retired there, `birthmark reflash` helps",
    ),
    "BAD_CERTIFICATE": (
        Check.CERTIFICATE,
        "the broker found our certificate to be bad",
        "the broker's log says which rule it breaks",
    ),
    "UNSUPPORTED_CERTIFICATE": (
        Check.CERTIFICATE,
        "the broker does not take our certificate for a client's",
        "it needs clientAuth among its extended key usages: enrol again",
    ),
    "CERTIFICATE_UNKNOWN": (
        Check.CERTIFICATE,
        "the broker did not accept our certificate",
        "the broker's log says which rule it breaks",
    ),
    "CERTIFICATE_REQUIRED": (
        Check.CERTIFICATE,
        "the broker got no certificate from us",
        "give a file with both key and certificate",
    ),
    "ACCESS_DENIED": (
        Check.NOT_AUTHORISED,
        "the broker knows our certificate and does not let it in",
        "`birthmark-broker policy explain` on the gateway says why",
    ),
    "HANDSHAKE_FAILURE": (
        Check.TLS,
        "the broker and we have no TLS parameters in common, or it wants another certificate",
        "the broker's log says which; it must take TLS 1.2 or newer with ECDSA P-256",
    ),
    "PROTOCOL_VERSION": (
        Check.TLS,
        "the broker speaks no TLS version that we speak",
        "it must take TLS 1.2 or newer",
    ),
}
"""By the name of the alert (RFC 8446 §6.2)."""

CONNACKS: dict[int, tuple[Check, str, str]] = {
    1: (Check.MQTT_VERSION, "the broker does not speak MQTT 3.1.1", "birthmark needs a broker with MQTT 3.1.1"),
    2: (
        Check.CLIENT_ID,
        "the broker does not accept our client id",
        "it must be the certificate's CN (a service may add `:anything`)",
    ),
    4: (
        Check.NOT_AUTHORISED,
        "the broker wants a user name and a password",
        "is this a birthmark broker? One of those asks for a certificate only",
    ),
    5: (
        Check.NOT_AUTHORISED,
        "the broker saw our certificate and does not let us in",
        "see in the gateway's log which it is: revoked, out of date, or of a CA that the gateway does not trust",
    ),
}
"""By return code (MQTT 3.1.1 §3.2.2.3); 3, unavailable, is no refusal."""
