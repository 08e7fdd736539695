"""`birthmark-broker export mosquitto`: the same identities and policy for another engine, or why that cannot be.

Rules:

- What the engine cannot do is refused, every reason at once, before anything is written. What is accepted by
  name is written into the folder's README.
- The CRLs are the newest known here: of the watched file and of those in force.
- Each file is replaced whole, the ACL first: whoever lost his rights loses them first. Nothing is replaced that
  an export did not write.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from birthmark.broker import mosquitto_files as files
from birthmark.broker.config import read_settings
from birthmark.broker.crl import read_crl, split_crls
from birthmark.broker.export_roster import read_roster
from birthmark.broker.fleet.policy import kept_policy, policy_in_force, shown
from birthmark.broker.mosquitto_limits import CODES, POLICY, Refusal, refusals
from birthmark.broker.revocation import Revocations
from birthmark.broker.tls import server_context
from birthmark.broker.toml_file import parse_toml, read_toml
from birthmark.broker.trust import read_trust
from birthmark.device.console import Parser, command
from birthmark.device.durable import write_durably
from birthmark.device.errors import ConfigurationError, PolicyError, SystemFailureError

if TYPE_CHECKING:
    import argparse

    from birthmark.broker.config import BrokerSettings
    from birthmark.broker.crl import Crl
    from birthmark.broker.policy import Policy
    from birthmark.broker.trust import Trust
    from birthmark.device.console import Console

_EXAMPLES = """
birthmark registry export --format jsonl -o identities.jsonl                      # at the station
birthmark-broker export mosquitto --identities identities.jsonl --out mosquitto
birthmark-broker export mosquitto --identities identities.jsonl --out mosquitto --accept limits --accept profile
"""
_MODE = 0o644
_SCRIPT_MODE = 0o755


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the `export` commands."""
    summary = "write the configuration of another engine"
    group = commands.add_parser("export", help=summary, description=summary, examples=_EXAMPLES)
    engines: argparse._SubParsersAction[Parser] = group.add_subparsers(
        title="actions", metavar="ACTION", required=True
    )
    what = "write a complete configuration of Mosquitto 2.0, or say what it cannot do"
    parser = command(engines, "mosquitto", _mosquitto, what, _EXAMPLES)
    parser.add_argument("--config", type=Path, default=Path("broker.toml"), metavar="FILE", help="broker.toml")
    parser.add_argument("--identities", type=Path, required=True, metavar="FILE", help="the registry's JSONL")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to")
    parser.add_argument(
        "--accept", action="append", default=[], choices=CODES, metavar="NAME", help=f"one of {', '.join(CODES)}"
    )
    parser.add_argument("--run-as", default="mosquitto", metavar="USER", help="Mosquitto's user")


def _mosquitto(arguments: argparse.Namespace, console: Console) -> None:
    config, folder = arguments.config.absolute(), arguments.out.absolute()
    settings = read_settings(config)
    policy, version = policy_in_force(settings)
    accepted = _accepted(settings, policy, arguments.accept, console)
    _check_words(settings, folder, arguments.run_as)
    server_context(settings.credentials_path, settings.clients_ca_path)  # that Mosquitto could use them, too
    now = datetime.now(UTC)
    trust = read_trust(settings.clients_ca_path)
    crls = _newest_crls(settings, trust, now)
    roster = read_roster(arguments.identities, trust, crls, now)
    again = ["export", "mosquitto", "--config", str(config), "--identities", str(arguments.identities.absolute())]
    again += ["--out", str(folder), "--run-as", arguments.run_as]
    again += [word for code in sorted({*arguments.accept}) for word in ("--accept", code)]
    _write(
        folder,
        {
            files.ACL: files.acl(policy, roster),
            files.CRL: files.crls_pem(crls.values()),
            files.CLIENTS_CA: files.clients_ca(trust),
            files.RELOAD: files.reload_script(again, folder),
            files.README: files.readme(settings, policy, version, roster, crls, accepted=accepted, moment=now),
            files.CONF: files.conf(settings, folder, arguments.run_as),
        },
    )
    record = {
        "engine": "mosquitto",
        "folder": str(folder),
        "identities": len(roster.peers),
        "revoked": roster.revoked,
        "out_of_date": roster.out_of_date,
        "accepted": sorted({each.code for each in accepted}),
    }
    console.emit(
        record,
        f"wrote {folder}: {len(roster.peers)} identities ({roster.revoked} revoked and {roster.out_of_date} out of"
        f" date left out); start it with mosquitto -c {folder / files.CONF}",
    )


