"""How a station comes into being: two CAs, a registry, the first CRLs.

Rules:

- Everything is made in a folder beside the final one, which is renamed into place at the end: a station is there
  whole or not at all. What an interrupted attempt left is removed by the next one; but for tables in a database,
  which may be another station's (docs/registry.md).
- The root signs the issuing CA's certificate and its own CRL, and is not needed again until that CRL ends: its key
  is in a file of its own, and may have a passphrase of its own.
- A key that was made in a token for a station that did not come about is removed from it, unless the process was
  killed: then the next attempt finds it, and says so.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

from birthmark.device.durable import private_folder, rename_durably, write_durably
from birthmark.device.errors import ConfigurationError
from birthmark.provisioning import profile
from birthmark.provisioning.actor import actor
from birthmark.provisioning.ca_keys import PIN_SOURCE, FileKeys, KeyMaker, TokenKeys, TokenPlace, undone
from birthmark.provisioning.cas import Ca, CaKind, put_ca
from birthmark.provisioning.crls import sign_and_store_crl, sign_root_crl
from birthmark.provisioning.encrypted_key import DEFAULT_DERIVATION, KeyDerivation
from birthmark.provisioning.keyfile import write_key
from birthmark.provisioning.places import KEYS_FOLDER
from birthmark.provisioning.registry.opening import new_registry
from birthmark.provisioning.settings import SETTINGS_FILE, Settings
from birthmark.provisioning.station import Station, utc_now

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

    from birthmark.provisioning.passphrase import PassphraseSource

_UNFINISHED: Final = ".unfinished"


def found_station(
    folder: Path,
    settings: Settings,
    *,
    passphrase: bytes,
    root_passphrase: bytes | None = None,
    clock: Callable[[], datetime] = utc_now,
    derivation: KeyDerivation = DEFAULT_DERIVATION,
    place: TokenPlace | None = None,
    pin: bytes | PassphraseSource = PIN_SOURCE,
) -> Station:
    """Make a station in `folder` and open it.

    Args:
        folder: where it is to be; must not exist, or be empty.
        settings: the organization and the defaults.
        passphrase: for the issuing CA's key file; for the root's alone, if the issuing CA's key is in a token.
        root_passphrase: for the root's key; the same one if not given.
        clock: the current time, aware.
        derivation: what trying one passphrase costs.
        place: the token for the issuing CA's key; None for a file.
        pin: the token's PIN, or where to get it.

    Raises:
        ConfigurationError: there is something in `folder` already; nothing was changed.
        AuthorityError: the passphrase is empty, or the token cannot be used.
        OSError: something could not be written; nothing is left.
    """
    folder = folder.absolute()
    refuse_occupied(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        unfinished(folder) as building,
        new_registry(building, settings.registry, clock=clock, actor=actor()) as registry,
    ):
        private_folder(building / KEYS_FOLDER)
        write_durably(building / SETTINGS_FILE, settings.to_toml().encode())
        station = Station(
            building, settings, registry, passphrase=passphrase, pin=pin, clock=clock, purpose="init"
        )
        keys = TokenKeys(station.tokens, place) if place else FileKeys(lambda: passphrase, derivation)
        with undone(keys) as made:
            _build(station, keys, made, root_passphrase or passphrase, derivation)
            station.close()
            refuse_occupied(folder)
        rename_durably(building, folder)
    return Station.open(folder, passphrase=passphrase, pin=pin, clock=clock)


def _build(
    station: Station,
    keys: KeyMaker,
    made: list[EllipticCurvePrivateKey],
    root_passphrase: bytes,
    derivation: KeyDerivation,
) -> None:
    now = station.clock()
    organization = station.settings.organization
    root_key = generate_private_key(SECP256R1())
    root_certificate = profile.root_certificate(
        root_key, organization=organization, cert_serial=profile.new_cert_serial(secrets.token_bytes), now=now
    )
    root = profile.Issuer(root_certificate, root_key)
    issuing_key = keys.make(profile.key_id(root_certificate), ())
    made.append(issuing_key)
    issuing_certificate = profile.issuing_certificate(
        root,
        issuing_key.public_key(),
        organization=organization,
        cert_serial=profile.new_cert_serial(secrets.token_bytes),
        now=now,
    )
    root_ca = Ca.made(CaKind.ROOT, root_certificate, "", now, activated_at=now)
    issuing_ca = Ca.made(
        CaKind.ISSUING,
        issuing_certificate,
        root_ca.key_id,
        now,
        activated_at=now,
        clients=True,
        brokers=True,
        key_uri=keys.uri_of(issuing_key),
    )
    with station.registry.transaction() as transaction:
        for ca in (root_ca, issuing_ca):
            put_ca(transaction, ca)
            transaction.record(
                "init",
                f"{ca.kind}-ca",
                organization=organization,
                cert_serial=f"{ca.certificate.serial_number:x}",
                key_id=ca.key_id,
                key_uri=ca.key_uri or None,
            )
    write_key(station.key_path(root_ca), root_key, root_passphrase, derivation)
    keys.keep(issuing_key, station.key_path(issuing_ca))
    station.publish_certificates()
    sign_root_crl(station, root)
    sign_and_store_crl(station)


def refuse_occupied(folder: Path) -> None:
    """Refuse a folder in which there is something; `ConfigurationError`."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        raise ConfigurationError(
            f"could not make a station in {folder}: there is something already",
            hint="choose another folder; a CA is never overwritten",
        )


@contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """Make a private folder beside `folder`, locked while it lives; remove those that a crash left."""
    for leftover in folder.parent.iterdir():
        if leftover.name.startswith(f".{folder.name}.") and leftover.name.endswith(_UNFINISHED):
            with suppress(FileNotFoundError), _folder_lock(leftover, leftover=True):
                pass
    building = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{_UNFINISHED}")
    building.mkdir(mode=0o700)
    try:
        with _folder_lock(building):
            yield building
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextmanager
def _folder_lock(folder: Path, *, leftover: bool = False) -> Iterator[None]:
    """Lock a folder; a leftover whose maker is gone (so that it can be locked) is removed."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not leftover:
                raise
        else:
            if leftover:
                shutil.rmtree(folder, ignore_errors=True)
        yield
    finally:
        os.close(descriptor)
