"""`station.toml`: what this station puts into certificates and bundles, and which gateways it feeds.

Rules: unknown keys, wrong types and values out of range are refused with the file, the table and the key. A change
by a command edits the text, so that a person's comments stay; two commands at once do it one after the other.
"""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from birthmark.device.credentials import BrokerAddress
from birthmark.device.durable import exclusive_lock, remove_leftovers, write_durably
from birthmark.device.errors import BirthmarkError, ConfigurationError
from birthmark.device.escape import escaped, quoted
from birthmark.device.identity import BrokerName, device_role
from birthmark.device.renewal.messages import MAX_GRACE_DAYS

if TYPE_CHECKING:
    from collections.abc import Callable

SETTINGS_FILE: Final = "station.toml"
MAX_ORGANIZATION_CHARACTERS: Final = 64
_DAYS: Final = range(1, 3651)
_KEPT_DAYS: Final = range(MAX_GRACE_DAYS + 1, 3651)
_PORTS: Final = range(1, 65536)
_KEEPALIVES_S: Final = range(1, 65536)
_GATEWAY: Final = re.compile(r"(?m)^[ \t]*\[\[[ \t]*gateway[ \t]*\]\]")
_REGISTRY: Final = re.compile(r"(?m)^[ \t]*\[[ \t]*registry[ \t]*\]")
_LOG: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TABLE: Final = re.compile(r"(?m)^[ \t]*\[")

TEMPLATE: Final = """\
# The station's settings. Commands read them when they start.

[station]
# The O in every subject. A change applies to certificates issued from then on.
organization = {organization}
# The role that `birthmark flash` gives a device unless --role says otherwise.
default_role = {default_role}

[lifetimes_days]
device = {device_days}
service = {service_days}
broker = {broker_days}

[broker]
# Where devices connect: goes into the bundle of every device that is flashed from then on.
host = {host}
port = {port}
keepalive_s = {keepalive_s}

[crl]
# How long after its end a revoked certificate stays on the CRL: longer than any gateway renews what has expired,
# which is 60 days at most.
keep_expired_days = {keep_expired_days}

[renewal]
# How long after its end a certificate may still be renewed, where a gateway has a renewal listener.
grace_days = {renewal_grace_days}
# How long the certificate that a renewal has replaced stays valid before it is revoked.
retire_after_hours = {retire_after_hours}
# How many renewals one device may begin within 24 hours.
max_per_day = {renewals_per_day}

# Gateways that are sent every new CRL: `birthmark gateway add --help`.
"""
REGISTRY_TEMPLATE: Final = """\
[registry]
# Where the registry is. `birthmark registry migrate` moves it and changes this; a change by hand leaves it behind.
"""
_MODULE_LINES: Final = """\
[token]
# The PKCS#11 module that leads to the token with the issuing CA's key.
module = {module}
"""
_PIN_LINE: Final = """\
# The file with its PIN, mode 0400; without one it is asked for.
pin_file = {pin_file}
"""


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long certificates are valid, in days."""

    device_days: int = 730
    service_days: int = 730
    broker_days: int = 365

    def __post_init__(self) -> None:
        if not all(days in _DAYS for days in (self.device_days, self.service_days, self.broker_days)):
            raise ConfigurationError(
                "could not use the lifetimes: one is out of range", hint="from 1 to 3650 days each"
            )


@dataclass(frozen=True, slots=True)
class BrokerDefaults:
    """Where a flashed device finds its broker."""

    host: str = "localhost"
    port: int = 8883
    keepalive_s: int = 60

    def __post_init__(self) -> None:
        try:
            BrokerName(self.host)
        except BirthmarkError as error:
            raise ConfigurationError(error.message, hint=error.hint) from error
        if self.port not in _PORTS:
            raise ConfigurationError(f"could not use the broker port {self.port}: it is not in 1 to 65535")
        if self.keepalive_s not in _KEEPALIVES_S:
            raise ConfigurationError(f"could not use the keepalive {self.keepalive_s} s: it is not in 1 to 65535")


@dataclass(frozen=True, slots=True)
class RenewalSettings:
    """How certificates are renewed over the network."""

    grace_days: int = 30
    """How long after its end a certificate may still be renewed."""
    retire_after_hours: int = 24
    """How long the certificate that a renewal has replaced stays valid before it is revoked."""
    max_per_day: int = 10
    """How many renewals one device may begin within 24 hours."""

    def __post_init__(self) -> None:
        for name, value, most in (
            ("grace_days", self.grace_days, MAX_GRACE_DAYS),
            ("retire_after_hours", self.retire_after_hours, 8760),
            ("max_per_day", self.max_per_day, 1000),
        ):
            if not (1 if name == "max_per_day" else 0) <= value <= most:
                raise ConfigurationError(
                    f"could not use {name} = {value} of [renewal]: it is out of range", hint=f"at most {most}"
                )


@dataclass(frozen=True, slots=True)
class RegistrySetting:
    """Where the registry is."""

    url: str = field(default="", repr=False)
    """Of a database, as SQLAlchemy writes it, perhaps with a password; empty for `registry.json` in the folder."""
    log: str = ""
    """The name of this station's audit log among those of the stations that share the database."""

    def __post_init__(self) -> None:
        if not self.url.isprintable():
            raise ConfigurationError("could not use the url of [registry]: it is not printable")
        if self.log and not _LOG.fullmatch(self.log):
            raise ConfigurationError(
                f"could not use {quoted(self.log, 80)} as the log of [registry]",
                hint="1 to 64 letters, digits, '.', '-' and '_', beginning with a letter or a digit",
            )

    def to_toml(self) -> str:
        """Return its table; empty for `registry.json`."""
        if not self.url:
            return ""
        log = f"log = {toml_text(self.log)}\n" if self.log else ""
        return f"{REGISTRY_TEMPLATE}url = {toml_text(self.url)}\n{log}"


