"""Making a CA that is to take another one's place: an issuing CA, or a root and an issuing CA under it.

A key is on disk, or in its token, before the record of its CA. A key file that a kill has left without a record
stays, for the registry may be older than it; `birthmark doctor` names it.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from birthmark.device.durable import remove_leftovers
from birthmark.provisioning import profile
from birthmark.provisioning.ca_keys import FileKeys, undone
from birthmark.provisioning.cas import MAX_STANDING_ISSUING, MAX_STANDING_ROOTS, SHORT, Ca, CaKind, put_ca
from birthmark.provisioning.crls import sign_root_crl
from birthmark.provisioning.encrypted_key import DEFAULT_DERIVATION
from birthmark.provisioning.places import KEYS_FOLDER
from birthmark.provisioning.rollover.phases import new_issuing, record, refused

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

    from birthmark.provisioning.ca_keys import KeyMaker, TokenPlace
    from birthmark.provisioning.cas import Cas
    from birthmark.provisioning.encrypted_key import KeyDerivation
    from birthmark.provisioning.station import Station


@dataclass(frozen=True, slots=True)
class RootKey:
    """Where a root's key is, and what opens it."""

    passphrase: bytes | None = field(default=None, repr=False)
    """None: that of the issuing CAs' key files, or what a person says."""
    path: Path | None = None
    """None: at the station."""


def start_issuing(
    station: Station,
    root_key: Callable[[], RootKey],
    *,
    derivation: KeyDerivation = DEFAULT_DERIVATION,
    place: TokenPlace | None = None,
) -> Ca:
    """Make the next issuing CA under the current root; if it is made already, return it.

    Args:
        station: the station.
        root_key: where the root's key is, and what opens it.
        derivation: what trying one passphrase costs.
        place: the token for the new CA's key; None for a file. The old one's key is not needed for a token.

    Raises:
        AuthorityError: a key cannot be unlocked, or the token cannot be used; nothing was changed.
        RolloverRefusedError: a root is being replaced, or there are too many CAs.
    """
    with station.rollover_lock():
        cas = station.cas
        new = new_issuing(cas)
        if new is not None:
            if new.root != cas.for_clients.root:
                raise refused("start the next issuing CA", "a root is being replaced", "finish that first")
            return new
        _check_room(cas, CaKind.ISSUING)
        remove_leftovers(station.folder / KEYS_FOLDER)
        keys = station.key_maker(place, derivation)
        held = root_key()
        root = station.root_issuer(held.passphrase, held.path)
        with undone(keys) as made:
            key, issuing = _issuing_under(station, root, keys, made)
            keys.keep(key, station.key_path(issuing))
        _put(station, issuing)
        return issuing


def start_root(
    station: Station,
    passphrase: bytes | None,
    *,
    derivation: KeyDerivation = DEFAULT_DERIVATION,
    place: TokenPlace | None = None,
) -> Ca:
    """Make the next root and an issuing CA under it; return the latter, also if they are made already.

    Args:
        station: the station.
        passphrase: of the new root's key; the issuing CA's if not given.
        derivation: what trying one passphrase costs.
        place: the token for the new issuing CA's key; None for a file.

    Raises:
        AuthorityError: the issuing CA's key cannot be unlocked, or the token cannot be used; nothing was changed.
        RolloverRefusedError: an issuing CA is being replaced, or there are too many CAs.
    """
    with station.rollover_lock():
        cas = station.cas
        new = new_issuing(cas)
        if new is not None:
            if new.root == cas.for_clients.root:
                raise refused("start the next root", "an issuing CA is being replaced", "finish that first")
            started = cas.get(new.root)
            if station.key_path(started).exists():
                sign_root_crl(station, station.root_issuer(passphrase, root=started))
            return new
        _check_room(cas, CaKind.ROOT)
        _check_room(cas, CaKind.ISSUING)
        remove_leftovers(station.folder / KEYS_FOLDER)
        keys = station.key_maker(place, derivation)
        now = station.clock()
        own_keys = FileKeys(lambda: passphrase or station.passphrase_of_new_keys(), derivation)
        root_key, certificate = _distinct(
            cas,
            own_keys,
            [],
            b"",
            lambda key: profile.root_certificate(
                key,
                organization=station.settings.organization,
                cert_serial=profile.new_cert_serial(secrets.token_bytes),
                now=now,
            ),
        )
        root = Ca.made(CaKind.ROOT, certificate, "", now, activated_at=now)
        issuer = profile.Issuer(certificate, root_key)
        with undone(keys) as made:
            key, issuing = _issuing_under(station, issuer, keys, made)
            own_keys.keep(root_key, station.key_path(root))
            keys.keep(key, station.key_path(issuing))
        _put(station, root, issuing)
        sign_root_crl(station, issuer)
        return issuing


def _check_room(cas: Cas, kind: CaKind) -> None:
    count, most = (
        (len(cas.roots), MAX_STANDING_ROOTS) if kind is CaKind.ROOT else (len(cas.issuing), MAX_STANDING_ISSUING)
    )
    if count >= most:
        raise refused(f"start the next {kind} CA", f"{count} are trusted already", "retire the old ones first")


def _put(station: Station, *cas: Ca) -> None:
    """Record new CAs, whose keys are kept."""
    with station.registry.transaction() as transaction:
        for ca in cas:
            put_ca(transaction, ca)
            record(transaction, "ca-start", ca, key_uri=ca.key_uri or None)


def _issuing_under(
    station: Station, root: profile.Issuer, keys: KeyMaker, made: list[EllipticCurvePrivateKey]
) -> tuple[EllipticCurvePrivateKey, Ca]:
    now = station.clock()
    root_id = profile.key_id(root.certificate)
    key, certificate = _distinct(
        station.cas,
        keys,
        made,
        root_id,
        lambda key: profile.issuing_certificate(
            root,
            key.public_key(),
            organization=station.settings.organization,
            cert_serial=profile.new_cert_serial(secrets.token_bytes),
            now=now,
        ),
    )
    return key, Ca.made(CaKind.ISSUING, certificate, root_id.hex(), now, key_uri=keys.uri_of(key))


def _distinct(
    cas: Cas,
    keys: KeyMaker,
    made: list[EllipticCurvePrivateKey],
    root_id: bytes,
    certify: Callable[[EllipticCurvePrivateKey], x509.Certificate],
) -> tuple[EllipticCurvePrivateKey, x509.Certificate]:
    """Make a key whose identifier begins like no other CA's: people and file names go by that."""
    taken, short = {ca.key_id for ca in cas}, {ca.short for ca in cas}
    while True:
        key = keys.make(root_id, taken)
        made.append(key)
        certificate = certify(key)
        if profile.key_id(certificate).hex()[:SHORT] not in short:
            return key, certificate
        keys.drop(key)
