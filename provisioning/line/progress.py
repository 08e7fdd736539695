"""What the operator sees of one enrollment: a line a step with its measured time, then PASS or FAIL."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from birthmark.device.escape import escaped
from birthmark.device.link.timers import REPLUG_S
from birthmark.provisioning.enrollment.enrol import Reached, Step, Stored
from birthmark.provisioning.enrollment.outcomes import Attempt, Outcome, code_of, failed_step
from birthmark.provisioning.enrollment.session import Replugged, Unplugged

if TYPE_CHECKING:
    from birthmark.device.console import Console
    from birthmark.device.errors import BirthmarkError
    from birthmark.provisioning.enrollment.session import Event
    from birthmark.provisioning.registry.model import Row

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


class Progress:
    """What the operator sees of one enrollment."""

    def __init__(self, console: Console, device_id: str) -> None:
        self._console = console
        self.device_id = device_id
        self._begun_s = self._step_s = time.monotonic()
        self.row: Row | None = None
        """The last row that became durable."""
        self.reached: Step | None = None
        """The last step that was answered well."""
        self.hwid = b""

    def watch(self, event: Event) -> None:
        """Show one step, or remember one state."""
        match event:
            case Reached(step, hello):
                self.reached, self.hwid = step, hello.hwid
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
            "id": self.device_id,
            "state": self.row.state.value if self.row else None,
            "error": error.message,
            "exit_code": error.exit_code,
            "elapsed_ms": _ms(self._begun_s),
        }
        text = f"{self._console.paint('FAIL', 'red')} {self.device_id}  ({state})"
        self._console.emit(record, f"{text}  {_ms(self._begun_s) / 1000:.2f} s")

    def attempt(self, outcome: Outcome, error: BirthmarkError | None = None) -> Attempt:
        """Return what is counted of this attempt."""
        return Attempt(
            outcome,
            self.device_id,
            self.hwid,
            failed_step(error, self.reached) if error is not None else "",
            code_of(error) if error is not None else "",
            _ms(self._begun_s),
        )

    def interrupted(self, resume: str) -> None:
        """Say how to go on."""
        state = self.row.state.value if self.row else None
        record = {"event": "interrupted", "id": self.device_id, "state": state, "resume": resume}
        self._console.emit(record, f"interrupted; nothing is lost. To go on: {resume}")

    def _step(self, name: str, text: str, facts: dict[str, Any]) -> None:
        elapsed_ms = _ms(self._step_s)
        self._step_s = time.monotonic()
        record = {"event": "step", "step": name, "id": self.device_id, "elapsed_ms": elapsed_ms} | facts
        self._console.emit(record, f"  {name:<9} {elapsed_ms:8.1f} ms  {text}")


def _ms(since_s: float) -> float:
    return round((time.monotonic() - since_s) * 1000, 1)
