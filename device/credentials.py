"""What a device or a service proves itself with, and where it connects to.

On a device: one PEM file of mode 0600 in the state folder, written by the enrollment agent: the private key
(PKCS#8), the leaf, the issuing certificates, and the bundle in a block of its own. `ssl` reads key and chain from
it as it is, so the key is never copied. A renewal writes `renewed` beside `active`, with the same transaction; the
client prefers it. One of another transaction is left over from before an enrollment anew, and counts no more.

For a service: a PEM file with key, leaf and chain, and the CA's file, as `birthmark issue-operator` writes them.

Nothing here imports `cryptography`: a small board goes from start to a connection without loading it.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from birthmark.device.certificate_facts import CertificateFacts, certificate_facts
from birthmark.device.errors import BirthmarkError, ConfigurationError, CredentialError
from birthmark.device.escape import quoted
from birthmark.device.frozen import Frozen
from birthmark.device.identity import DeviceId, Role
from birthmark.device.pem import BUNDLE, CERTIFICATE, TRANSACTION, read_blocks

ACTIVE = "active"
RENEWED = "renewed"
DEFAULT_KEEPALIVE_S = 60
DEFAULT_PORT = 8883

_MAX_FILE_BYTES = 256 * 1024
"""A slot holds at most seven certificates of 2 KiB, a key and a bundle of 16 KiB."""


class BrokerAddress(Frozen):
    """Where a broker listens.

    Raises:
        ConfigurationError: the host is empty or the port is none.
    """

    host: str
    port: int = DEFAULT_PORT

    def __post_init__(self) -> None:
        if not self.host or not self.host.isascii() or not self.host.isprintable() or " " in self.host:
            raise ConfigurationError(f"could not use {quoted(self.host)} as a broker's host: it is no host name")
        if not 1 <= self.port <= 65535:
            raise ConfigurationError(f"could not use {self.port} as a broker's port: it is not from 1 to 65535")

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str, default_port: int = DEFAULT_PORT) -> BrokerAddress:
        """Read `HOST`, `HOST:PORT`, `[IPV6]:PORT` or an IPv6 address alone.

        Args:
            text: one of these.
            default_port: where it says no port.

        Raises:
            ConfigurationError: it is none of these.
        """
        host, port = text, str(default_port)
        if text.startswith("["):
            host, bracket, rest = text[1:].partition("]")
            if not bracket or (rest and not rest.startswith(":")):
                raise ConfigurationError(
                    f"could not use {quoted(text)} as a broker's address: the bracket has no partner",
                    hint="write HOST:PORT, or [ADDRESS]:PORT for IPv6",
                )
            port = rest[1:] or port
        elif text.count(":") == 1:
            host, port = text.split(":")
        if not port.isascii() or not port.isdecimal() or len(port) > 5:
            raise ConfigurationError(
                f"could not use {quoted(text)} as a broker's address: {quoted(port)} is no port",
                hint="write HOST:PORT, for example gateway-1.example.com:8883",
            )
        return cls(host, int(port))


class Credentials(Frozen):
    """An identity and the broker it belongs to."""

    device_id: DeviceId
    role: Role
    broker: BrokerAddress
    keepalive_s: int
    pem_path: Path
    """Key, leaf and chain, for `ssl.SSLContext.load_cert_chain`."""
    leaf_der: bytes
    issuing_der: tuple[bytes, ...]
    """What is presented after the leaf."""
    anchors_der: tuple[bytes, ...]
    """The only certificates that the broker's may lead to."""
    issued_at: datetime | None
    """When the bundle was made: no clock on the device can rightly say less. None for a service."""

    @property
    def is_slot(self) -> bool:
        """Whether they are those of an enrolled device, in its state folder."""
        return self.issued_at is not None and self.pem_path.name in (ACTIVE, RENEWED)

    @property
    def facts(self) -> CertificateFacts:
        """The names and the validity in the leaf."""
        return certificate_facts(self.leaf_der)

    @classmethod
    def from_folder(cls, state_dir: Path | str, *, broker: BrokerAddress | None = None) -> Credentials:
        """Read the credentials of an enrolled device: `renewed` if it belongs to `active`, else `active`.

        Args:
            state_dir: the agent's state folder.
            broker: connect there instead of where the bundle says.

        Raises:
            CredentialError: there are none, others may read the key, or the slot is damaged.
        """
        folder = Path(state_dir)
        active, renewed = folder / ACTIVE, folder / RENEWED
        if not active.exists():
            raise CredentialError(
                f"could not find credentials in {folder}: there is no `{ACTIVE}` slot",
                hint="enrol the board first (`birthmark flash`), or give its state folder with --state",
            )
        if not renewed.exists() or _transactions_of(renewed) not in ([], _transactions_of(active)):
            return cls.from_slot(active, broker=broker)
        return cls.from_slot(renewed, broker=broker)

    @classmethod
    def from_slot(cls, path: Path, *, broker: BrokerAddress | None = None) -> Credentials:
        """Read the credentials in one slot; arguments and errors as for `from_folder`."""
        return _from_slot(path, broker)

    @classmethod
    def from_files(
        cls,
        identity_path: Path | str,
        anchors_path: Path | str,
        broker: BrokerAddress,
        *,
        keepalive_s: int = DEFAULT_KEEPALIVE_S,
    ) -> Credentials:
        """Read the credentials of a service (or of an exported device) from PEM files.

        Args:
            identity_path: key, leaf and issuing certificates, in any order but the leaf before its issuers.
            anchors_path: the CA certificates that the broker's may lead to.
            broker: where to connect.
            keepalive_s: the longest silence, 1 to 65535 seconds.

        Raises:
            CredentialError: a file is missing or damaged, or others may read the key.
        """
        path = Path(identity_path)
        blocks = _read_private(path)
        certificates = _certificates_of(path, blocks)
        anchors = tuple(der for label, der in _parse(Path(anchors_path)) if label == CERTIFICATE)
        if not anchors:
            raise CredentialError(
                f"could not read {anchors_path}: it holds no certificate",
                hint="give the CA's file, such as ca.pem",
            )
        facts = certificate_facts(certificates[0])
        if len(facts.common_names) != 1 or len(facts.organizational_units) != 1:
            raise CredentialError(
                f"could not use the certificate in {path}: it does not name one identity and one role",
                hint="issue one with `birthmark issue-operator NAME`",
            )
        return cls(
            device_id=DeviceId(facts.common_names[0]),
            role=Role(facts.organizational_units[0]),
            broker=broker,
            keepalive_s=keepalive_s,
            pem_path=path,
            leaf_der=certificates[0],
            issuing_der=certificates[1:],
            anchors_der=anchors,
            issued_at=None,
        )


