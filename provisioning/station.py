"""A station's folder, opened: registry, settings and, once the passphrase is there, the authority.

    station.toml, station.lock     settings, and the lock for changing them
    registry.json, registry.lock   the registry, unless it is in a database (`[registry]`), and its lock
    audit.jsonl                    the audit log
    root.pem, issuing.pem          copies, for others, of the certificates of the CAs that are trusted
    crl.pem, root-crl.pem          the CRLs, one for each issuing CA or root; crl.lock keeps them in order
    issue.lock                     held while the station makes a key pair and its certificate
    rollover.lock                  held while a CA is made, put in charge or retired
    keys/root-ID.key.pem           may be moved to a safe place: needed for a root's CRL and to replace a CA
    keys/issuing-ID.key.pem        needed to issue and to revoke; ID is the beginning of the key identifier;
                                   not there if the key is in a PKCS#11 token (docs/hsm.md)

Rules:

- Which CAs there are, and which of them issues, is in the registry (`birthmark.provisioning.cas`), and looked up
  at each use: a command that runs for long issues from a new CA as soon as that is in charge.
- Nothing here asks for the passphrase, or a token's PIN, before an authority is used; it is asked for once. Where
  what a person answered does not open a key, since root and issuing CAs have one each, that key's is asked for.
- A CA's key is given out only when its unlocking is in the audit log: once for each station that is opened, so not
  within a transaction; `signing` is a transaction that has the entry in itself.
"""

from __future__ import annotations

import os
import re
import threading
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from birthmark.device.durable import exclusive_lock, is_on_read_only_disk, remove_leftovers, write_durably
from birthmark.device.errors import AuthorityError, ConfigurationError
from birthmark.provisioning import keyfile, profile
from birthmark.provisioning.actor import actor
from birthmark.provisioning.authority import Authority
from birthmark.provisioning.ca_keys import PIN_SOURCE, FileKeys, TokenAccess, TokenKeys
from birthmark.provisioning.cas import Ca, CaKind, Cas, read_cas
from birthmark.provisioning.passphrase import ROOT_PROMPT, ROOT_VARIABLE, PassphraseSource, may_ask
from birthmark.provisioning.places import ISSUING_FILE, KEYS_FOLDER, default_folder
from birthmark.provisioning.registry.opening import InForce, open_registry
from birthmark.provisioning.registry.place import AUDIT_FILE, REGISTRY_FILE
from birthmark.provisioning.settings import SETTINGS_FILE, Settings
from birthmark.provisioning.tokens.key import TokenKey
from birthmark.provisioning.tokens.uri import TokenUri

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

    from birthmark.provisioning.ca_keys import KeyMaker, TokenPlace
    from birthmark.provisioning.encrypted_key import KeyDerivation
    from birthmark.provisioning.registry.interface import StoredRegistry, Transaction

ROOT_FILE: Final = "root.pem"
CRL_FILE: Final = "crl.pem"
ROOT_CRL_FILE: Final = "root-crl.pem"
CRL_LOCK_FILE: Final = "crl.lock"
ISSUE_LOCK_FILE: Final = "issue.lock"
ROLLOVER_LOCK_FILE: Final = "rollover.lock"
PUBLIC_FILE_MODE: Final = 0o644
_KEPT_APART: Final = frozenset({".lock", ".db", ".db-wal", ".db-shm", ".db-journal"})
"""Locks, and what a registry on SQLite is made of."""
_UNENCRYPTED: Final = re.compile(rb"-----BEGIN (?!ENCRYPTED )[A-Z ]*PRIVATE KEY-----")
"""Of PKCS #8, or as older tools write it: `EC PRIVATE KEY`."""


def utc_now() -> datetime:
    """Return the current time, aware."""
    return datetime.now(UTC)


