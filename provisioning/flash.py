"""`birthmark flash`: give the device on a port its identity, or finish what an earlier run began.

Rules:

- One line a step with its measured time, the same on a terminal and off it; one JSON object each with `--json`.
- The last line says PASS with the certificate's serial number and lifetime, or FAIL; an error follows on stderr.
- Running the same command again is always right: it resumes where the last run stopped, or says why it may not.
- Every refusal is in the audit log; the row of the unit stays where it is.
- Ctrl-C leaves word in the audit log and prints the command that resumes.
"""

from __future__ import annotations

import secrets
import shlex
import time
from typing import TYPE_CHECKING, Any, Final

from birthmark.device.console import INTERRUPTED, command
from birthmark.device.errors import BirthmarkError, ConfigurationError, EnrollmentRefusedError, PortError
from birthmark.device.escape import escaped
from birthmark.device.identity import DeviceId, Role, device_role
from birthmark.device.link.timers import DEFAULT_BAUD, REPLUG_S
from birthmark.provisioning.enrol import Reached, Step, Stored
from birthmark.provisioning.journal import Wish
from birthmark.provisioning.options import add_passphrase_option, add_station_option, open_station
from birthmark.provisioning.port import PortName
from birthmark.provisioning.registry.model import KeyMode, State
from birthmark.provisioning.revocation import sign_and_store_crl
from birthmark.provisioning.session import Replugged, Session, Unplugged
from birthmark.provisioning.settings import BrokerDefaults
from birthmark.provisioning.transitions import BrokerAddress, Transitions

if TYPE_CHECKING:
    import argparse

    from birthmark.device.console import Console, Parser
    from birthmark.provisioning.registry.model import Row
    from birthmark.provisioning.session import Event
    from birthmark.provisioning.station import Station

_EXAMPLES: Final = """
birthmark flash --port /dev/ttyUSB0 --id sensor-17
birthmark flash --port /dev/ttyUSB0 --id meter-4 --role meter --broker gateway-1.example.com:8883
birthmark flash --port /dev/pts/5 --id sensor-18 --keys station --json
"""