@dataclass(frozen=True, slots=True)
class TokenSettings:
    """How this machine gets at PKCS#11 tokens.

    Raises:
        ConfigurationError: a path is not absolute, or cannot be shown.
    """

    module: Path | None = None
    """The PKCS#11 module, a shared library."""
    pin_path: Path | None = None
    """The file with the PIN."""

    def __post_init__(self) -> None:
        for name, path in (("module", self.module), ("pin_file", self.pin_path)):
            if path is not None and not (path.is_absolute() and str(path).isprintable()):
                raise ConfigurationError(
                    f"could not use {name} = {quoted(str(path))} of [token]: it is no absolute, printable path"
                )

    def to_toml(self) -> str:
        """Return its table; empty if nothing is set."""
        if self.module is None:
            return ""
        text = _MODULE_LINES.format(module=toml_text(str(self.module)))
        if self.pin_path is not None:
            text += _PIN_LINE.format(pin_file=toml_text(str(self.pin_path)))
        return text


@dataclass(frozen=True, slots=True)
class Gateway:
    """A gateway that takes CRLs: either from a file, or over MQTT.

    Raises:
        ConfigurationError: it has neither a path nor an address, or both.
    """

    name: str
    crl_path: Path | None = None
    host: str = ""
    port: int = 8883
    operator_path: Path | None = None
    """Key, certificate and chain of the operator that talks to it."""
    clients_ca_path: Path | None = None
    """Where it takes its issuing CAs from, if the station is to write that file too."""

    def __post_init__(self) -> None:
        try:
            BrokerName(self.name)
        except BirthmarkError as error:
            raise ConfigurationError(error.message, hint=error.hint) from error
        by_mqtt = bool(self.host) or self.operator_path is not None
        if (self.crl_path is None) != by_mqtt or (by_mqtt and not (self.host and self.operator_path)):
            raise ConfigurationError(
                f"could not use the gateway {self.name}: it needs either a path or a broker with an operator",
                hint="give --path FILE, or --host HOST with --operator FILE",
            )
        if by_mqtt and self.clients_ca_path is not None:
            raise ConfigurationError(
                f"could not use the gateway {self.name}: its issuing CAs cannot be brought over MQTT",
                hint="give --clients-ca together with --path only",
            )
        if self.port not in _PORTS:
            raise ConfigurationError(
                f"could not use the port {self.port} of gateway {self.name}: not in 1 to 65535"
            )
        if by_mqtt:
            BrokerAddress(self.host, self.port)
        for path in filter(None, (self.crl_path, self.operator_path, self.clients_ca_path)):
            # It is shown to people, and goes into the file: no control characters, no octets outside UTF-8.
            if not str(path).isprintable():
                raise ConfigurationError(
                    f"could not use the path {quoted(str(path))} of gateway {self.name}: it is not printable"
                )

    @property
    def reached_by(self) -> str:
        """How a CRL gets there, for people."""
        return str(self.crl_path) if self.crl_path else f"mqtts://{self.host}:{self.port}"

    def to_toml(self) -> str:
        """Return its table."""
        lines = ["[[gateway]]", f"name = {toml_text(self.name)}"]
        if self.crl_path is not None:
            lines.append(f"crl_path = {toml_text(str(self.crl_path))}")
            if self.clients_ca_path is not None:
                lines.append(f"clients_ca_path = {toml_text(str(self.clients_ca_path))}")
        else:
            lines += [
                f"host = {toml_text(self.host)}",
                f"port = {self.port}",
                f"operator = {toml_text(str(self.operator_path))}",
            ]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything in `station.toml`."""

    organization: str
    default_role: str = "sensor"
    lifetimes: Lifetimes = field(default_factory=Lifetimes)
    broker: BrokerDefaults = field(default_factory=BrokerDefaults)
    keep_expired_days: int = 90
    """How long after its end a revoked certificate stays on the CRL."""
    renewal: RenewalSettings = field(default_factory=RenewalSettings)
    registry: RegistrySetting = field(default_factory=RegistrySetting)
    token: TokenSettings = field(default_factory=TokenSettings)
    gateways: tuple[Gateway, ...] = ()

    def __post_init__(self) -> None:
        organization = self.organization
        if not organization.strip() or not organization.isprintable():
            raise ConfigurationError(
                f"could not use {quoted(organization)} as the organization: it is empty or not printable"
            )
        if len(organization) > MAX_ORGANIZATION_CHARACTERS:  # RFC 5280 appendix A.1: ub-organization-name
            raise ConfigurationError("could not use the organization: it is longer than 64 characters")
        if self.keep_expired_days not in _KEPT_DAYS:
            raise ConfigurationError(
                f"could not use keep_expired_days: it is not in {_KEPT_DAYS[0]} to {_KEPT_DAYS[-1]}",
                hint=f"gateways may renew what has expired, and is not on the CRL, for {MAX_GRACE_DAYS} days",
            )
        try:
            device_role(self.default_role)
        except BirthmarkError as error:
            raise ConfigurationError(error.message, hint=error.hint) from error

    def to_toml(self) -> str:
        """Return a commented file with these settings."""
        head = TEMPLATE.format(
            organization=toml_text(self.organization),
            default_role=toml_text(self.default_role),
            device_days=self.lifetimes.device_days,
            service_days=self.lifetimes.service_days,
            broker_days=self.lifetimes.broker_days,
            host=toml_text(self.broker.host),
            port=self.broker.port,
            keepalive_s=self.broker.keepalive_s,
            keep_expired_days=self.keep_expired_days,
            renewal_grace_days=self.renewal.grace_days,
            retire_after_hours=self.renewal.retire_after_hours,
            renewals_per_day=self.renewal.max_per_day,
        )
        tables = [self.registry.to_toml(), self.token.to_toml(), *(each.to_toml() for each in self.gateways)]
        return head + "".join("\n" + table for table in tables if table)


def read_settings(path: Path) -> Settings:
    """Read `station.toml`.

    Raises:
        ConfigurationError: it is missing, unreadable, no TOML, or has a key or a value that cannot be used.
    """
    return _parsed(path, _text(path))


def add_gateway(path: Path, gateway: Gateway) -> None:
    """Add a gateway to `station.toml`, durably.

    Raises:
        ConfigurationError: the file cannot be used, or has a gateway of that name.
    """

    def added(text: str, settings: Settings) -> str:
        if any(other.name.lower() == gateway.name.lower() for other in settings.gateways):
            raise ConfigurationError(
                f"could not add the gateway {gateway.name}: there is one of that name",
                hint=f"remove it first: birthmark gateway remove {gateway.name}",
            )
        return text.rstrip("\n") + "\n\n" + gateway.to_toml()

    _edit(path, added)


def set_token(path: Path, token: TokenSettings) -> None:
    """Put module and PIN file of the tokens into `station.toml`, durably, if there are none yet.

    Raises:
        ConfigurationError: the file cannot be used, or has others.
    """

    def changed(text: str, settings: Settings) -> str:
        if settings.token == token:
            return text
        if settings.token != TokenSettings():
            raise ConfigurationError(
                f"could not put the PKCS#11 module {token.module} into {path}: [token] there has something else",
                hint="a station uses one module at a time: change it there, once no key needs the other",
            )
        gateway = _GATEWAY.search(text)
        at = gateway.start() if gateway else len(text)
        return f"{text[:at].rstrip()}\n\n{token.to_toml()}" + ("\n" + text[at:] if gateway else "")

    _edit(path, changed)


def remove_gateway(path: Path, name: str) -> None:
    """Remove a gateway from `station.toml`, durably.

    Raises:
        ConfigurationError: the file cannot be used, or has no gateway of that name.
    """

    def removed(text: str, settings: Settings) -> str:
        names = [gateway.name.lower() for gateway in settings.gateways]
        if name.lower() not in names:
            raise ConfigurationError(
                f"could not remove the gateway {escaped(name)}: there is none of that name",
                hint="list them with `birthmark gateway list`",
            )
        starts = [match.start() for match in _GATEWAY.finditer(text)]
        if len(starts) != len(names):
            raise ConfigurationError(
                f"could not remove the gateway {name} from {path}: not every one there begins with [[gateway]]",
                hint="take it out by hand",
            )
        start = starts[names.index(name.lower())]
        after = _TABLE.search(text, text.index("]]", start))
        end = after.start() if after else len(text)
        return text[:start].rstrip("\n") + "\n\n" * bool(after) + text[end:] + "\n" * (not after)

    _edit(path, removed)


def put_registry(path: Path, registry: RegistrySetting) -> None:
    """Say in `station.toml` where the registry is, durably.

    Raises:
        ConfigurationError: the file cannot be used; it is as it was.
    """

    def put(text: str, _settings: Settings) -> str:
        for match in reversed(list(_REGISTRY.finditer(text))):
            after = _TABLE.search(text, match.end())
            rest = text[after.start() :] if after else ""
            text = text[: match.start()].rstrip("\n") + "\n" + ("\n" + rest if rest else "")
        changed = "\n\n".join(filter(None, (text.rstrip("\n"), registry.to_toml().rstrip("\n")))) + "\n"
        if _parsed(path, changed).registry != registry:
            raise ConfigurationError(
                f"could not change [registry] in {path}: it is not written as this program writes it",
                hint="write it as a table [registry] with a key url",
            )
        return changed

    _edit(path, put)


def toml_text(text: str) -> str:
    """Return a TOML basic string."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _edit(path: Path, change: Callable[[str, Settings], str]) -> None:
    _text(path)  # says what is missing before a lock is made there
    with exclusive_lock(path.with_suffix(".lock")):
        remove_leftovers(path.parent, path.name)
        text = _text(path)
        changed = change(text, _parsed(path, text))
        _parsed(path, changed)
        write_durably(path, changed.encode())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"could not read {path}: it is not there",
            hint="make a station with `birthmark init`, or name its folder with --station",
        ) from error
    except OSError as error:
        raise ConfigurationError(
            f"could not read {path}: {error.strerror}", hint="run this as the station's user"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"could not read {path}: it is not UTF-8 text") from error


