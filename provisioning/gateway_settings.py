"""The gateways of a station, and the upstreams that it reaches some of them through, as `station.toml` names them.

A gateway is reached by a path, over MQTT at its own broker, or through an upstream: a broker or a cluster that it
keeps a link to (`[[upstream]]` in its broker.toml, with `fleet = true`). One connection to each server of an
upstream serves all the gateways behind it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from birthmark.device.credentials import BrokerAddress
from birthmark.device.errors import BirthmarkError, ConfigurationError
from birthmark.device.escape import quoted
from birthmark.device.identity import BrokerName
from birthmark.provisioning.settings_table import toml_text

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

PORTS: Final = range(1, 65536)
MAX_SERVERS: Final = 16
"""Of one upstream: the station holds a connection to each. Nobody has a cluster of so many nodes."""
_UPSTREAM: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class Gateway:
    """A gateway that takes CRLs: from a file, over MQTT, or through an upstream.

    Raises:
        ConfigurationError: it has none of a path, an address and an upstream, or several of them.
    """

    name: str
    crl_path: Path | None = None
    host: str = ""
    port: int = 8883
    operator_path: Path | None = None
    """Key, certificate and chain of the operator that talks to it."""
    clients_ca_path: Path | None = None
    """Where it takes its issuing CAs from, if the station is to write that file too."""
    via: str = ""
    """The name of the upstream that it is reached through."""

    def __post_init__(self) -> None:
        try:
            BrokerName(self.name)
        except BirthmarkError as error:
            raise ConfigurationError(error.message, hint=error.hint) from error
        by_mqtt = bool(self.host) or self.operator_path is not None
        if (self.crl_path is not None) + by_mqtt + bool(self.via) != 1 or (
            by_mqtt and not (self.host and self.operator_path)
        ):
            raise ConfigurationError(
                f"could not use the gateway {self.name}: it needs either a path or a broker with an operator, "
                "or an upstream",
                hint="give --path FILE, or --host HOST with --operator FILE, or --via UPSTREAM",
            )
        if self.crl_path is None and self.clients_ca_path is not None:
            raise ConfigurationError(
                f"could not use the gateway {self.name}: its issuing CAs cannot be brought over MQTT",
                hint="give --clients-ca together with --path only",
            )
        whose = f"of gateway {self.name}"
        if by_mqtt:
            _check_address(self.host, self.port, whose)
        _check_paths((self.crl_path, self.operator_path, self.clients_ca_path), whose)

    @property
    def reached_by(self) -> str:
        """How a CRL gets there, for people."""
        if self.via:
            return f"via {self.via}"
        return str(self.crl_path) if self.crl_path else f"mqtts://{self.host}:{self.port}"

    def to_toml(self) -> str:
        """Return its table."""
        lines = ["[[gateway]]", f"name = {toml_text(self.name)}"]
        if self.via:
            lines.append(f"via = {toml_text(self.via)}")
        elif self.crl_path is not None:
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
class Upstream:
    """A broker or a cluster that gateways are reached through.

    Raises:
        ConfigurationError: its name or a path cannot be used, or it has no server, the same twice, or too many.
    """

    name: str
    servers: tuple[BrokerAddress, ...]
    """All that keep something: what one node of a cluster retains, the others need not have."""
    operator_path: Path
    """Key, certificate and chain of whom the station is there."""
    ca_path: Path | None = None
    """The CAs that its certificate may lead to; None for the station's own roots."""

    def __post_init__(self) -> None:
        if not _UPSTREAM.fullmatch(self.name):
            raise ConfigurationError(
                f"could not use {quoted(self.name, 80)} as the name of an upstream",
                hint="1 to 63 letters, digits and hyphens, beginning and ending with a letter or a digit",
            )
        if not 1 <= len(set(self.servers)) == len(self.servers) <= MAX_SERVERS:
            raise ConfigurationError(
                f"could not use the upstream {self.name}: it needs 1 to {MAX_SERVERS} servers, each once",
                hint="name every node that gateways connect to: --host HOST[:PORT], once for each",
            )
        _check_paths((self.operator_path, self.ca_path), f"of upstream {self.name}")

    @property
    def reached_by(self) -> str:
        """Where it is, for people."""
        return " ".join(f"mqtts://{server}" for server in self.servers)

    def to_toml(self) -> str:
        """Return its table."""
        lines = [
            "[[upstream]]",
            f"name = {toml_text(self.name)}",
            f"servers = [{', '.join(toml_text(str(server)) for server in self.servers)}]",
            f"operator = {toml_text(str(self.operator_path))}",
        ]
        if self.ca_path is not None:
            lines.append(f"ca = {toml_text(str(self.ca_path))}")
        return "\n".join(lines) + "\n"


def check_routes(gateways: tuple[Gateway, ...], upstreams: tuple[Upstream, ...]) -> None:
    """Refuse (`ConfigurationError`) two gateways or upstreams of one name, and an upstream that there is not.

    What is known of a gateway goes by its name: of two, one would count as reached when the other is.
    """
    names = _distinct("upstream", upstreams)
    _distinct("gateway", gateways)
    for gateway in gateways:
        if gateway.via and gateway.via.lower() not in names:
            raise ConfigurationError(
                f"could not use the gateway {gateway.name}: there is no upstream {quoted(gateway.via, 80)}",
                hint="name it first: birthmark upstream add NAME --host HOST --operator FILE",
            )


def _distinct(kind: str, named: Iterable[Gateway | Upstream]) -> set[str]:
    names: set[str] = set()
    for each in named:
        if each.name.lower() in names:
            raise ConfigurationError(
                f"could not use the {kind} {each.name}: there are two of that name",
                hint=f"give each [[{kind}]] a name of its own, without regard to case",
            )
        names.add(each.name.lower())
    return names


def _check_address(host: str, port: int, whose: str) -> None:
    if port not in PORTS:
        raise ConfigurationError(f"could not use the port {port} {whose}: not in 1 to 65535")
    BrokerAddress(host, port)


def _check_paths(paths: tuple[Path | None, ...], whose: str) -> None:
    for path in filter(None, paths):
        # It is shown to people, and goes into the file: no control characters, no octets outside UTF-8.
        if not str(path).isprintable():
            raise ConfigurationError(f"could not use the path {quoted(str(path))} {whose}: it is not printable")