class Station:
    """An opened station.

    Args:
        folder: the station's folder.
        passphrase: the issuing CA's passphrase, or where to get it once it is needed.
        pin: the PIN of the token with the issuing CA's key, if it is in one, or where to get it.
        clock: the current time, aware.
        purpose: what its keys are unlocked for, for the audit log: the command.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        registry: StoredRegistry,
        *,
        passphrase: bytes | PassphraseSource,
        pin: bytes | PassphraseSource = PIN_SOURCE,
        clock: Callable[[], datetime],
        purpose: str = "",
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.registry = registry
        self.clock = clock
        self.tokens = TokenAccess(lambda: self.settings.token, pin)
        self._passphrase = passphrase
        self._prompts: PassphraseSource | None = None
        """How to ask a person, once a person was asked for the passphrase."""
        self._own_passphrases: dict[str, bytes] = {}
        """By key identifier: of keys that it did not open."""
        self._purpose = purpose
        self._keys: dict[str, EllipticCurvePrivateKey] = {}
        self._untold: dict[str, tuple[Ca, EllipticCurvePrivateKey]] = {}
        """What is unlocked, and not in the audit log yet."""
        self._unlocking = threading.RLock()

    @classmethod
    def open(
        cls,
        folder: Path | None = None,
        *,
        passphrase: bytes | PassphraseSource | None = None,
        pin: bytes | PassphraseSource | None = None,
        clock: Callable[[], datetime] = utc_now,
        purpose: str = "",
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
        in_force = InForce(folder)
        settings = in_force.settings
        registry = open_registry(folder, settings.registry, clock=clock, actor=actor(), in_force=in_force)
        with registry.view():
            pass  # says at once if it cannot be read
        source = passphrase or PassphraseSource()
        return cls(
            folder, settings, registry, passphrase=source, pin=pin or PIN_SOURCE, clock=clock, purpose=purpose
        )

    @property
    def is_read_only(self) -> bool:
        """Whether its disk is mounted read-only: it can be looked at, and neither issue nor revoke."""
        return is_on_read_only_disk(self.folder)

    @property
    def settings_path(self) -> Path:
        """Where the settings are."""
        return self.folder / SETTINGS_FILE

    @property
    def crl_path(self) -> Path:
        """Where the CRLs of the issuing CAs are (PEM)."""
        return self.folder / CRL_FILE

    @property
    def root_path(self) -> Path:
        """Where a copy of the trusted roots is (PEM): what a service checks a broker against."""
        return self.folder / ROOT_FILE

    @property
    def cas(self) -> Cas:
        """The station's CAs as they are now.

        Raises:
            RegistryError: the registry cannot be read.
        """
        with self.registry.view() as view:
            return read_cas(view)

    @property
    def root(self) -> x509.Certificate:
        """The certificate of the root above the issuing CA of devices and services."""
        cas = self.cas
        return cas.get(cas.for_clients.root).certificate

    @property
    def issuing(self) -> x509.Certificate:
        """The certificate of the issuing CA of devices and services."""
        return self.cas.for_clients.certificate

    @property
    def authority(self) -> Authority:
        """The issuing CA of devices and services, unlocked; the first use takes the passphrase.

        Raises:
            AuthorityError: its key is missing or unreadable, or the passphrase is wrong.
        """
        return self.authority_of("")

    def authority_of(self, key_id: str) -> Authority:
        """Return an issuing CA, unlocked.

        Args:
            key_id: its key identifier; empty for the one that issues for devices and services now.

        Raises:
            AuthorityError: its key is missing or unreadable, or the passphrase is wrong.
            RegistryError: there is no such CA.
        """
        cas = self.cas
        ca = cas.get(key_id) if key_id else cas.for_clients
        anchors = sorted(cas.roots, key=lambda root: root.key_id != ca.root)
        return Authority(
            profile.Issuer(ca.certificate, self._key_of(ca)),
            [anchor.certificate for anchor in anchors],
            organization=self.settings.organization,
            lifetimes=self.settings.lifetimes,
            registry=self.registry,
        )

    def key_path(self, ca: Ca) -> Path:
        """Return where the private key of a CA is, unless it was moved away, or is in a token."""
        return self.folder / KEYS_FOLDER / f"{ca.kind}-{ca.short}.key.pem"

    def key_place(self, ca: Ca) -> str:
        """Return in a word where the private key of a CA is: `here`, `away`, in a `token`, or `lost`."""
        if ca.lost_at is not None:
            return "lost"
        if ca.key_uri:
            return "token"
        return "here" if self.key_path(ca).exists() else "away"

    def check_key(self, key_id: str) -> None:
        """Unlock an issuing CA; one whose key is in a token signs a challenge, whenever this is asked for.

        Raises:
            AuthorityError: its key cannot be used.
        """
        ca = self.cas.get(key_id)
        if not ca.key_uri:
            self._unlocked(ca)
            return
        key = self._key_of(ca)
        if isinstance(key, TokenKey):
            key.prove()

    @contextmanager
    def signing(self) -> Iterator[Transaction]:
        """Open a transaction of the registry that prepares a signature, and leaves word of the keys for it, too.

        What `check_key` has unlocked is given out once this has ended: one write in the place of two.
        """
        with self._unlocking:
            told, self._untold = self._untold, {}
        try:
            with self.registry.transaction() as transaction:
                for ca, _ in told.values():
                    self._record_unlock(transaction, ca)
                yield transaction
        except BaseException:
            with self._unlocking:
                self._untold = {**told, **self._untold}
            raise
        with self._unlocking:
            self._keys.update((key_id, key) for key_id, (_, key) in told.items())

    def root_issuer(
        self, passphrase: bytes | None, key_path: Path | None = None, *, root: Ca | None = None
    ) -> profile.Issuer:
        """Unlock a root (the current one if none is named), from wherever its key is kept; see `open_root`.

        That it was unlocked is in the audit log when this returns.
        """
        cas = self.cas
        root = root or cas.get(cas.for_clients.root)
        path = key_path or self.key_path(root)
        issuer = self.open_root(root, passphrase, path)
        self.note_unlock(root, path)
        return issuer

    def open_root(self, root: Ca, passphrase: bytes | None, path: Path) -> profile.Issuer:
        """Open a root's key file, which is then to be put on record, or is not used.

        Args:
            root: which.
            passphrase: its own; None: that of the issuing CAs' key files opens it, or a person says what does.
            path: where its key is.

        Raises:
            AuthorityError: its key is missing or unreadable, or the passphrase is wrong.
        """
        if_missing = "is its medium mounted? A root's key that was moved away is named by --root-key FILE"
        if_wrong = f"try again; a root's passphrase that is its own: {ROOT_VARIABLE}, or --root-passphrase-fd N"
        read = partial(keyfile.read_key, path, whose="the root CA", if_missing=if_missing, if_wrong=if_wrong)
        return profile.Issuer(root.certificate, read(passphrase) if passphrase else self._opened(root, read))

    def note_unlock(self, ca: Ca, path: Path | None = None) -> None:
        """Leave word in the audit log that a CA's key was unlocked, and what for; durable when this returns.

        Args:
            ca: whose key.
            path: where it is, if not at the station or in the CA's token.
        """
        with self.registry.transaction() as transaction:
            self._record_unlock(transaction, ca, path)

    def _record_unlock(self, transaction: Transaction, ca: Ca, path: Path | None = None) -> None:
        elsewhere = None if path in (None, self.key_path(ca)) else str(path)
        transaction.record(
            "unlock",
            f"{ca.kind}-ca",
            key_id=ca.key_id,
            purpose=self._purpose or None,
            path=elsewhere or ca.key_uri or None,
        )

    def read_passphrase(self, *, confirm: bool = False, prompt: str = "") -> bytes:
        """Return the passphrase of the issuing CAs' key files, asking for it if need be, but once.

        Args:
            confirm: ask a person twice, because there is no key to try it on.
            prompt: what a person is asked for, where it is not the issuing CAs' key that it is to open.
        """
        with self._unlocking:
            if not isinstance(self._passphrase, bytes):
                source = replace(self._passphrase, confirm=confirm)
                self._prompts = None if source.is_given else self._passphrase
                self._passphrase = (replace(source, prompt=prompt) if prompt else source).read()
            return self._passphrase

    def key_maker(self, place: TokenPlace | None, derivation: KeyDerivation) -> KeyMaker:
        """Return what makes the key of the next issuing CA: in a token, or in a file if `place` is None."""
        if place is not None:
            return TokenKeys(self.tokens, place)
        return FileKeys(self.passphrase_of_new_keys, derivation)

    def passphrase_of_new_keys(self) -> bytes:
        """Return the passphrase that opens the key files that are there; without any, it is asked for twice.

        Raises:
            AuthorityError: it is wrong, or there is none.
        """
        held = self._key_files()
        if held:
            self._key_of(held[0])
        return self.read_passphrase(confirm=not held)

    def publish_certificates(self) -> None:
        """Bring the copies of the trusted CAs' certificates, `root.pem` and `issuing.pem`, up to date.

        Raises:
            OSError: one could not be written; it is as it was.
        """
        with self.rollover_lock():  # nobody writes what was so before
            cas = self.cas
            for name, trusted in ((ROOT_FILE, cas.roots), (ISSUING_FILE, cas.issuing)):
                path, content = self.folder / name, b"".join(ca.pem for ca in trusted)
                remove_leftovers(self.folder, name)
                if not path.exists() or path.read_bytes() != content:
                    write_durably(path, content, mode=PUBLIC_FILE_MODE)

    def _key_of(self, ca: Ca) -> EllipticCurvePrivateKey:
        """Return a key to sign with; that it was unlocked is in the audit log by then."""
        with self._unlocking:
            key = self._unlocked(ca)
            if ca.key_id in self._untold:
                self.note_unlock(ca)
                self._keys[ca.key_id] = key
                del self._untold[ca.key_id]
            return key

    def _unlocked(self, ca: Ca) -> EllipticCurvePrivateKey:
        """Unlock a key, which is not to be used before that is in the audit log."""
        with self._unlocking:
            if ca.lost_at is not None:
                raise AuthorityError(
                    f"could not use the key of the CA {ca.short}: it was given up on {ca.lost_at:%Y-%m-%d}, lost",
                    hint="replace the CA: birthmark ca rollover start issuing; if it was found: ca lost --found",
                )
            if ca.key_id in self._keys:
                return self._keys[ca.key_id]
            if ca.key_id not in self._untold:
                self._untold[ca.key_id] = ca, self._token_key(ca) if ca.key_uri else self._file_key(ca)
            return self._untold[ca.key_id][1]

    def _file_key(self, ca: Ca) -> EllipticCurvePrivateKey:
        whose = "the issuing CA" if ca.kind is CaKind.ISSUING else "the root CA"
        return self._opened(ca, partial(keyfile.read_key, self.key_path(ca), whose=whose))

    def _opened(self, ca: Ca, read: Callable[[bytes], EllipticCurvePrivateKey]) -> EllipticCurvePrivateKey:
        """Read a key file with the passphrase; a person whose answer does not open it is asked for its own."""
        with self._unlocking:
            shared = self.read_passphrase(prompt=ROOT_PROMPT if ca.kind is CaKind.ROOT else "")
            try:
                return read(self._own_passphrases.get(ca.key_id, shared))
            except keyfile.WrongPassphraseError:
                if self._prompts is None or not may_ask():
                    raise
            own = replace(self._prompts, prompt=f"Passphrase of the {ca.kind} CA {ca.short}: ").read()
            key = read(own)
            self._own_passphrases[ca.key_id] = own
            if ca.kind is CaKind.ISSUING or not self._key_files():
                self._passphrase = own  # that of the next issuing CA's key file, too
            return key

    def _key_files(self) -> list[Ca]:
        """Return the issuing CAs whose keys are in files."""
        return [ca for ca in self.cas.signing if not ca.key_uri]

    def _token_key(self, ca: Ca) -> TokenKey:
        uri = TokenUri.parse(ca.key_uri)
        public_key = ca.certificate.public_key()
        if not isinstance(public_key, EllipticCurvePublicKey):
            raise AuthorityError(f"could not use the key of the issuing CA {ca.short}: it is no P-256 key")
        key = self.tokens.token(uri).key(uri, public_key)
        key.prove()
        return key

    @contextmanager
    def crl_lock(self) -> Iterator[None]:
        """Hold this from the choice of a CRL's number until that CRL is in its file: CRLs appear in order."""
        with exclusive_lock(self.folder / CRL_LOCK_FILE), self.registry.held_open():
            yield

    def issue_lock(self) -> AbstractContextManager[None]:
        """Hold this while a key pair is made and certified: nobody takes that attempt for a killed one."""
        return exclusive_lock(self.folder / ISSUE_LOCK_FILE)

    def files(self) -> list[Path]:
        """Return every file that is the station's own, but for its registry, its audit log and its locks.

        That is whatever lies in its folder and in `keys`, so that nothing is forgotten; a root's key while it is
        here. What holds an unencrypted private key is somebody else's: an operator's, put here by chance.
        """
        folders = [folder for folder in (self.folder, self.folder / KEYS_FOLDER) if folder.is_dir()]
        apart = self.registry.files()
        found = [path for folder in folders for path in sorted(folder.iterdir()) if path not in apart]
        return [path for path in found if _is_own(path)]

    def rollover_lock(self) -> AbstractContextManager[None]:
        """Hold this while a CA is made, put in charge or retired: one at a time."""
        return exclusive_lock(self.folder / ROLLOVER_LOCK_FILE)

    def close(self) -> None:
        """Let go of the registry's file."""
        self.registry.close()


def _is_own(path: Path) -> bool:
    if path.name.startswith(".") or path.suffix in _KEPT_APART or path.name in (REGISTRY_FILE, AUDIT_FILE):
        return False
    return path.is_file() and (path.suffix != ".pem" or not _UNENCRYPTED.search(path.read_bytes()))