def _parsed(path: Path, text: str) -> Settings:
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"could not read {path}: {error}", hint="it must be TOML") from error
    try:
        top = _Table("", tables)
        station = top.table("station")
        lifetimes = top.table("lifetimes_days")
        broker = top.table("broker")
        crl = top.table("crl")
        renewal = top.table("renewal")
        registry = top.table("registry")
        token = top.table("token")
        settings = Settings(
            organization=station.text("organization"),
            default_role=station.text("default_role", "sensor"),
            lifetimes=Lifetimes(
                lifetimes.whole("device", 730), lifetimes.whole("service", 730), lifetimes.whole("broker", 365)
            ),
            broker=BrokerDefaults(
                broker.text("host", "localhost"), broker.whole("port", 8883), broker.whole("keepalive_s", 60)
            ),
            keep_expired_days=crl.whole("keep_expired_days", 90),
            renewal=RenewalSettings(
                renewal.whole("grace_days", 30),
                renewal.whole("retire_after_hours", 24),
                renewal.whole("max_per_day", 10),
            ),
            registry=RegistrySetting(registry.text("url", ""), registry.text("log", "")),
            token=TokenSettings(token.path("module"), token.path("pin_file")),
            gateways=tuple(_gateway(table) for table in top.tables("gateway")),
        )
        for table in (station, lifetimes, broker, crl, renewal, registry, token, top):
            table.finish()
    except ConfigurationError as error:
        raise ConfigurationError(f"could not read {path}: {error.message}", hint=error.hint) from error
    return settings


