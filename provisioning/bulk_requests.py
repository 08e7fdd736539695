"""What `birthmark issue --from` is asked for: a file of records, or a folder of certification requests.

Rules:

- A record has an `id`, perhaps a `role` and a `hwid`, and a `csr`: the request in PEM, or the path of its file,
  seen from the record's own file. Without a `csr` the station is to make the key, if it was told to.
- A folder holds `ID.csr.pem` files and nothing else, but for hidden ones: what was named wrongly is not left out
  in silence.
- Every request is checked (`birthmark.provisioning.enrollment.signing_request`), and its CN is the id.
- No id, key or hwid occurs twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from birthmark.device.errors import BirthmarkError
from birthmark.device.identity import DeviceId, Role, device_role
from birthmark.device.pem import CERTIFICATE_REQUEST, read_blocks
from birthmark.provisioning.enrollment.signing_request import RequestRefusedError, requested_key
from birthmark.provisioning.record_files import Columns, Record, line_error, naming, read_records
from birthmark.provisioning.registry.model import HWID_OCTETS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REQUEST_SUFFIX: Final = ".csr.pem"
MAX_DEVICES: Final = 100_000
COLUMNS: Final = Columns(known=("id", "role", "csr", "hwid"), required=("id",))
_MAX_REQUEST_FILE_BYTES: Final = 8192


class Wanted(NamedTuple):
    """One device that is to get a certificate, and where that stands."""

    where: str
    device_id: DeviceId
    role: Role
    hwid: bytes | None
    public_key_der: bytes | None
    """SubjectPublicKeyInfo of the request; None: the station is to make the key."""


def read_wanted(source: Path, role: Role, *, station_makes_keys: bool = False) -> list[Wanted]:
    """Read and check a file or a folder, whole.

    Args:
        source: a CSV or JSONL file, or a folder.
        role: of those that name none.
        station_makes_keys: whether a record may be without a request.

    Raises:
        ConfigurationError: it cannot be read, or a record or file in it breaks a rule of this module; it is named.
    """
    wanted: list[Wanted] = []
    holders: dict[tuple[str, object], str] = {}
    found = _in_folder(source, role) if source.is_dir() else _in_file(source, role)
    for one in found:
        if one.public_key_der is None and not station_makes_keys:
            hint = "have the device make its key and a request for it; or have the station make it: --keys station"
            raise line_error(source, one.where, f"{one.device_id} has no csr", hint)
        for name, value in (("id", one.device_id.folded), ("key", one.public_key_der), ("hwid", one.hwid)):
            if value is not None and (before := holders.setdefault((name, value), one.where)) is not one.where:
                raise line_error(source, one.where, f"the {name} of {one.device_id} is that of {before} too")
        wanted.append(one)
        if len(wanted) > MAX_DEVICES:
            raise line_error(source, one.where, f"there are more than {MAX_DEVICES} devices", "split it")
    if not wanted:
        hint = f"it needs files named ID{REQUEST_SUFFIX}" if source.is_dir() else "it needs a line for each device"
        raise line_error(source, "", "there is no device in it", hint)
    return wanted


def _in_file(path: Path, role: Role) -> Iterator[Wanted]:
    for record in read_records(path, COLUMNS):
        with naming(path, record.where):
            yield _wanted(path, record, role)


def _wanted(path: Path, record: Record, role: Role) -> Wanted:
    fields = record.fields
    device_id = DeviceId(fields["id"])
    return Wanted(
        record.where,
        device_id,
        device_role(fields["role"]) if "role" in fields else role,
        _hwid(path, record),
        _key_of(path, record, device_id) if "csr" in fields else None,
    )


def _hwid(path: Path, record: Record) -> bytes | None:
    text = record.fields.get("hwid")
    if text is None:
        return None
    try:
        hwid = bytes.fromhex(text)
    except ValueError:
        hwid = b""
    if len(hwid) not in HWID_OCTETS:
        octets = f"{HWID_OCTETS[0]} to {HWID_OCTETS[-1]}"
        raise line_error(path, record.where, f"its hwid is not {octets} octets in hex")
    return hwid


def _key_of(path: Path, record: Record, device_id: DeviceId) -> bytes:
    text = record.fields["csr"]
    if "-----BEGIN" in text:
        return _requested(path, record.where, text.encode(), device_id)
    try:
        content = _read(path.parent / text)
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or "that is no path"
        raise line_error(path, record.where, f"the request of {device_id} cannot be read: {cause}") from error
    return _requested(path, record.where, content, device_id)


def _in_folder(folder: Path, role: Role) -> Iterator[Wanted]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if not path.name.endswith(REQUEST_SUFFIX):
            hint = f"every file in the folder is a request, named ID{REQUEST_SUFFIX}"
            raise line_error(folder, path.name, "it is not named like a request", hint)
        with naming(folder, path.name):
            device_id = DeviceId(path.name.removesuffix(REQUEST_SUFFIX))
            try:
                content = _read(path)
            except OSError as error:
                raise line_error(folder, path.name, f"it cannot be read: {error.strerror}") from error
            key = _requested(folder, path.name, content, device_id)
        yield Wanted(path.name, device_id, role, None, key)


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_MAX_REQUEST_FILE_BYTES + 1)


def _requested(source: Path, where: str, text: bytes, device_id: DeviceId) -> bytes:
    hint = "it is to hold one `CERTIFICATE REQUEST` in PEM"
    if len(text) > _MAX_REQUEST_FILE_BYTES:
        raise line_error(source, where, f"the request of {device_id} is too long to be one", hint)
    try:
        blocks = read_blocks(text)
    except BirthmarkError as error:
        raise line_error(source, where, f"the request of {device_id} cannot be read: {error.message}") from error
    if [label for label, _ in blocks] != [CERTIFICATE_REQUEST]:
        raise line_error(source, where, f"the request of {device_id} is none, or more than one", hint)
    try:
        return requested_key(blocks[0][1], device_id.text)
    except RequestRefusedError as error:
        hint = f"openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -subj /CN={device_id} makes one"
        raise line_error(source, where, f"the request of {device_id} is refused: {error.cause}", hint) from error