_DONE: Final = {
    Step.HELLO: "device found",
    Step.UNLOCK: "unlocked for its new identity",
    Step.KEYGEN: "key verified",
    Step.BEGIN: "transfer opened",
    Step.DATA: "certificate and settings transferred",
    Step.PREPARE: "stored on the device, key proven",
    Step.COMMIT: "locked",
    Step.ATTEST: "identity proven",
}


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add `flash` to the commands of `birthmark`."""
    parser = command(commands, "flash", _flash, "give the device on a serial port its identity", _EXAMPLES)
    parser.add_argument("--port", required=True, help="the serial port, pty or pyserial URL that the device is on")
    parser.add_argument("--id", required=True, help="the device id: the certificate's CN and the MQTT client id")
    parser.add_argument("--role", help="the role that its certificate says (default: the station's)")
    parser.add_argument(
        "--keys",
        choices=[mode.value for mode in KeyMode],
        help="who makes the key pair (default: on-device, or as an interrupted run began)",
    )
    parser.add_argument(
        "--broker", metavar="HOST:PORT", help="where the device finds its broker (default: the station's settings)"
    )
    parser.add_argument(
        "--baud", type=int, default=DEFAULT_BAUD, metavar="N", help="the port's speed (default: %(default)s)"
    )
    add_station_option(parser)
    add_passphrase_option(parser)


def _flash(arguments: argparse.Namespace, console: Console) -> int:
    wish = Wish(
        DeviceId(arguments.id),
        device_role(arguments.role) if arguments.role is not None else None,
        KeyMode(arguments.keys) if arguments.keys is not None else None,
    )
    station = open_station(arguments)
    try:
        broker = _broker(arguments.broker, station.settings.broker)
        name = _port(arguments.port, wish)
        if arguments.broker is None and broker.host == BrokerDefaults().host:
            _warn_of_loopback(console, broker)
        _ = station.authority  # unlocked before the device is touched: nobody types a passphrase in between
        progress = Progress(console, wish.device_id.text)
        journal = Transitions(
            station.registry,
            lambda: station.authority,
            broker=broker,
            default_role=Role(station.settings.default_role),
            clock=station.clock,
            random_bytes=secrets.token_bytes,
        )
        session = Session(name, arguments.baud, journal, wish, progress.watch)
        return _run(session, journal, station, progress, _resume_command(arguments))
    finally:
        station.close()


def _run(session: Session, journal: Transitions, station: Station, progress: Progress, resume: str) -> int:
    try:
        row = session.run()
    except KeyboardInterrupt:
        if progress.row is not None and not progress.row.state.reached(State.ATTESTED):
            journal.interrupted(progress.row)
        progress.interrupted(resume)
        return INTERRUPTED
    except EnrollmentRefusedError as error:
        progress.failed(error)
        journal.refused(session.wish.device_id.text, error.message)
        raise
    except BirthmarkError as error:
        progress.failed(error)
        raise
    finally:
        if journal.revoked:
            sign_and_store_crl(station)
    progress.passed(row)
    return 0


class Progress:
    """What the operator sees of one enrollment."""

    def __init__(self, console: Console, device_id: str) -> None:
        self._console = console
        self._device_id = device_id
        self._begun_s = self._step_s = time.monotonic()
        self.row: Row | None = None
        """The last row that became durable."""

    def watch(self, event: Event) -> None:
        """Show one step, or remember one state."""
        match event:
            case Reached(step, hello):
                text = _DONE[step]
                facts: dict[str, Any] = {"hwid": hello.hwid.hex()}
                if step is Step.HELLO:
                    facts |= {"model": hello.model, "firmware": hello.firmware}
                    text += f": {escaped(hello.model)} {escaped(hello.firmware)}, hardware id {hello.hwid.hex()}"
                self._step(step.value, text, facts)
            case Stored(row):
                self.row = row
                if self._console.as_json:
                    self._console.emit({"event": "state", "id": row.name, "state": row.state.value}, "")
            case Unplugged(error):
                cause = {"cause": error.message}
                self._step("unplugged", f"{error.message}; waiting up to {REPLUG_S:.0f} s for the port", cause)
            case Replugged():
                self._step("replugged", "the port is back: starting again from the journal", {})

    def passed(self, row: Row) -> None:
        """Say that the unit is made."""
        if row.not_before is None or row.not_after is None:
            raise ValueError(f"row {row.number} is attested without a certificate")
        days = (row.not_after - row.not_before).days + 1
        record = {
            "event": "result",
            "result": "PASS",
            "id": row.name,
            "role": row.role,
            "hwid": row.hwid.hex() if row.hwid else "",
            "key_mode": row.key_mode.value if row.key_mode else "",
            "cert_serial": f"{row.cert_serial:x}",
            "not_before": row.not_before.isoformat(),
            "not_after": row.not_after.isoformat(),
            "elapsed_ms": _ms(self._begun_s),
        }
        self._console.emit(
            record,
            f"{self._console.paint('PASS', 'green')} {row.name}  certificate {row.cert_serial:x}, "
            f"valid until {row.not_after:%Y-%m-%d} ({days} days)  {_ms(self._begun_s) / 1000:.2f} s",
        )

    def failed(self, error: BirthmarkError) -> None:
        """Say that the unit is not made; the error itself follows."""
        state = self.row.state.value if self.row else "nothing reserved"
        record = {
            "event": "result",
            "result": "FAIL",
            "id": self._device_id,
            "state": self.row.state.value if self.row else None,
            "error": error.message,
            "exit_code": error.exit_code,
            "elapsed_ms": _ms(self._begun_s),
        }
        text = f"{self._console.paint('FAIL', 'red')} {self._device_id}  ({state})"
        self._console.emit(record, f"{text}  {_ms(self._begun_s) / 1000:.2f} s")

    def interrupted(self, resume: str) -> None:
        """Say how to go on."""
        state = self.row.state.value if self.row else None
        record = {"event": "interrupted", "id": self._device_id, "state": state, "resume": resume}
        self._console.emit(record, f"interrupted; nothing is lost. To go on: {resume}")

    def _step(self, name: str, text: str, facts: dict[str, Any]) -> None:
        elapsed_ms = _ms(self._step_s)
        self._step_s = time.monotonic()
        record = {"event": "step", "step": name, "id": self._device_id, "elapsed_ms": elapsed_ms} | facts
        self._console.emit(record, f"  {name:<9} {elapsed_ms:8.1f} ms  {text}")


def _ms(since_s: float) -> float:
    return round((time.monotonic() - since_s) * 1000, 1)


def _port(text: str, wish: Wish) -> PortName:
    name = PortName.of(text)
    if not name.is_local and wish.key_mode is KeyMode.STATION:
        raise EnrollmentRefusedError(
            f"could not enrol {wish.device_id} over {escaped(text)}: a private key goes over no network port",
            hint="use --keys on-device, or a local serial port",
        )
    if name.find() is None:
        raise PortError(f"could not open the port {escaped(text)}: there is none", hint=name.others_hint())
    return name


def _broker(text: str | None, default: BrokerDefaults) -> BrokerAddress:
    if text is None:
        return BrokerAddress(default.host, default.port, default.keepalive_s)
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or len(port) > 5:
        raise ConfigurationError(
            f"could not use {escaped(text)!r} as a broker's address: it is not HOST:PORT",
            hint="for example: --broker gateway-1.example.com:8883, or --broker [fd00::1]:8883",
        )
    checked = BrokerDefaults(host.removeprefix("[").removesuffix("]"), int(port), default.keepalive_s)
    return BrokerAddress(checked.host, checked.port, checked.keepalive_s)


def _warn_of_loopback(console: Console, broker: BrokerAddress) -> None:
    text = (
        f"the device will look for its broker at {broker.host}:{broker.port}, on itself: nobody said where it is;"
        " give --broker HOST:PORT, or set [broker] in station.toml"
    )
    if console.as_json:
        console.emit({"event": "warning", "text": text}, "")
    else:
        console.warn(text)


def _resume_command(arguments: argparse.Namespace) -> str:
    words = ["birthmark", "flash", "--port", arguments.port, "--id", arguments.id]
    for option in ("role", "keys", "broker", "station"):
        value = getattr(arguments, option)
        if value is not None:
            words += [f"--{option}", str(value)]
    if arguments.baud != DEFAULT_BAUD:
        words += ["--baud", str(arguments.baud)]
    return shlex.join(words)