def _gateway(table: _Table) -> Gateway:
    crl_path, operator = table.text("crl_path", ""), table.text("operator", "")
    clients_ca_path = table.text("clients_ca_path", "")
    gateway = Gateway(
        name=table.text("name"),
        crl_path=Path(crl_path) if crl_path else None,
        host=table.text("host", ""),
        port=table.whole("port", 8883),
        operator_path=Path(operator) if operator else None,
        clients_ca_path=Path(clients_ca_path) if clients_ca_path else None,
    )
    table.finish()
    return gateway


class _Table:
    """Typed access to one TOML table; what nobody asked for is refused at the end."""

    def __init__(self, name: str, values: Any) -> None:
        self._name = name
        if not isinstance(values, dict):
            raise ConfigurationError(f"[{name}] is no table")
        self._values = dict(values)

    def table(self, key: str) -> _Table:
        return _Table(key, self._values.pop(key, {}))

    def tables(self, key: str) -> list[_Table]:
        values = self._values.pop(key, [])
        if not isinstance(values, list):
            raise ConfigurationError(f"{key!r} must be written as [[{key}]]")
        return [_Table(key, value) for value in values]

    def text(self, key: str, default: str | None = None) -> str:
        value = self._values.pop(key, default)
        if not isinstance(value, str):
            raise ConfigurationError(f"{self._where(key)} is {'missing' if value is None else 'no text'}")
        return value

    def path(self, key: str) -> Path | None:
        text = self.text(key, "")
        return Path(text) if text else None

    def whole(self, key: str, default: int) -> int:
        value = self._values.pop(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigurationError(f"{self._where(key)} is no whole number")
        return value

    def finish(self) -> None:
        if self._values:
            raise ConfigurationError(f"{self._where(next(iter(self._values)))} is unknown", hint="is it misspelt?")

    def _where(self, key: str) -> str:
        return f"key {quoted(key)}" + (f" in [{self._name}]" if self._name else "")
