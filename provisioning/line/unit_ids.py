"""Where the ids of new units come from: a list, a template, or a person with a scanner.

Rules:

- A unit that the journal knows already keeps its id, whatever the source would say.
- An id is given to one board only, also across slots; one that was given and not reserved is given again.
- An id that turns out to be taken, by another process on the same registry, is not offered again.
- Scanned ids are read at the board and read again before COMMIT: the label that will stay on it is the one that
  was meant.
"""

from __future__ import annotations

import csv
import re
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol

from birthmark.device.errors import BirthmarkError, ConfigurationError, EnrollmentRefusedError, UsageError
from birthmark.device.escape import escaped, quoted
from birthmark.device.identity import DeviceId, device_role
from birthmark.provisioning.enrollment.journal import Wish
from birthmark.provisioning.enrollment.session import StoppedError
from birthmark.provisioning.registry.model import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from birthmark.device.identity import Role
    from birthmark.provisioning.registry.interface import Registry
    from birthmark.provisioning.registry.model import KeyMode, Row

MAX_LISTED: Final = 100_000
MAX_FIELD_CHARACTERS: Final = 200
_LOOK_EVERY_S: Final = 0.1
_NUMBERED: Final = re.compile(r"([^{}]*)\{n(?::0?([0-9]{1,2}))?\}([^{}]*)")


class NoIdError(EnrollmentRefusedError):
    """There is no id for a new unit; nothing was reserved."""


class IdSource(Protocol):
    """Says what a unit is to be, once it is known which one it is. Called from several slots at once."""

    def wish(self, slot: str, hwid: bytes, row: Row | None) -> Wish:
        """Return what the unit on a slot is to be.

        Raises:
            NoIdError: there is none for it.
            StoppedError: a person stopped it.
        """

    def confirm(self, slot: str, hwid: bytes, row: Row) -> None:
        """Make sure before COMMIT that the unit is to be what its row says.

        Raises:
            EnrollmentRefusedError: it is not; the row stays in PREPARED.
        """

    def give_back(self, wish: Wish, *, taken: bool) -> None:
        """Take back an id under which nothing was reserved; with `taken`, it belongs to another unit."""


class Listed:
    """Ids from a list or a template, in their order.

    Args:
        wishes: what new units are to be; those whose id is live in the registry are left out.
        registry: where to look.
        key_mode: of new units.
    """

    def __init__(self, wishes: Iterable[Wish], registry: Registry, key_mode: KeyMode | None) -> None:
        with registry.view() as view:
            self._taken = view.names(live=True)
        self._wishes = iter(wishes)
        self._given_back: list[Wish] = []
        self._key_mode = key_mode
        self._lock = threading.Lock()

    def wish(self, slot: str, hwid: bytes, row: Row | None) -> Wish:  # noqa: ARG002 - a list asks nobody
        """Return the next id (`IdSource.wish`)."""
        if row is not None:
            return known(row)
        with self._lock:
            if self._given_back:
                return self._given_back.pop()
            for wish in self._wishes:
                if wish.device_id.folded not in self._taken:
                    self._taken.add(wish.device_id.folded)
                    return Wish(wish.device_id, wish.role, self._key_mode, label=wish.label)
        raise NoIdError(
            "could not choose an id for the device on this port: none is left", hint="nothing was reserved"
        )

    def confirm(self, slot: str, hwid: bytes, row: Row) -> None:
        """Nothing to confirm: nobody carried the id to the board."""

    def give_back(self, wish: Wish, *, taken: bool) -> None:
        """Offer the id again, unless it is taken (`IdSource.give_back`)."""
        with self._lock:
            if not taken:
                self._given_back.append(wish)


class Known:
    """No new units: only those that the journal has under way."""

    def wish(self, slot: str, hwid: bytes, row: Row | None) -> Wish:  # noqa: ARG002 - the row says it all
        """Return what the row says (`IdSource.wish`)."""
        if row is None:
            raise NoIdError(
                f"could not resume the device {hwid.hex()}: the journal has nothing under way for it",
                hint="`birthmark flash` begins; `birthmark resume` alone lists what is under way",
            )
        if row.state is State.ATTESTED:
            raise NoIdError(f"nothing to resume: {row.name} is {row.state}", hint="take the next device")
        return known(row)

    def confirm(self, slot: str, hwid: bytes, row: Row) -> None:
        """Nothing to confirm: the row was begun with this id."""

    def give_back(self, wish: Wish, *, taken: bool) -> None:
        """Nothing was given."""