def _accepted(settings: BrokerSettings, policy: Policy, names: list[str], console: Console) -> list[Refusal]:
    """Return what is weaker and accepted. Raises `ConfigurationError` or `PolicyError`: not all of it is."""
    assert settings.path is not None  # it was read from a file  # noqa: S101
    config, _ = read_toml(settings.path, ConfigurationError)
    signed = kept_policy(settings)
    if signed is None:
        rules, _ = read_toml(settings.policy_path, PolicyError)
    else:
        rules = parse_toml(signed.text, shown(signed), PolicyError)
    found = refusals(settings, config, policy, rules)
    left = [each for each in found if each.code not in names]
    for each in left:
        record = {"refused": each.code, "reason": each.reason, "remedy": each.remedy}
        name = "" if each.code == POLICY else f" [{each.code}]"
        console.emit(record, f"{console.paint('refused', 'red')}{name} {each.reason}\n  to do: {each.remedy}")
    if not left:
        return found
    final = any(each.code == POLICY for each in left)
    codes = " ".join(f"--accept {code}" for code in sorted({each.code for each in left} - {POLICY}))
    hint = "export from a copy of the files that says what is wanted there" + (f"; or {codes}" if codes else "")
    cause = f"Mosquitto cannot do {len(left)} things that the files say; nothing was written"
    raise (PolicyError if final else ConfigurationError)(f"could not export to Mosquitto: {cause}", hint=hint)


def _check_words(settings: BrokerSettings, folder: Path, run_as: str) -> None:
    """Refuse what cannot stand in `mosquitto.conf`, a line a setting."""
    if not settings.listen_port:
        raise ConfigurationError("could not export the listener: its port is 0, any free one", hint="name one")
    for text in (str(folder), str(settings.credentials_path), run_as):
        if not text.isprintable() or text != text.strip() or not text:
            raise ConfigurationError(f"could not write {text!r} into mosquitto.conf", hint="use a plain name")


def _newest_crls(settings: BrokerSettings, trust: Trust, now: datetime) -> dict[str, Crl]:
    """Return the newest CRL of each issuing CA; none has expired, for by such a one Mosquitto lets nobody in."""
    crls = dict(Revocations.read(trust, settings.data_folder, settings.revocation).crls)
    try:
        content = settings.crl_path.read_bytes()
    except OSError as error:
        cause = error.strerror or error
        raise ConfigurationError(f"could not read {settings.crl_path}: {cause}", hint="birthmark crl") from error
    found = split_crls(content)
    for der in found:
        crl = read_crl(der, trust, now)
        if crl.issuer not in crls or crls[crl.issuer].number < crl.number:
            crls[crl.issuer] = crl
    for issuer in trust:
        crl_in_force = crls.get(issuer.key_id)
        if crl_in_force is None or crl_in_force.next_update <= now:
            what = "there is none" if crl_in_force is None else f"it expired on {crl_in_force.next_update:%F}"
            raise ConfigurationError(
                f"could not export the CRL of '{issuer.name}': {what}, and Mosquitto would let nobody in",
                hint="sign a new one with `birthmark crl` at the station",
            )
    return crls


def _write(folder: Path, contents: dict[str, str]) -> None:
    conf = folder / files.CONF
    try:
        if conf.exists() and not conf.read_text(errors="replace").startswith(files.MARK):
            raise ConfigurationError(
                f"could not export to {folder}: its {files.CONF} is not from an export",
                hint="choose a folder of its own",
            )
        (folder / files.DATA).mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_durably(folder / name, content.encode(), mode=_SCRIPT_MODE if name == files.RELOAD else _MODE)
    except OSError as error:
        raise SystemFailureError(f"could not write to {folder}: {error.strerror or error}") from error