def _from_slot(path: Path, broker: BrokerAddress | None) -> Credentials:
    blocks = _read_private(path)
    certificates = _certificates_of(path, blocks)
    bundles = [der for label, der in blocks if label == BUNDLE]
    if len(bundles) != 1:
        raise _damaged(path, f"it holds {len(bundles)} bundles where one belongs")
    # Imported here: a service has files, and no bundle.
    from birthmark.device.link.bundle import Bundle  # noqa: PLC0415

    try:
        bundle = Bundle.from_bytes(bundles[0])
        config = bundle.config
        if (bundle.leaf_der, *bundle.issuing_der) != certificates:
            raise _damaged(path, "its certificates are not those of its bundle")
        return Credentials(
            device_id=DeviceId(str(config.device_id)),
            role=Role(str(config.role)),
            broker=broker or BrokerAddress(config.host, config.port),
            keepalive_s=config.keepalive_s or DEFAULT_KEEPALIVE_S,
            pem_path=path,
            leaf_der=bundle.leaf_der,
            issuing_der=tuple(bundle.issuing_der),
            anchors_der=tuple(bundle.anchors_der),
            issued_at=datetime.fromtimestamp(bundle.issued_at, UTC),
        )
    except CredentialError:
        raise
    except BirthmarkError as error:
        raise _damaged(path, error.message) from error


def _transactions_of(path: Path) -> list[bytes]:
    """Return the transactions that a slot names: one, unless it is damaged."""
    return [content for label, content in _parse(path, private=True) if label == TRANSACTION]


def _read_private(path: Path) -> list[tuple[str, bytes]]:
    """Read a file with a key in it, if nobody else can."""
    blocks = _parse(path, private=True)
    keys = [label for label, _ in blocks if label.endswith("PRIVATE KEY")]
    if len(keys) != 1:
        raise _damaged(path, f"it holds {len(keys)} private keys where one belongs")
    if keys == ["ENCRYPTED PRIVATE KEY"]:
        raise CredentialError(
            f"could not use the key in {path}: it is encrypted, and a device has nobody to type a passphrase",
            hint=f"decrypt it (`openssl pkey -in {path}`) into a file of mode 0600",
        )
    return blocks


def _certificates_of(path: Path, blocks: list[tuple[str, bytes]]) -> tuple[bytes, ...]:
    certificates = tuple(der for label, der in blocks if label == CERTIFICATE)
    if not certificates:
        raise _damaged(path, "it holds no certificate")
    return certificates


def _parse(path: Path, *, private: bool = False) -> list[tuple[str, bytes]]:
    try:
        with path.open("rb") as file:
            if private and _others_may_read(file.fileno()):
                raise CredentialError(
                    f"could not use the key in {path}: others than its owner may read it", hint=f"chmod 600 {path}"
                )
            text = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise CredentialError(
            f"could not read {path}: {error.strerror}", hint="check the path, and that this user may read it"
        ) from error
    if len(text) > _MAX_FILE_BYTES:
        raise _damaged(path, "it is too long to be one")
    try:
        return read_blocks(text)
    except BirthmarkError as error:
        raise _damaged(path, error.message) from error


def _others_may_read(descriptor: int) -> bool:
    return bool(os.fstat(descriptor).st_mode & 0o077)


def _damaged(path: Path, cause: str) -> CredentialError:
    if path.name == RENEWED:
        hint = f"remove {path} to go back to the credentials from enrollment"
    elif path.name == ACTIVE:
        hint = "the slot is damaged: the board must be enrolled again (`birthmark flash`)"
    else:
        hint = "write the file again, whole"
    return CredentialError(f"could not use the credentials in {path}: {cause}", hint=hint)
