"""What the station spends on a fleet: renewals, CRLs of any size, certificates in bulk; a row's room on the disk.

CPU is that of this process, which does what `birthmark renewd` and `birthmark crl serve` do. Devices' keys and
requests are made before.
"""

from __future__ import annotations

import json
import secrets
import time
from contextlib import closing
from typing import TYPE_CHECKING, Final

from cryptography import x509

from bench.registry_commands import PHRASE, enrolled, multiply
from bench.wire import BenchError
from birthmark.device.agent.keys import key_to_der, make_key, signing_request
from birthmark.device.agent.slots import Slot
from birthmark.device.clock import Moment
from birthmark.device.identity import DeviceId, device_role
from birthmark.device.link.bundle import Bundle, BundleConfig
from birthmark.device.pem import CERTIFICATE_REQUEST, CRL, block, read_blocks
from birthmark.device.renewal.making import confirmation, granted, new_key, renewal_request
from birthmark.provisioning import profile
from birthmark.provisioning.bulk import issue_all
from birthmark.provisioning.bulk_requests import read_wanted
from birthmark.provisioning.enrollment.bundles import BrokerAddress
from birthmark.provisioning.founding import found_station
from birthmark.provisioning.registry.interface import LAST_ROW
from birthmark.provisioning.registry.sql_database import Database
from birthmark.provisioning.renewal import Asked, Renewals
from birthmark.provisioning.settings import RegistrySetting, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from birthmark.device.renewal.messages import RenewalAnswer, RenewalRequest
    from birthmark.provisioning.station import Station

GROUP: Final = 256
"""As many requests as `renewd` answers together."""
REGISTRY: Final = "sqlite:///registry.db"
BROKER: Final = BrokerAddress("localhost", 8883)


def figures(folder: Path, devices: int, rows: int, entries: int, say: Callable[[str], None]) -> dict[str, float]:
    """Measure.

    Args:
        folder: an empty one.
        devices: how many renew; they are made with keys of the station's.
        rows: in the registry, on SQLite, beside theirs.
        entries: of the large CRL.
        say: is told what comes.
    """
    settings = Settings("Bench", registry=RegistrySetting(REGISTRY))
    with closing(found_station(folder / "station", settings, passphrase=PHRASE.encode())) as station:
        _fill(station, rows)
        found = {"row_bytes": (station.folder / "registry.db").stat().st_size / rows}
        say(f"{devices} devices are made")
        begun_s = time.process_time()
        slots = _made(station, folder, devices)
        found["made_us"] = (time.process_time() - begun_s) * 1e6 / devices
        say(f"{devices} devices renew")
        found |= _renewals(station, slots)
        say(f"CRLs of up to {entries:,} entries")
        found |= _crls(station, entries)
    return found


def _fill(station: Station, rows: int) -> None:
    one = enrolled(station)
    multiply(Database(REGISTRY, station.folder), one.number, rows)
    with station.registry.transaction() as transaction:
        transaction.set_counter(LAST_ROW, one.number + rows - 1)


def _made(station: Station, folder: Path, devices: int) -> list[Slot]:
    """Issue certificates as `birthmark issue --from` does, and return what is on the devices then."""
    keys = {f"renewing-{number}": make_key() for number in range(devices)}
    source, out = folder / "devices.jsonl", folder / "certificates.jsonl"
    with source.open("w") as file:
        for name, key in keys.items():
            file.write(json.dumps({"id": name, "csr": _pem(signing_request(key, name))}) + "\n")
    wanted = read_wanted(source, device_role("sensor"))
    issue_all(station, source, wanted, out, broker=BROKER, tell=lambda *_: None)
    authority, slots = station.authority, []
    for line in out.read_text().splitlines():
        record = json.loads(line)
        leaf_der = read_blocks(record["certificate"].encode())[0][1]
        bundle = Bundle(
            leaf_der=leaf_der,
            issuing_der=(authority.issuing_der,),
            anchors_der=authority.anchors_der,
            config=BundleConfig("localhost", 8883, DeviceId(record["id"]), device_role("sensor")),
            issued_at=int(station.clock().timestamp()),
        )
        slots.append(Slot(secrets.token_bytes(16), key_to_der(keys[record["id"]]), bundle))
    return slots


def _renewals(station: Station, slots: Sequence[Slot]) -> dict[str, float]:
    renewals, moment = Renewals(station), Moment(station.clock())
    spent_s = taken_s = 0.0
    octets = 0

    def answered(requests: Sequence[RenewalRequest]) -> list[RenewalAnswer]:
        nonlocal spent_s, taken_s, octets
        asked = [Asked(ids[place], request) for place, request in enumerate(requests)]
        begun_s, busy_s = time.perf_counter(), time.process_time()
        answers = renewals.answer(asked)
        spent_s += time.process_time() - busy_s
        taken_s += time.perf_counter() - begun_s
        octets += sum(len(request.to_bytes()) for request in requests)
        octets += sum(len(answer.to_bytes()) for answer in answers)
        return answers

    for start in range(0, len(slots), GROUP):
        group = slots[start : start + GROUP]
        ids = [slot.bundle.config.device_id for slot in group]
        keys = [new_key(device_id) for device_id in ids]
        requests = [renewal_request(slot, key) for slot, key in zip(group, keys, strict=True)]
        renewed = [
            granted(answer, request, current=slot, asked=key, moment=moment)
            for answer, request, slot, key in zip(answered(requests), requests, group, keys, strict=True)
        ]
        if any(answer.outcome != "confirmed" for answer in answered([confirmation(slot) for slot in renewed])):
            raise BenchError("a renewal was not confirmed")
    return {
        "renewal_us": spent_s * 1e6 / len(slots),
        "renewal_s": taken_s / len(slots),
        "renewal_bytes": octets / len(slots),
    }


def _crls(station: Station, entries: int) -> dict[str, float]:
    authority, now = station.authority, station.clock()
    listed = [
        profile.Revoked(authority.new_cert_serial(), now, x509.ReasonFlags.superseded) for _ in range(entries)
    ]
    spent, octets = [], []
    for count in (entries // 2, entries):
        begun_s = time.process_time()
        der = authority.sign_crl(
            number=1, this_update=now, next_update=now + profile.CRL_LIFETIME, revoked=listed[:count]
        )
        spent.append(time.process_time() - begun_s)
        octets.append(len(block(CRL, der)))
    return {
        "crl_entry_us": (spent[1] - spent[0]) * 1e6 / (entries - entries // 2),
        "crl_entry_bytes": (octets[1] - octets[0]) / (entries - entries // 2),
    }


def _pem(request_der: bytes) -> str:
    return block(CERTIFICATE_REQUEST, request_der).decode()
