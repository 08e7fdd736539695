"""`device.toml` in a device's state folder: what its owner decides about it, beside what it was enrolled with.

    clock = "trust-broker"               # ask the gateway for the time, and go by it if it is later

    [broker]
    further_addresses = ["gateway-2.example.com:8883"]   # tried in this order when the enrolled one fails
    return_after_s = 600                                 # how soon the enrolled one is looked for again
    keepalive_s = [15, 300]                              # shortest and longest; by default a quarter of what was
                                                         # enrolled, and that
    max_packet_bytes = 1048576                           # what the gateway takes

    [outbox]                                             # this line alone turns it on
    max_messages = 100000
    max_bytes = 67108864
    when_full = "drop-oldest"            # "refuse-newest", "drop-lowest-priority"
    durability = "message"               # "batch:200ms"
    drain_per_s = 50
    message_id = "message_id"            # off if it is not there
    when_failing = "refuse"              # "memory"
    path = "/data/outbox.db"

    [outbox.priorities]
    "devices/+/telemetry/alarm/#" = 10

Every key may be left out, and so may the file. A key that is not known is an error: a slip of the pen must not
turn something off in silence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

from birthmark.device.credentials import BrokerAddress
from birthmark.device.errors import ConfigurationError
from birthmark.device.escape import escaped, quoted
from birthmark.device.frozen import Frozen
from birthmark.device.outbox.settings import MOST_PER_S, OutboxSettings

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FILE: Final = "device.toml"
RETURN_AFTER_S: Final = 600.0
LONGEST_RETURN_AFTER_S: Final = 366 * 86_400
MAX_PACKET_BYTES: Final = 1024 * 1024
_MAX_FILE_BYTES: Final = 256 * 1024


class DeviceSettings(Frozen):
    """What `device.toml` says, or the defaults.

    Raises:
        ConfigurationError: a value that makes no sense, named.
    """

    further_addresses: tuple[BrokerAddress, ...] = ()
    return_after_s: float = RETURN_AFTER_S
    keepalive_s: tuple[int, int] | None = None
    """Shortest and longest; None: from a quarter of the enrolled one to that."""
    max_packet_bytes: int = MAX_PACKET_BYTES
    outbox: OutboxSettings | None = None
    trusts_gateway_clock: bool = False

    @classmethod
    def from_folder(cls, folder: Path) -> DeviceSettings:
        """Read the file in a state folder; the defaults if there is none.

        Raises:
            ConfigurationError: it cannot be read, or says what makes no sense.
        """
        path = folder / FILE
        try:
            with path.open("rb") as file:
                content = file.read(_MAX_FILE_BYTES + 1)
            text = content.decode()
        except FileNotFoundError:
            return cls()
        except (OSError, UnicodeError) as error:
            cause = getattr(error, "strerror", "") or "it is not UTF-8"
            raise ConfigurationError(f"could not read {path}: {cause}") from error
        if len(content) > _MAX_FILE_BYTES:  # what stands behind that must not be passed over in silence
            raise ConfigurationError(f"could not read {path}: it is longer than {_MAX_FILE_BYTES} bytes")
        import tomllib  # noqa: PLC0415 - most devices have no such file, and start without it

        try:
            values = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(f"could not read {path}: {escaped(str(error))}") from error
        try:
            return cls.from_values(values, folder)
        except ConfigurationError as error:
            raise ConfigurationError(f"could not use {path}: {error.message}", error.hint) from error

    @classmethod
    def from_values(cls, values: Mapping[str, Any], folder: Path) -> DeviceSettings:
        """Return what the file's tables say; a relative `path` is in `folder`.

        Raises:
            ConfigurationError: they say what makes no sense.
        """
        tables = _Table("", dict(values))
        broker, outbox = tables.table("broker"), tables.table("outbox")
        clock = tables.take("clock", str, "system")
        tables.end()
        addresses = broker.take("further_addresses", list, [])
        keepalive_s = broker.take("keepalive_s", list, None)
        settings = cls(
            further_addresses=tuple(BrokerAddress.parse(str(address)) for address in addresses),
            return_after_s=broker.number("return_after_s", RETURN_AFTER_S, least=1, most=LONGEST_RETURN_AFTER_S),
            keepalive_s=None if keepalive_s is None else _keepalive(keepalive_s),
            max_packet_bytes=broker.take("max_packet_bytes", int, MAX_PACKET_BYTES),
            outbox=_outbox(outbox, folder) if "outbox" in values else None,
            trusts_gateway_clock=clock == "trust-broker",
        )
        broker.end()
        if clock not in ("system", "trust-broker"):
            raise ConfigurationError('clock is neither "system" nor "trust-broker"')
        if settings.max_packet_bytes < 1024:
            raise ConfigurationError("[broker] max_packet_bytes is below 1024")
        return settings


def _keepalive(values: list[Any]) -> tuple[int, int]:
    whole = [value for value in values if isinstance(value, int) and not isinstance(value, bool)]
    if len(values) != 2 or len(whole) != 2 or not 5 <= whole[0] <= whole[1] <= 65535:
        raise ConfigurationError(
            "[broker] keepalive_s is not the shortest and the longest in seconds, from 5 to 65535",
            hint="for example keepalive_s = [15, 300]",
        )
    return (whole[0], whole[1])


def _outbox(table: _Table, folder: Path) -> OutboxSettings:
    default = OutboxSettings()
    priorities = table.table("priorities")
    path = table.take("path", str, "")
    settings = OutboxSettings(
        path=folder / path if path else None,
        max_messages=table.take("max_messages", int, default.max_messages),
        max_bytes=table.take("max_bytes", int, default.max_bytes),
        when_full=table.take("when_full", str, default.when_full),
        durability=table.take("durability", str, default.durability),
        drain_per_s=table.number("drain_per_s", default.drain_per_s, least=0, most=MOST_PER_S),
        message_id=table.take("message_id", str, default.message_id),
        when_failing=table.take("when_failing", str, default.when_failing),
        priorities=tuple((name, priorities.take(name, int, 0)) for name in list(priorities.values)),
    )
    table.end()
    return settings


class _Table:
    """One table; what is taken is known, and what is left at the end is not."""

    def __init__(self, name: str, values: dict[str, Any]) -> None:
        self.name = name
        self.values = values
        self.taken: set[str] = set()

    def table(self, key: str) -> _Table:
        name = f"{self.name}.{key}" if self.name else key
        return _Table(name, cast("dict[str, Any]", self.take(key, dict, {})))

    def take(self, key: str, kind: type | tuple[type, ...], default: Any) -> Any:
        value = self.values.get(key, default)
        self.taken.add(key)
        wrong_boolean = isinstance(value, bool) and kind is not bool
        if value is not default and (wrong_boolean or not isinstance(value, kind)):
            raise ConfigurationError(f"{self._where}{escaped(key)} is of the wrong type: {quoted(str(value))}")
        return value

    def number(self, key: str, default: float, *, least: int, most: int) -> float:
        value = self.take(key, (int, float), default)
        if not least <= value <= most:
            raise ConfigurationError(f"{self._where}{escaped(key)} is not from {least} to {most}")
        return float(value)

    @property
    def _where(self) -> str:
        return f"[{self.name}] " if self.name else ""

    def end(self) -> None:
        unknown = sorted(set(self.values) - self.taken)
        if unknown:
            raise ConfigurationError(
                f"{self._where}{escaped(unknown[0])} is not known", hint="docs/device.md lists what there is"
            )
