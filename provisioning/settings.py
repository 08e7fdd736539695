"""`station.toml`: what this station puts into certificates and bundles, and which gateways it feeds.

Rules:

- Unknown keys, wrong types and values out of range are refused with the file, the table and the key.
- A lifetime is judged where a certificate is about to be issued, and not before: whatever it says, a lost device
  can be revoked. `birthmark doctor` tells of one that is out of range.
- What commands change there: `settings_edit`.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Final

from birthmark.device.credentials import BrokerAddress
from birthmark.device.errors import BirthmarkError, ConfigurationError
from birthmark.device.escape import quoted
from birthmark.device.identity import BrokerName, device_role
from birthmark.device.renewal.messages import MAX_GRACE_DAYS
from birthmark.provisioning.gateway_settings import PORTS, Gateway, Upstream, check_routes
from birthmark.provisioning.settings_table import Table, toml_text

SETTINGS_FILE: Final = "station.toml"
MAX_ORGANIZATION_CHARACTERS: Final = 64
# A certificate begins 24 hours before it is issued, for boards whose clock is behind.
_DAYS: Final = range(2, 3651)
_KEPT_DAYS: Final = range(MAX_GRACE_DAYS + 1, 3651)
_KEEPALIVES_S: Final = range(1, 65536)
_LOG: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

TEMPLATE: Final = """\
# The station's settings. Commands read them when they start.

[station]
# The O in every subject. A change applies to certificates issued from then on.
organization = {organization}
# The role that `birthmark flash` gives a device unless --role says otherwise.
default_role = {default_role}

# Counted from a day before a certificate is issued, for boards whose clock is behind: 2 at least.
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

# Gateways that are sent every new CRL: `birthmark gateway add --help`; upstreams: `birthmark upstream add --help`.
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
    """How long certificates are valid, in days; any number, until one is issued."""

    device_days: int = 730
    service_days: int = 730
    broker_days: int = 365

    def of(self, kind: str) -> timedelta:
        """Return how long a new certificate is valid.

        Args:
            kind: whose: `device`, `service` or `broker`.

        Raises:
            ConfigurationError: no certificate can be issued for so long.
        """
        days = self._days()[kind]
        if days not in _DAYS:
            raise ConfigurationError(
                f"could not issue for a {kind}: {kind} = {days} of [lifetimes_days] is out of range",
                hint=f"from {_DAYS[0]} to {_DAYS[-1]} in {SETTINGS_FILE}; the first day is over when it is issued",
            )
        return timedelta(days=days)

    def out_of_range(self) -> dict[str, int]:
        """Return the lifetimes, by kind, that nothing can be issued for."""
        return {kind: days for kind, days in self._days().items() if days not in _DAYS}

    def _days(self) -> dict[str, int]:
        return {"device": self.device_days, "service": self.service_days, "broker": self.broker_days}


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
        if self.port not in PORTS:
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
    upstreams: tuple[Upstream, ...] = ()
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
        check_routes(self.gateways, self.upstreams)

    def upstream(self, name: str) -> Upstream:
        """Return the upstream of that name, without regard to case; there is one for every gateway's `via`."""
        return next(upstream for upstream in self.upstreams if upstream.name.lower() == name.lower())

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
        tables = [
            self.registry.to_toml(),
            self.token.to_toml(),
            *(each.to_toml() for each in self.upstreams),
            *(each.to_toml() for each in self.gateways),
        ]
        return head + "".join("\n" + table for table in tables if table)


def read_settings(path: Path) -> Settings:
    """Read `station.toml`.

    Raises:
        ConfigurationError: it is missing, unreadable, no TOML, or has a key or a value that cannot be used.
    """
    return parsed(path, settings_text(path))


def settings_text(path: Path) -> str:
    """Return what is in the file; errors as in `read_settings`."""
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


def parsed(path: Path, text: str) -> Settings:
    """Return the settings that a text says; errors, which name the file, as in `read_settings`."""
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # beside its own error: a number of 5,000 digits, a deep table
        raise ConfigurationError(f"could not read {path}: {error}", hint="it must be TOML") from error
    try:
        top = Table("", tables)
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
            upstreams=tuple(_upstream(table) for table in top.tables("upstream")),
            gateways=tuple(_gateway(table) for table in top.tables("gateway")),
        )
        for table in (station, lifetimes, broker, crl, renewal, registry, token, top):
            table.finish()
    except ConfigurationError as error:
        hint = error.hint or "put it right there, or bring the file back from a backup"
        raise ConfigurationError(f"could not read {path}: {error.message}", hint=hint) from error
    return settings


def _gateway(table: Table) -> Gateway:
    gateway = Gateway(
        name=table.text("name"),
        crl_path=table.path("crl_path"),
        host=table.text("host", ""),
        port=table.whole("port", 8883),
        operator_path=table.path("operator"),
        clients_ca_path=table.path("clients_ca_path"),
        via=table.text("via", ""),
    )
    table.finish()
    return gateway


def _upstream(table: Table) -> Upstream:
    upstream = Upstream(
        name=table.text("name"),
        servers=tuple(map(BrokerAddress.parse, table.texts("servers"))),
        operator_path=Path(table.text("operator")),
        ca_path=table.path("ca"),
    )
    table.finish()
    return upstream
