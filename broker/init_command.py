"""`birthmark-broker init`: write a commented `broker.toml` and `policy.toml`.

Rules: nothing is overwritten; both files are written or none; what is written can be read back.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.x509.oid import NameOID

from birthmark.broker.config import DEFAULT_LISTEN, override_listen
from birthmark.broker.policy_file import parse_policy
from birthmark.broker.toml_file import parse_toml
from birthmark.broker.trust import MALFORMED
from birthmark.device.console import command
from birthmark.device.durable import write_durably
from birthmark.device.errors import ConfigurationError, IdentityError, SystemFailureError
from birthmark.device.identity import BrokerName

if TYPE_CHECKING:
    import argparse

    from birthmark.device.console import Console, Parser

FILE_MODE = 0o644
_PATHS = {
    "credentials": "server.pem",
    "clients_ca": "clients-ca.pem",
    "crl": "crl.pem",
    "policy": "policy.toml",
    "data_folder": "data",
}
_EXAMPLES = """
birthmark-broker init
birthmark-broker init --folder /etc/birthmark --name gateway-1.example.com
birthmark-broker init --credentials /etc/ssl/private/server.pem --listen 127.0.0.1:8883
"""


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the `init` command."""
    parser = command(commands, "init", _init, "write a commented broker.toml and policy.toml", _EXAMPLES)
    parser.add_argument("--folder", type=Path, default=Path(), metavar="DIR", help="where to (default: here)")
    parser.add_argument("--name", help="the gateway's name (default: its certificate's CN, else the host's name)")
    parser.add_argument("--listen", default=DEFAULT_LISTEN, metavar="HOST:PORT", help=f"default: {DEFAULT_LISTEN}")
    parser.add_argument("--credentials", metavar="FILE", help="key, certificate and chain (default: server.pem)")
    parser.add_argument("--clients-ca", metavar="FILE", help="the clients' issuing CAs (default: clients-ca.pem)")
    parser.add_argument("--crl", metavar="FILE", help="the CRL file to watch (default: crl.pem)")
    parser.add_argument("--data-folder", metavar="DIR", help="what survives a restart (default: data)")


def _init(arguments: argparse.Namespace, console: Console) -> None:
    folder: Path = arguments.folder
    broker_path, policy_path = folder / "broker.toml", folder / "policy.toml"
    for path in (broker_path, policy_path):
        if path.exists() or path.is_symlink():
            raise ConfigurationError(
                f"could not write {path}: it exists already", hint="remove it, or choose another --folder"
            )
    values = {key: _given(getattr(arguments, key, None), default) for key, default in _PATHS.items()}
    values["name"] = _name(arguments.name, folder / values["credentials"])
    override_listen(arguments.listen)
    values["listen"] = arguments.listen
    broker_toml = _filled(_template("broker.default.toml"), values)
    parse_toml(broker_toml, str(broker_path), ConfigurationError)
    policy_toml = _template("policy.default.toml")
    policy = parse_policy(policy_toml, str(policy_path))
    _write_both({policy_path: policy_toml, broker_path: broker_toml})
    console.emit(
        {"broker": str(broker_path), "policy": str(policy_path), "name": values["name"]},
        f"wrote {broker_path} (gateway {values['name']}) and {policy_path} ({len(policy.roles)} roles)",
    )
    missing = [str(folder / values[key]) for key in ("credentials", "clients_ca", "crl")]
    missing = [path for path in missing if not Path(path).exists()]
    if missing:
        console.say(f"still missing: {', '.join(missing)}; `birthmark issue-broker` at the station writes them")
    shown = "" if folder == Path() else f" --config {broker_path}"
    console.say(f"next: birthmark-broker run{shown}")


def _given(option: str | None, default: str) -> str:
    # A path on the command line is relative to the working directory, one in the file to the file's folder.
    return str(Path(option).absolute()) if option else default


def _name(given: str | None, credentials_path: Path) -> str:
    name = given or _certificate_name(credentials_path) or socket.gethostname()
    try:
        return str(BrokerName(name))
    except IdentityError as error:
        raise ConfigurationError(error.message, hint=f"{error.hint}, with --name") from error


def _certificate_name(credentials_path: Path) -> str | None:
    """Return the CN of the first certificate in the file, if there is one that can be read."""
    try:
        leaf = x509.load_pem_x509_certificates(credentials_path.read_bytes())[0]
        names = leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except (OSError, *MALFORMED):
        return None
    return str(names[0].value) if names else None


def _template(name: str) -> bytes:
    return resources.files("birthmark.broker").joinpath(name).read_bytes()


def _filled(template: bytes, values: dict[str, str]) -> bytes:
    # JSON's strings are TOML's basic strings, as long as nothing outside ASCII is escaped.
    text = re.sub(r"@(\w+)@", lambda found: json.dumps(values[found[1]], ensure_ascii=False), template.decode())
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ConfigurationError("could not write broker.toml: a path is not UTF-8") from error


def _write_both(files: dict[Path, bytes]) -> None:
    written: list[Path] = []
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(path, content, mode=FILE_MODE)
            written.append(path)
    except OSError as error:
        for path in written:
            with contextlib.suppress(OSError):
                path.unlink()
        where = next(path for path in files if path not in written)
        raise SystemFailureError(f"could not write {where}: {error.strerror or error}") from error
