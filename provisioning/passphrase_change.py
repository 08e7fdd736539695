"""Another passphrase for the CAs' key files.

Rules:

- Every key is unlocked, and held against its certificate, before the first file is touched. Each file is replaced
  whole: killed at any step, it opens with the old passphrase or with the new one, and the same command again
  finishes with those that are left.
- All issuing CAs' key files have one passphrase, those of retired CAs included: the station asks for one. The
  roots' is theirs. A key that was given up for lost is passed over.
- The bytes of the old file are overwritten, as far as the file system lets: one that copies on write, a disk that
  spreads its writes, a snapshot or a backup keeps them, and the old passphrase opens those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from birthmark.device.errors import AuthorityError
from birthmark.provisioning import keyfile, profile
from birthmark.provisioning.encrypted_key import DEFAULT_DERIVATION, KeyDerivation

if TYPE_CHECKING:
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

    from birthmark.provisioning.cas import Ca, CaKind
    from birthmark.provisioning.station import Station


@dataclass(frozen=True, slots=True)
class Changed:
    """A key file that opens with the new passphrase."""

    ca: Ca
    path: Path
    newly: bool
    """Whether it did not before."""


def change_passphrase(
    station: Station,
    kind: CaKind,
    old: bytes,
    new: bytes,
    *,
    path: Path | None = None,
    derivation: KeyDerivation = DEFAULT_DERIVATION,
) -> list[Changed]:
    """Change the passphrase of the issuing CAs' key files, or of the roots'.

    Args:
        station: whose.
        kind: which keys.
        old: what opens them now.
        new: what is to.
        path: the key file of a root, where it is away from the station.
        derivation: what trying one passphrase costs from now on.

    Raises:
        AuthorityError: a key opens with neither passphrase, does not fit, or none is there; or both are the same.
            Nothing was changed.
        OSError: a file could not be replaced; it is as it was, and those before it are changed.
    """
    if old == new:
        raise AuthorityError("could not change the passphrase: the new one is the old one", hint="choose another")
    with station.rollover_lock():
        found = [_opened(ca, where, old, new) for ca, where in _key_files(station, kind, path)]
        for ca, where, _, _ in found:
            station.note_unlock(ca, where)
        for ca, where, key, is_old in found:
            if is_old:
                with station.registry.transaction() as transaction:
                    transaction.record("passphrase", f"{ca.kind}-ca", key_id=ca.key_id, path=str(where))
                keyfile.replace_key(where, key, new, derivation)
        return [Changed(ca, where, is_old) for ca, where, _, is_old in found]


def _key_files(station: Station, kind: CaKind, path: Path | None) -> list[tuple[Ca, Path]]:
    cas = [ca for ca in station.cas if ca.kind is kind and not ca.key_uri and ca.lost_at is None]
    if path is not None:
        named = [(ca, path) for ca in cas if path.name == station.key_path(ca).name]
        cause = f"{path.name} is not the name of one of its root keys"
    else:
        named = [(ca, station.key_path(ca)) for ca in cas if station.key_path(ca).exists()]
        cause = "there is no such key file at the station"
    if not named:
        raise AuthorityError(
            f"could not change the passphrase of the {kind} CA: {cause}",
            hint="a root's key that is away: --root-key FILE, by its own name; a token has a PIN of its own",
        )
    return named


def _opened(ca: Ca, path: Path, old: bytes, new: bytes) -> tuple[Ca, Path, EllipticCurvePrivateKey, bool]:
    whose = f"the {ca.kind} CA {ca.short}"
    is_old = True
    try:
        key = keyfile.read_key(path, old, whose=whose)
    except AuthorityError as error:
        try:
            key, is_old = keyfile.read_key(path, new, whose=whose), False  # a run of before was killed
        except AuthorityError:
            raise error from None
    profile.Issuer(ca.certificate, key)
    return ca, path, key, is_old
