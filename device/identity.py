"""Names of devices, services and brokers, and the roles they hold.

Rules:

- A device id is the certificate's one CN (RFC 5280 §4.1.2.6) and the MQTT client id (MQTT 3.1.1 §3.1.3.1).
  It is one topic level, so it can hold none of `/ + # $` nor NUL; it is parsed once into a `DeviceId`.
- Two ids that differ only in case are the same id.
- A role is one word. `operator` and every `service-*` role belong to services: a device may not hold one.
"""

from __future__ import annotations

import re

from birthmark.device.errors import IdentityError
from birthmark.device.escape import quoted
from birthmark.device.frozen import Frozen

_ID = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_ROLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.:_-]{0,62}[A-Za-z0-9])?|::1|::")

MAX_ID_CHARACTERS = 63
GATEWAY_ROLE = "service-gateway"
"""The role of a gateway in the certificate that it shows to its upstream."""


class DeviceId(Frozen):
    """The name of a device or a service: `[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?`.

    Raises:
        IdentityError: the text is outside the grammar.
    """

    text: str

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.text):
            shown = quoted(self.text[: MAX_ID_CHARACTERS + 1])
            raise IdentityError(
                f"could not use {shown} as a device id: it is outside the grammar",
                hint="1 to 63 letters, digits and hyphens, with no hyphen at either end",
            )

    def __str__(self) -> str:
        return self.text

    @property
    def folded(self) -> str:
        """The form in which ids are compared: two ids with one folded form are the same id."""
        return self.text.lower()


class Role(Frozen):
    """What an identity may do, by name: `[A-Za-z0-9][A-Za-z0-9._-]{0,31}`.

    Raises:
        IdentityError: the text is outside the grammar.
    """

    name: str

    def __post_init__(self) -> None:
        if not _ROLE.fullmatch(self.name):
            raise IdentityError(
                f"could not use {quoted(self.name[:33])} as a role: it is outside the grammar",
                hint="1 to 32 letters, digits, dots, underscores and hyphens, starting with a letter or digit",
            )

    def __str__(self) -> str:
        return self.name

    @property
    def is_reserved(self) -> bool:
        """Whether only a service may hold this role (compared without regard to case)."""
        folded = self.name.lower()
        return folded == "operator" or folded.startswith("service-")


def device_role(name: str) -> Role:
    """Parse a role for a device.

    Raises:
        IdentityError: the name is outside the grammar, or reserved for services.
    """
    role = Role(name)
    if role.is_reserved:
        raise IdentityError(
            f"could not give a device the role {name!r}: it is reserved for services",
            hint="choose another role, or issue a service identity with `birthmark issue-operator`",
        )
    return role


class BrokerName(Frozen):
    """The name of a gateway's broker, the CN of its certificate: a DNS name or an IP address as text.

    It is one topic level (`gateway/{name}/...`).

    Raises:
        IdentityError: the text is no host name or address, or longer than a CN may be (64 characters).
    """

    text: str

    def __post_init__(self) -> None:
        if not _HOST.fullmatch(self.text):
            raise IdentityError(
                f"could not use {quoted(self.text[:65])} as a broker name: it is no host name or address",
                hint="give a DNS name such as gateway-1.example.com, or an IP address",
            )

    def __str__(self) -> str:
        return self.text
