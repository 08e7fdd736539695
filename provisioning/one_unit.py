"""What `birthmark flash | reflash | run | resume` have in common: their options, and one unit on one port.

Rules:

- The last line says PASS with the certificate's serial number and lifetime, or FAIL; an error follows on stderr.
- Every refusal is in the audit log; the row of the unit stays where it is.
- Ctrl-C leaves word in the audit log and prints the command that resumes.
- What became revoked on the way is on the CRL, and at every gateway, when the command ends.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from typing import TYPE_CHECKING

from birthmark.device.console import INTERRUPTED
from birthmark.device.errors import BirthmarkError, EnrollmentRefusedError, PortError
from birthmark.device.escape import escaped
from birthmark.device.identity import Role
from birthmark.device.link.timers import DEFAULT_BAUD
from birthmark.device.options import number
from birthmark.provisioning.crl_delivery import bring_missing
from birthmark.provisioning.enrollment.outcomes import Outcome
from birthmark.provisioning.enrollment.transitions import Transitions
from birthmark.provisioning.line.port_choice import choose
from birthmark.provisioning.registry.model import KeyMode, Kind, State

if TYPE_CHECKING:
    from birthmark.device.console import Console, Parser
    from birthmark.provisioning.enrollment.bundles import BrokerAddress
    from birthmark.provisioning.enrollment.port import PortName
    from birthmark.provisioning.enrollment.session import Session
    from birthmark.provisioning.line.progress import Progress
    from birthmark.provisioning.registry.interface import Registry
    from birthmark.provisioning.station import Station


def add_unit_options(parser: Parser) -> None:
    """Let a command say what the units on its ports are to be."""
    parser.add_argument("--role", help="the role that the certificate says (default: the station's)")
    parser.add_argument(
        "--keys",
        choices=[mode.value for mode in KeyMode],
        help="who makes the key pair (default: on-device, or as an interrupted run began)",
    )
    parser.add_argument(
        "--broker", metavar="HOST:PORT", help="where the device finds its broker (default: the station's settings)"
    )
    add_baud_option(parser)


def add_baud_option(parser: Parser) -> None:
    """Let a command say how fast its ports are."""
    parser.add_argument(
        "--baud", type=number, default=DEFAULT_BAUD, metavar="N", help="the port's speed (default: %(default)s)"
    )


def journal_of(station: Station, broker: BrokerAddress, registry: Registry | None = None) -> Transitions:
    """Return the station's journal; its CA is unlocked now, before any device is touched.

    Args:
        station: the station.
        broker: what the bundles say of the broker.
        registry: where the rows are, if not reached directly.

    Raises:
        AuthorityError: the CA cannot be unlocked.
        ConfigurationError: the lifetime in the settings is none.
    """
    station.settings.lifetimes.of(Kind.DEVICE)
    _ = station.authority
    return Transitions(
        registry or station.registry,
        station.authority_of,
        broker=broker,
        default_role=Role(station.settings.default_role),
        clock=station.clock,
        random_bytes=secrets.token_bytes,
    )


def enrol_one(
    session: Session, journal: Transitions, progress: Progress, station: Station, console: Console, *, resume: str
) -> int:
    """Enrol the unit of a session and tell how it went; return the exit code: 1 if a gateway has not got the CRL.

    Args:
        session: the unit's.
        journal: that of the session.
        progress: where the steps are told.
        station: whose CRL is brought up to date in the end.
        console: where a gateway that does not answer is told of.
        resume: the command that goes on after Ctrl-C.

    Raises:
        BirthmarkError: the unit is not made; the operator has seen FAIL.
    """
    try:
        row = session.run()
    except KeyboardInterrupt:
        if progress.row is not None and not progress.row.state.reached(State.ATTESTED):
            journal.interrupted(progress.row)
        journal.attempted(progress.attempt(Outcome.STOPPED))
        progress.interrupted(resume)
        return INTERRUPTED
    except EnrollmentRefusedError as error:
        progress.failed(error)
        journal.refused(progress.device_id, error.message)
        journal.attempted(progress.attempt(Outcome.FAIL, error))
        raise
    except BirthmarkError as error:
        progress.failed(error)
        with suppress(BirthmarkError):  # what could not be written once is not counted either
            journal.attempted(progress.attempt(Outcome.FAIL, error))
        raise
    finally:
        delivered = bring_missing(station, console, journal.revoked)
    with suppress(BirthmarkError):  # it is made, whether or not it can be counted
        journal.attempted(progress.attempt(Outcome.PASS))
    progress.passed(row)
    return 0 if delivered else 1


def checked_port(text: str, key_mode: KeyMode | None) -> PortName:
    """Look a port up before anything else is done.

    Raises:
        PortError: it is not there.
        EnrollmentRefusedError: a private key would have to go over the network.
    """
    name = choose(text)
    if not name.is_local and key_mode is KeyMode.STATION:
        raise EnrollmentRefusedError(
            f"could not enrol a device over {escaped(text)}: a private key goes over no network port",
            hint="use --keys on-device, or a local serial port",
        )
    if name.find() is None:
        raise PortError(f"could not open the port {escaped(text)}: there is none", hint=name.others_hint())
    return name
