"""`birthmark ca token list | check`: what PKCS#11 tokens there are, and whether the CA's key in one works."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from birthmark.device.console import Console, Parser, command
from birthmark.device.errors import AuthorityError, ConfigurationError
from birthmark.device.options import taken_from_options
from birthmark.provisioning.ca_keys import TokenAccess
from birthmark.provisioning.options import (
    add_pin_option,
    add_station_option,
    open_station,
    pin_source,
    station_folder,
)
from birthmark.provisioning.settings import SETTINGS_FILE, TokenSettings, read_settings
from birthmark.provisioning.tokens.modules import tokens_in
from birthmark.provisioning.tokens.uri import TokenUri

if TYPE_CHECKING:
    import argparse

    from birthmark.provisioning.cas import Ca
    from birthmark.provisioning.station import Station
    from birthmark.provisioning.tokens.modules import TokenFacts


def add_to(actions: argparse._SubParsersAction[Parser]) -> None:
    """Add these commands to those of `birthmark ca`."""
    parser = actions.add_parser(
        "token",
        help="look after the PKCS#11 token with the issuing CA's key",
        description="look after the PKCS#11 token with the issuing CA's key",
        examples="birthmark ca token list --module /usr/lib/softhsm/libsofthsm2.so\nbirthmark ca token check",
    )
    commands: argparse._SubParsersAction[Parser] = parser.add_subparsers(
        title="actions", metavar="ACTION", required=True
    )
    _add_list(commands)
    _add_check(commands)


def _add_list(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = command(
        commands,
        "list",
        _list,
        "list the tokens that a PKCS#11 module has, or the keys in one of them",
        """\
birthmark ca token list --module /usr/lib/softhsm/libsofthsm2.so
birthmark ca token list --keys pkcs11:token=birthmark""",
    )
    add_station_option(parser)
    add_pin_option(parser)
    parser.add_argument("--module", type=Path, metavar="FILE", help="the PKCS#11 module (default: the station's)")
    parser.add_argument("--keys", metavar="URI", help="the private keys in this token; takes its PIN")


def _list(arguments: argparse.Namespace, console: Console) -> None:
    settings_path = station_folder(arguments) / SETTINGS_FILE
    own = TokenSettings()
    if arguments.module is not None:
        own = TokenSettings(arguments.module.absolute())
    elif settings_path.exists():
        own = read_settings(settings_path).token
    access = TokenAccess(lambda: own, pin_source(arguments), naming="here --module FILE")
    if arguments.keys is not None:
        with taken_from_options():
            uri = TokenUri.parse(arguments.keys)
        keys = [
            {
                "object": key.label,
                "id": key.id.hex(),
                "suits": key.trouble or "yes",
                "made_in_token": key.made_there,
            }
            for key in access.token(uri).private_keys()
        ]
        console.table(keys, ["object", "id", "suits", "made_in_token"], empty="there is no EC key in it")
        return
    tokens = [_token_record(facts) for facts in tokens_in(access.module())]
    console.table(tokens, ["token", "serial", "manufacturer", "model", "pin"], empty="there is no token in it")


def _token_record(facts: TokenFacts) -> dict[str, Any]:
    return {
        "token": facts.label,
        "serial": facts.serial,
        "manufacturer": facts.manufacturer,
        "model": facts.model,
        "pin": facts.state,
    }


def _add_check(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = command(
        commands,
        "check",
        _check,
        "have each CA's key that is in a token sign, and say how well the token keeps it",
        "birthmark ca token check\nbirthmark ca token check --pin-fd 3 3< pin-file",
    )
    add_station_option(parser)
    add_pin_option(parser)


def _check(arguments: argparse.Namespace, console: Console) -> int:
    station = open_station(arguments)
    held = [ca for ca in station.cas.issuing if ca.key_uri]
    if not held:
        raise ConfigurationError(
            "could not check a token: no issuing CA's key is in one",
            hint="put the next one there: birthmark ca rollover start issuing --key 'pkcs11:token=...;object=...'",
        )
    code = 0
    for ca in held:
        record: dict[str, Any] = {"ca": ca.key_id, "key_uri": ca.key_uri}
        try:
            warning = _checked(station, ca)
        except AuthorityError as error:
            code = error.exit_code
            console.emit({**record, "signs": False, "reason": error.message}, f"{ca.short}: {error.message}")
            console.say(f"hint: {error.hint}")
            continue
        console.emit({**record, "signs": True, "warning": warning}, f"{ca.short}: signs by {ca.key_uri}")
        if warning:
            console.warn(f"{ca.short}: {warning}")
    return code


def _checked(station: Station, ca: Ca) -> str:
    """Have the key sign; return what is not as well as it might be.

    Raises:
        AuthorityError: it does not sign, or the token would give it away.
    """
    station.check_key(ca.key_id)
    uri = TokenUri.parse(ca.key_uri)
    facts = [
        key for key in station.tokens.token(uri).private_keys() if key.id == uri.id and key.label == uri.object
    ]
    for key in facts:
        if key.trouble:
            raise AuthorityError(
                f"could not trust the key {uri}: {key.trouble}", hint="roll over to another token"
            )
        if not key.made_there:
            return "the token does not say that this key was made in it: there may be a copy elsewhere"
    return ""
