"""A station's folder, opened: registry, settings and, once the passphrase is there, the authority.

    station.toml, station.lock     settings, and the lock for changing them
    registry.json, registry.lock   the registry and its lock
    audit.jsonl                    the audit log
    root.pem, issuing.pem          the CA certificates
    crl.pem, root-crl.pem          the current CRLs; crl.lock keeps them in order
    issue.lock                     held while the station makes a key pair and its certificate
    keys/root.key.pem              may be moved to a safe place: needed for the root's CRL only
    keys/issuing.key.pem           needed to issue and to revoke

Rule: nothing here asks for the passphrase before `authority` is used.
"""

from __future__ import annotations

import os
import pwd
import socket
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from birthmark.device.durable import exclusive_lock
from birthmark.device.errors import AuthorityError, ConfigurationError
from birthmark.provisioning import keyfile, profile
from birthmark.provisioning.authority import Authority
from birthmark.provisioning.passphrase import PassphraseSource
from birthmark.provisioning.registry.tiny import TinyRegistry
from birthmark.provisioning.settings import SETTINGS_FILE, Settings, read_settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

ROOT_FILE: Final = "root.pem"
ISSUING_FILE: Final = "issuing.pem"
CRL_FILE: Final = "crl.pem"
ROOT_CRL_FILE: Final = "root-crl.pem"
CRL_LOCK_FILE: Final = "crl.lock"
ISSUE_LOCK_FILE: Final = "issue.lock"
KEYS_FOLDER: Final = "keys"
ROOT_KEY_FILE: Final = "root.key.pem"
ISSUING_KEY_FILE: Final = "issuing.key.pem"
FOLDER_VARIABLE: Final = "BIRTHMARK_STATION"


def utc_now() -> datetime:
    """Return the current time, aware."""
    return datetime.now(UTC)


def default_folder() -> Path:
    """Return the station's folder when none is named: BIRTHMARK_STATION, else one under XDG_DATA_HOME."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    data_home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(data_home) / "birthmark" / "station"


def actor() -> str:
    """Return who is at work, for the audit log: `user@host`."""
    try:
        user = pwd.getpwuid(os.getuid()).pw_name  # not from the environment, which anybody sets
    except KeyError:  # a container's user may have no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


class Station:
    """An opened station.

    Args:
        folder: the station's folder.
        passphrase: the issuing CA's passphrase, or where to get it once it is needed.
        clock: the current time, aware.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        registry: TinyRegistry,
        *,
        passphrase: bytes | PassphraseSource,
        clock: Callable[[], datetime],
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.registry = registry
        self.clock = clock
        self._passphrase = passphrase

    @classmethod
    def open(
        cls,
        folder: Path | None = None,
        *,
        passphrase: bytes | PassphraseSource | None = None,
        clock: Callable[[], datetime] = utc_now,
    ) -> Station:
        """Open the station in `folder` (default: `default_folder()`).

        Raises:
            ConfigurationError: there is no station, or its settings cannot be used.
            RegistryError: its registry cannot be read.
        """
        folder = (folder or default_folder()).absolute()
        if not (folder / SETTINGS_FILE).exists() and os.access(folder.parent, os.X_OK):
            raise ConfigurationError(
                f"could not open the station in {folder}: there is none",
                hint="make one with `birthmark init`, or name its folder with --station",
            )
        settings = read_settings(folder / SETTINGS_FILE)
        registry = TinyRegistry(folder, clock=clock, actor=actor())
        with registry.view():
            pass  # says at once if it cannot be read
        return cls(folder, settings, registry, passphrase=passphrase or PassphraseSource(), clock=clock)

    @property
    def settings_path(self) -> Path:
        """Where the settings are."""
        return self.folder / SETTINGS_FILE

    @property
    def crl_path(self) -> Path:
        """Where the current CRL of the issuing CA is (PEM)."""
        return self.folder / CRL_FILE

    @cached_property
    def root(self) -> x509.Certificate:
        """The root's certificate: the anchor of devices and services."""
        return read_certificate(self.folder / ROOT_FILE)

    @cached_property
    def issuing(self) -> x509.Certificate:
        """The issuing CA's certificate: the anchor of brokers."""
        return read_certificate(self.folder / ISSUING_FILE)

    @cached_property
    def authority(self) -> Authority:
        """The issuing CA, unlocked; the first use takes the passphrase.

        Raises:
            AuthorityError: its key is missing or unreadable, or the passphrase is wrong.
        """
        path = self.folder / KEYS_FOLDER / ISSUING_KEY_FILE
        key = keyfile.read_key(path, self.read_passphrase(), whose="the issuing CA")
        return Authority(
            profile.Issuer(self.issuing, key),
            self.root,
            organization=self.settings.organization,
            lifetimes=self.settings.lifetimes,
            registry=self.registry,
        )

    def root_issuer(self, passphrase: bytes, key_path: Path | None = None) -> profile.Issuer:
        """Unlock the root, from wherever its key is kept.

        Raises:
            AuthorityError: its key is missing or unreadable, or the passphrase is wrong.
        """
        path = key_path or self.folder / KEYS_FOLDER / ROOT_KEY_FILE
        return profile.Issuer(self.root, keyfile.read_key(path, passphrase, whose="the root CA"))

    def read_passphrase(self) -> bytes:
        """Return the issuing CA's passphrase, asking for it if need be."""
        return self._passphrase if isinstance(self._passphrase, bytes) else self._passphrase.read()

    def crl_lock(self) -> AbstractContextManager[None]:
        """Hold this from the choice of a CRL's number until that CRL is in its file: CRLs appear in order."""
        return exclusive_lock(self.folder / CRL_LOCK_FILE)

    def issue_lock(self) -> AbstractContextManager[None]:
        """Hold this while a key pair is made and certified: nobody takes that attempt for a killed one."""
        return exclusive_lock(self.folder / ISSUE_LOCK_FILE)

    def files(self) -> list[Path]:
        """Return every file that is the station's own, but for its registry, its audit log and its locks.

        The root's key is among them while it is here.
        """
        names = (SETTINGS_FILE, ROOT_FILE, ISSUING_FILE, CRL_FILE, ROOT_CRL_FILE)
        keys = sorted((self.folder / KEYS_FOLDER).glob("*.pem"))
        return [path for name in names if (path := self.folder / name).exists()] + keys

    def close(self) -> None:
        """Let go of the registry's file."""
        self.registry.close()


def read_certificate(path: Path) -> x509.Certificate:
    """Read a CA certificate (PEM).

    Raises:
        AuthorityError: it is missing, unreadable or no certificate.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        is_missing = isinstance(error, FileNotFoundError)
        raise AuthorityError(
            f"could not read the CA certificate {path}: {error.strerror}",
            hint="restore it from a backup" if is_missing else "run this as the station's user",
        ) from error
    except ValueError as error:
        raise AuthorityError(
            f"could not read the CA certificate {path}: it is damaged", hint="restore it from a backup"
        ) from error


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """Return a certificate as PEM."""
    return certificate.public_bytes(Encoding.PEM)
