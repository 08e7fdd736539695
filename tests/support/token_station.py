"""What tests of a station whose issuing CA's key is in a PKCS#11 token have in common."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from support.softhsm import LABEL, PIN, SoftHsm
from support.station import CHEAP, PASSPHRASE

from birthmark.provisioning.ca_keys import TokenPlace
from birthmark.provisioning.founding import found_station
from birthmark.provisioning.settings import Settings, TokenSettings
from birthmark.provisioning.station import Station
from birthmark.provisioning.tokens.uri import TokenUri

if TYPE_CHECKING:
    from pathlib import Path


TOKEN = TokenUri(LABEL)


def found(folder: Path, softhsm: SoftHsm, token: TokenUri) -> Station:
    """Found a station with its issuing key in the token."""
    return found_station(
        folder,
        Settings("Acme", token=TokenSettings(softhsm.module)),
        passphrase=PASSPHRASE,
        derivation=CHEAP,
        place=TokenPlace(replace(token, object="issuing")),
        pin=PIN,
    )


def reopened(station: Station) -> Station:
    """Open a station anew, as the next command does."""
    return Station.open(station.folder, passphrase=b"not needed", pin=PIN)


def keys_in(softhsm: SoftHsm, token: TokenUri) -> list[str]:
    return sorted(key.label for key in softhsm.token(token).private_keys())
