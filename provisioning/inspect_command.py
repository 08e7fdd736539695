"""`birthmark inspect`: its options and its answers."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509

from birthmark.device.console import Console, Parser, command
from birthmark.device.errors import BirthmarkError, CredentialError
from birthmark.provisioning.inspection.context_rules import Issuers, recorded
from birthmark.provisioning.inspection.model import Finding, Severity
from birthmark.provisioning.inspection.reading import Inspected, facts_of, inspect, read_objects
from birthmark.provisioning.options import add_station_option, station_folder
from birthmark.provisioning.settings import SETTINGS_FILE
from birthmark.provisioning.station import Station, utc_now

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from birthmark.provisioning.inspection.reading import Readable

    Context = Callable[[Readable], Iterator[Finding]]

_MAX_BYTES = 1 << 28
"""More than the CRL of ten million."""
_COLOURS = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.NOTICE: "dim"}
_STDIN = "-"


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add this command."""
    parser = command(
        commands,
        "inspect",
        _inspect,
        "hold certificates, requests and CRLs against the profile",
        """\
birthmark inspect gateway-1/server.pem
birthmark inspect --issuer issuing.pem crl.pem
openssl s_client -connect localhost:8883 </dev/null | birthmark inspect - --json""",
    )
    add_station_option(parser)
    parser.add_argument("files", nargs="+", metavar="FILE", help="PEM (one block or more) or DER; - for stdin")
    parser.add_argument(
        "--issuer", type=Path, metavar="FILE", help="check signatures against the CAs in it, not against a station"
    )


def _inspect(arguments: argparse.Namespace, console: Console) -> int:
    context = _context(arguments, console)
    worst = 0
    for name in arguments.files:
        try:
            objects = read_objects(_content(name))
        except CredentialError as error:  # the other files are looked at all the same
            worst = max(worst, console.fail(CredentialError(f"{error.message} ({name})", error.hint)))
            continue
        except OSError as error:
            worst = max(worst, console.fail(error))
            continue
        for number, what in enumerate(objects, start=1):
            found = inspect(number, what, utc_now())
            found = replace(found, findings=(*found.findings, *context(what)))
            _tell(console, name, found)
            worst = max(worst, 0 if found.is_clean else 1)
    return worst


def _content(name: str) -> bytes:
    if name == _STDIN:
        content = sys.stdin.buffer.read(_MAX_BYTES + 1)
    else:
        with Path(name).open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise CredentialError("could not inspect this: it is larger than 256 MiB")
    return content


def _context(arguments: argparse.Namespace, console: Console) -> Context:
    """Return what there is to ask beside the profile: an issuer, a station, or nothing."""
    if arguments.issuer is not None:
        certificates = [
            one for one in read_objects(_content(str(arguments.issuer))) if isinstance(one, x509.Certificate)
        ]
        return _by_issuers(Issuers(certificates, f"the CAs in {arguments.issuer}"))
    folder = station_folder(arguments)
    if arguments.station is None and not (folder / SETTINGS_FILE).exists():
        return lambda _: iter(())
    try:
        return _by_station(Station.open(folder))
    except BirthmarkError as error:
        if arguments.station is not None:
            raise
        console.warn(f"{error.message}: not asked")
        return lambda _: iter(())


def _by_issuers(issuers: Issuers) -> Context:
    def findings(what: Readable) -> Iterator[Finding]:
        if not isinstance(what, x509.CertificateSigningRequest):
            yield from issuers.findings(what)

    return findings


def _by_station(station: Station) -> Context:
    cas = station.cas
    issuers = Issuers([ca.certificate for ca in cas], f"the CAs of the station {station.folder}")

    def findings(what: Readable) -> Iterator[Finding]:
        if isinstance(what, x509.CertificateSigningRequest):
            return
        own = list(issuers.findings(what))
        yield from own
        if isinstance(what, x509.Certificate) and not any(each.severity is Severity.ERROR for each in own):
            with station.registry.view() as view:
                yield from recorded(what, view, cas)

    return findings


def _tell(console: Console, name: str, found: Inspected) -> None:
    facts = facts_of(found)
    record = {
        "file": name,
        "number": found.number,
        **facts,
        "clean": found.is_clean,
        "findings": [finding.record() for finding in found.findings],
    }
    head = f"{name} {found.number}: {found.claim}"
    lines = [console.paint(f"{head} {found.name}".rstrip(), "bold")]
    width = max(len(key) for key in facts)
    lines += [f"  {key.replace('_', ' '):<{width}}  {value}" for key, value in facts.items() if value != ""]
    for finding in found.findings:
        severity = console.paint(finding.severity.value, _COLOURS[finding.severity])
        lines.append(f"  {severity} {finding.rule}: {finding.what}: {finding.why}")
        lines.append(f"    to do: {finding.remedy}")
    if not found.findings:
        lines.append(console.paint("  nothing is wrong with it", "green"))
    console.emit(record, "\n".join(lines))