class Scanned:
    """Ids that a person types or scans at the board, and again before COMMIT.

    Args:
        lines: returns the next line, None at the end of the input; raises StoppedError.
        ask: shows a person what is wanted: slot, `id` or `confirm`, and the words.
        registry: where ids that are taken stand.
        pattern: what an id must match as a whole, besides the grammar.
        role: of new units.
        key_mode: of new units.
        stopped: whether a person stopped the line.
    """

    def __init__(
        self,
        lines: Callable[[], str | None],
        ask: Callable[[str, str, str], None],
        registry: Registry,
        *,
        pattern: re.Pattern[str] | None,
        role: Role | None,
        key_mode: KeyMode | None,
        stopped: Callable[[], bool],
    ) -> None:
        self._lines = lines
        self._ask = ask
        self._registry = registry
        self._pattern = pattern
        self._role = role
        self._key_mode = key_mode
        self._stopped = stopped
        self._used: set[str] = set()
        self._scanner = threading.Lock()

    def wish(self, slot: str, hwid: bytes, row: Row | None) -> Wish:
        """Return the id that is scanned for the board (`IdSource.wish`)."""
        if row is not None:
            return known(row)
        with _turn(self._scanner, self._stopped):
            self._ask(slot, "id", f"scan the id of the board {hwid.hex()}")
            while True:
                text = self._line()
                cause = self._refusal(text)
                if not cause:
                    self._used.add(text.lower())
                    return Wish(DeviceId(text), self._role, self._key_mode)
                self._ask(slot, "id", f"not {escaped(text, 80)}: {cause}; scan another")

    def confirm(self, slot: str, hwid: bytes, row: Row) -> None:
        """Have the id scanned again (`IdSource.confirm`)."""
        with _turn(self._scanner, self._stopped):
            self._ask(slot, "confirm", f"scan {row.name} again, on the board {hwid.hex()}")
            text = self._line()
        if text.lower() != row.name_folded:
            raise EnrollmentRefusedError(
                f"could not lock the device as {row.name}: {escaped(text, 80)} was scanned at the board",
                hint="the device is not locked; see that the label is on the right board, then `birthmark resume`",
            )

    def give_back(self, wish: Wish, *, taken: bool) -> None:
        """Let the id be scanned again, unless it is taken (`IdSource.give_back`)."""
        if not taken:
            self._used.discard(wish.device_id.folded)

    def _line(self) -> str:
        line = self._lines()
        if line is None:
            raise NoIdError("could not read an id: the input has ended", hint="nothing was locked")
        return line.strip()

    def _refusal(self, text: str) -> str:
        try:
            device_id = DeviceId(text)
        except BirthmarkError:
            return "it is no device id"
        if self._pattern is not None and not self._pattern.fullmatch(text):
            return f"it does not match {self._pattern.pattern}"
        if device_id.folded in self._used:
            return "it was scanned before"
        with self._registry.view() as view:
            holder = view.live_by_name(text)
        return "" if holder is None else f"it belongs to {holder.kind} {holder.name} already"


def known(row: Row) -> Wish:
    """Return the wish that leaves a unit what its row says."""
    return Wish(DeviceId(row.name), None, row.key_mode)


def from_template(template: str, registry: Registry, role: Role | None, *, start: int = 1) -> Iterator[Wish]:
    """Yield ids such as `sensor-{n:05}`, from `start`, without those that ever were in the registry.

    Raises:
        UsageError: the template has not exactly one `{n}`, or makes no device id.
    """
    found = _NUMBERED.fullmatch(template)
    if found is None:
        raise UsageError(
            f"could not use the template {quoted(template, 80)}: it needs {{n}} once",
            hint="as in sensor-{n:05}",
        )
    before, width, after = found[1], int(found[2] or 0), found[3]
    with registry.view() as view:
        ever = view.names()

    def numbered() -> Iterator[Wish]:
        for number in range(start, start + 10**9):
            device_id = DeviceId(f"{before}{number:0{width}}{after}")
            if device_id.folded not in ever:
                yield Wish(device_id, role)

    DeviceId(f"{before}{start:0{width}}{after}")  # says at once what is wrong with it
    return numbered()


def read_list(path: Path, role: Role | None) -> list[Wish]:
    """Read a CSV file with a heading: `id`, perhaps `role`, and any other columns, which go on the label.

    Raises:
        ConfigurationError: it cannot be read, or a line of it cannot be used; the message says which.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _wishes(csv.DictReader(file, strict=True), role)
    except OSError as error:
        raise ConfigurationError(f"could not read the list {path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigurationError(
            f"could not read the list {path}: {escaped(str(error))}", hint="it must be CSV in UTF-8"
        ) from error
    except ConfigurationError as error:
        raise ConfigurationError(f"could not read the list {path}: {error.message}", hint=error.hint) from error


def _wishes(reader: csv.DictReader[str], role: Role | None) -> list[Wish]:
    names = reader.fieldnames or []
    if "id" not in names or len(set(names)) < len(names) or not all(_is_plain(name) for name in names):
        raise ConfigurationError(
            "its heading has no column `id`, or names that cannot be used",
            hint="the first line names the columns: id, perhaps role, and what goes on the label",
        )
    wishes: dict[str, Wish] = {}
    for fields in reader:
        where = f"line {reader.line_num}"
        if None in fields or None in fields.values():
            raise ConfigurationError(f"{where} has another number of columns than the heading")
        try:
            wish = Wish(
                DeviceId(fields.pop("id").strip()),
                device_role(text) if (text := fields.pop("role", "").strip()) else role,
                label="\n".join(f"{name}: {value.strip()}" for name, value in fields.items() if value.strip()),
            )
        except BirthmarkError as error:
            raise ConfigurationError(f"{where}: {error.message}", hint=error.hint) from error
        if not all(_is_plain(value) for value in fields.values()):
            raise ConfigurationError(f"{where} has a value that is not printable, or too long for a label")
        if wishes.setdefault(wish.device_id.folded, wish) is not wish:
            raise ConfigurationError(f"{where} repeats the id {wish.device_id}")
        if len(wishes) > MAX_LISTED:
            raise ConfigurationError(f"it has more than {MAX_LISTED} lines")
    return list(wishes.values())


def _is_plain(text: str) -> bool:
    return text.isprintable() and len(text) <= MAX_FIELD_CHARACTERS


@contextmanager
def _turn(scanner: threading.Lock, stopped: Callable[[], bool]) -> Iterator[None]:
    """Hold the scanner for the block; wait for it without missing that a person stops the line."""
    while not scanner.acquire(timeout=_LOOK_EVERY_S):
        if stopped():
            raise StoppedError
    try:
        yield
    finally:
        scanner.release()
