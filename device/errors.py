"""Every error that birthmark raises on purpose, in one tree.

    BirthmarkError                 exit 1
      IdentityError                exit 1   a name outside the grammar, a reserved role
      CredentialError              exit 1   a key, certificate or slot that cannot be used
      ConnectionFailedError        exit 1
        RefusedError               exit 3     the other side said no: retrying soon does not help
        UnreachableError           exit 4     nobody answered: retry
      ProtocolError                exit 1
        LocalProtocolError         exit 1     we were about to break a protocol
        RemoteProtocolError        exit 1     the other side broke it
      LinkError                    exit 4   the serial link: no device, a time-out, a verdict
        PortError                  exit 5     the port itself: missing, busy, no permission
      EnrollmentRefusedError       exit 3   refused, duplicate, erased or quarantined
      AuthorityError               exit 6   the CA: keys, passphrase, clock
      RegistryError                exit 6   the registry or the audit log
      PolicyError                  exit 1   a policy file
      ConfigurationError           exit 1   any other configuration
        UsageError                 exit 2   options that say nothing together, or too little; a value of no use
      SystemFailureError           exit 5   disk, permissions, an occupied port

A message reads `could not <do what> <to what>: <cause>`; the hint says what to do next. Anything else that
escapes is a bug. No message ever holds key material, and text from a device or a client goes through
`birthmark.device.escape.escaped` first.
"""

from __future__ import annotations

from typing import ClassVar


class BirthmarkError(Exception):
    """An expected failure: what failed, and what to do next.

    Args:
        message: one line, `could not <do what> <to what>: <cause>`.
        hint: one line that a person can act on; empty where there is none.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class IdentityError(BirthmarkError):
    """A name outside the grammar, or one that may not be used this way."""


class CredentialError(BirthmarkError):
    """A key, a certificate or a credential slot that cannot be used."""


class ConnectionFailedError(BirthmarkError):
    """A connection that did not come about, or that ended.

    Args:
        message: as for every error.
        hint: as for every error.
        check: which check failed, one word for a machine (`device/connection_checks.py` lists them).
    """

    def __init__(self, message: str, hint: str = "", check: str = "") -> None:
        super().__init__(message, hint)
        self.check = check


class RefusedError(ConnectionFailedError):
    """The other side said no (revoked, unknown CA, not authorised): do not retry soon."""

    exit_code = 3


class UnreachableError(ConnectionFailedError):
    """Nobody answered (no such host, refused port, time-out): retry."""

    exit_code = 4


class ProtocolError(BirthmarkError):
    """A protocol was broken."""


class LocalProtocolError(ProtocolError):
    """Our side was about to break a protocol."""


class RemoteProtocolError(ProtocolError):
    """The other side broke a protocol."""


class LinkError(BirthmarkError):
    """The serial link: no device on it, a time-out, or a verdict about what is there instead."""

    exit_code = 4


class PortError(LinkError):
    """The port itself: missing, busy, not permitted."""

    exit_code = 5


class EnrollmentRefusedError(BirthmarkError):
    """The unit is refused: duplicate, erased, mismatched, or quarantined until a person decides."""

    exit_code = 3


class AuthorityError(BirthmarkError):
    """The certificate authority: its keys, their passphrase, its clock."""

    exit_code = 6


class RegistryError(BirthmarkError):
    """The registry or the audit log."""

    exit_code = 6


class PolicyError(BirthmarkError):
    """A policy file that cannot be used."""


class ConfigurationError(BirthmarkError):
    """A configuration that cannot be used."""


class MissingLibraryError(ConfigurationError):
    """A library that comes with an extra, and is not installed."""


class UsageError(ConfigurationError):
    """Options that say nothing together, or too little, or a value of no use; argparse ends with the same code."""

    exit_code = 2


class SystemFailureError(BirthmarkError):
    """The machine: disk, permissions, an occupied network port."""

    exit_code = 5
