"""The bundle: what a device gets besides its key (docs/serial-protocol.md section 5).

Rules:

- Deterministic CBOR, at most 16384 bytes, with a closed schema.
- Reading one needs no cryptography: `Bundle` holds what the schema says. Whether its certificates fit each
  other and the key is `check_bundle`'s to say.
- The role is a copy for the device's own use; one that is reserved for services is refused.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, Self

from birthmark.device.errors import IdentityError, ProtocolError
from birthmark.device.frozen import Frozen
from birthmark.device.identity import DeviceId, Role
from birthmark.device.link import cbor
from birthmark.device.link.schema import Field, SchemaError, array_of, bstr, read_map, uint, write_map
from birthmark.device.link.vocabulary import ErrorCode

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    from birthmark.device.link.cbor import Value

MAX_BUNDLE_BYTES: Final = 16384
MAX_CERTIFICATE_BYTES: Final = 2048
MAX_ISSUING: Final = 3
MAX_ANCHORS: Final = 4
EARLIEST_ISSUE: Final = 1_577_836_800
"""2020-01-01, in unix seconds."""
LATEST_ISSUE: Final = 253_402_300_799
"""The end of the year 9999, in unix seconds."""

_HOST = re.compile(r"[A-Za-z0-9.:_-]{1,253}")


class BundleRefusedError(ProtocolError):
    """A bundle that breaks section 5, made here or by somebody else.

    Attributes:
        code: what a device answers: `KEY` for a certificate of another key, else `BUNDLE`.
        reason: what is wrong with it.
    """

    def __init__(self, code: ErrorCode, reason: str) -> None:
        super().__init__(f"could not use the bundle: {reason}")
        self.code = code
        self.reason = reason


def _text(value: Value) -> str:
    return "" if isinstance(value, str) else "not text"


def _map(value: Value) -> str:
    return "" if isinstance(value, dict) else "not a map"


_CERTIFICATE = bstr(1, MAX_CERTIFICATE_BYTES)
_BUNDLE_FIELDS = (
    Field(1, "leaf_der", _CERTIFICATE),
    Field(2, "issuing_der", array_of(0, MAX_ISSUING, _CERTIFICATE)),
    Field(3, "anchors_der", array_of(1, MAX_ANCHORS, _CERTIFICATE)),
    Field(4, "config", _map),
    Field(5, "issued_at", uint(EARLIEST_ISSUE, LATEST_ISSUE)),
)
_CONFIG_FIELDS = (
    Field(1, "host", _text),
    Field(2, "port", uint(1, 0xFFFF)),
    Field(3, "device_id", _text),
    Field(4, "role", _text),
    Field(5, "keepalive_s", uint(1, 0xFFFF), optional=True),
)


class BundleConfig(Frozen):
    """Who the device is, and where its broker is.

    Raises:
        BundleRefusedError: a value outside its limits, or a reserved role.
    """

    host: str
    port: int
    device_id: DeviceId
    role: Role
    keepalive_s: int | None = None

    def __post_init__(self) -> None:
        if not _HOST.fullmatch(self.host):
            raise BundleRefusedError(ErrorCode.BUNDLE, "the broker's host is outside its grammar")
        if self.role.is_reserved:
            raise BundleRefusedError(ErrorCode.BUNDLE, f"the role {self.role} is reserved for services")
        self.to_map()

    def to_map(self) -> dict[int, Value]:
        """Return the map that stands for it in a bundle."""
        attributes = {
            "host": self.host,
            "port": self.port,
            "device_id": self.device_id.text,
            "role": self.role.name,
            "keepalive_s": self.keepalive_s,
        }
        return _refusing(lambda: write_map(attributes, _CONFIG_FIELDS, what="a bundle's configuration"))

    @classmethod
    def from_map(cls, value: Value) -> Self:
        """Read the map that stands for it; raises `BundleRefusedError`."""
        attributes = _refusing(lambda: read_map(value, _CONFIG_FIELDS, what="a bundle's configuration"))
        try:
            attributes["device_id"] = DeviceId(attributes["device_id"])
            attributes["role"] = Role(attributes["role"])
        except IdentityError as error:
            raise BundleRefusedError(ErrorCode.BUNDLE, error.message) from None
        return cls(**attributes)


class Bundle(Frozen):
    """Certificates, trust anchors and configuration of one device.

    Raises:
        BundleRefusedError: a value outside its limits.
    """

    leaf_der: bytes
    issuing_der: tuple[bytes, ...]
    """What the device presents after its leaf, the leaf's issuer first."""
    anchors_der: tuple[bytes, ...]
    """What the device verifies its broker by."""
    config: BundleConfig
    issued_at: int
    """Unix seconds: a floor for a device without a clock."""

    def __post_init__(self) -> None:
        if len(self.to_bytes()) > MAX_BUNDLE_BYTES:
            raise BundleRefusedError(ErrorCode.BUNDLE, f"it is longer than {MAX_BUNDLE_BYTES} bytes")

    def to_bytes(self) -> bytes:
        """Return its one encoding."""
        attributes = {
            "leaf_der": self.leaf_der,
            "issuing_der": list(self.issuing_der),
            "anchors_der": list(self.anchors_der),
            "config": self.config.to_map(),
            "issued_at": self.issued_at,
        }
        return cbor.encode(_refusing(lambda: write_map(attributes, _BUNDLE_FIELDS, what="a bundle")))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read a bundle by its schema alone, without looking into its certificates.

        Raises:
            BundleRefusedError: the bytes break the schema.
        """
        if len(data) > MAX_BUNDLE_BYTES:
            raise BundleRefusedError(ErrorCode.BUNDLE, f"it is longer than {MAX_BUNDLE_BYTES} bytes")
        attributes = _refusing(lambda: read_map(cbor.decode(data), _BUNDLE_FIELDS, what="a bundle"))
        return cls(
            leaf_der=attributes["leaf_der"],
            issuing_der=tuple(attributes["issuing_der"]),
            anchors_der=tuple(attributes["anchors_der"]),
            config=BundleConfig.from_map(attributes["config"]),
            issued_at=attributes["issued_at"],
        )


def check_bundle(bundle: Bundle, public_key: EllipticCurvePublicKey) -> None:
    """Check what a device checks at PREPARE, for the pending key `public_key`.

    Raises:
        BundleRefusedError: with the code that the device answers.
    """
    # Imported here: whoever only reads a bundle (the device client, at every start) needs no cryptography.
    from birthmark.device.link.chain import check_certificates  # noqa: PLC0415

    check_certificates(bundle, public_key)


def _refusing(step: Any) -> dict[Any, Any]:
    try:
        return step()  # type: ignore[no-any-return]
    except (SchemaError, cbor.CborError) as error:
        raise BundleRefusedError(ErrorCode.BUNDLE, error.message) from None
