"""Whole commands on a registry at size: `python -m bench.registry_commands --rows 1000000 --registry URL`.

A station is founded, its registry filled with devices as they are when they are made, one in a hundred of them
(`--revoked-each`) revoked, and the commands are run as an operator runs them, each a process of its own. What is
printed is the median, and the processor time of it: a machine that has other work to do makes the former longer.
"""

from __future__ import annotations

import argparse
import os
import resource
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from birthmark.provisioning.authority import with_certificate
from birthmark.provisioning.founding import found_station
from birthmark.provisioning.registry.interface import LAST_ROW
from birthmark.provisioning.registry.model import Kind, State
from birthmark.provisioning.registry.sql_database import Database
from birthmark.provisioning.registry.sql_schema import ROWS
from birthmark.provisioning.settings import RegistrySetting, Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from birthmark.provisioning.registry.model import Row
    from birthmark.provisioning.station import Station

PHRASE: Final = "only for a measurement"
_REVOKED: Final = "n / EACH * EACH = n"
_COPIED: Final = {
    "number": "n",
    "name": "'device-' || n",
    "name_folded": "'device-' || n",
    "revoked_at": f"CASE WHEN {_REVOKED} THEN one.changed_at END",
    "revocation_reason": f"CASE WHEN {_REVOKED} THEN 'superseded' ELSE '' END",
}
"""What differs from row to row. Serial numbers are spread as random ones are."""
_AS_SQLITE: Final = {
    "hwid": "CAST(printf('%08x', n) AS BLOB)",
    "public_key_der": "CAST(printf('%091d', n * 2654435761 % 4294967296) AS BLOB)",
    "cert_serial": "printf('5a%08x%030x', n * 2654435761 % 4294967296, n)",
    "series": "(WITH RECURSIVE s(n) AS (SELECT FIRST UNION ALL SELECT n+1 FROM s WHERE n < LAST) SELECT n FROM s)",
}
_AS_POSTGRESQL: Final = {
    "hwid": "lpad(to_hex(n), 8, '0')::bytea",
    "public_key_der": "lpad(mod(n * 2654435761, 4294967296)::text, 91, '0')::bytea",
    "cert_serial": "'5a' || lpad(to_hex(mod(n * 2654435761, 4294967296)), 8, '0') || lpad(to_hex(n), 30, '0')",
    "series": "generate_series(FIRST::bigint, LAST) AS s(n)",
}


def main() -> None:
    """Fill and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--registry", default="sqlite:///registry.db", help="default: %(default)s")
    parser.add_argument("--revoked-each", type=int, default=100, metavar="N", help="default: every %(default)sth")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--station", type=Path, help="keep the station here; one that is there is used as it is")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.station or Path(scratch) / "station"
        if not folder.exists():
            begun_s = time.perf_counter()
            fill(folder, arguments.rows, arguments.registry, arguments.revoked_each)
            print(f"filled with {arguments.rows:,} rows in {time.perf_counter() - begun_s:.0f} s", flush=True)
        print(f"{'':24} seconds  of them on a processor")
        for what, words in commands(arguments.rows).items():
            rounds = [
                timed(folder, [word.replace("@", str(each)) for word in words]) for each in range(arguments.rounds)
            ]
            taken_s, busy_s = (statistics.median(each) for each in zip(*rounds, strict=True))
            print(f"{what:24} {taken_s:7.2f}  {busy_s:.2f}", flush=True)


def commands(rows: int) -> dict[str, Sequence[str]]:
    """Return what is measured; `@` stands for the round."""
    some = secrets.randbelow(rows // 10 - 2) + 1
    return {
        "start (--help)": ["--help"],
        "show": ["show", f"device-{some}"],
        "list --name": ["list", "--name", f"device-{some}"],
        "revoke": ["revoke", f"device-{some}@", "--reason", "lost"],
        "crl": ["crl"],
    }


def fill(folder: Path, rows: int, url: str, revoked_each: int) -> None:
    """Found a station, enrol one device and copy its row, by the database itself, until there are so many."""
    settings = Settings("Acme", registry=RegistrySetting(url))
    with closing(found_station(folder, settings, passphrase=PHRASE.encode())) as station:
        one = enrolled(station)
        multiply(Database(url, folder), one.number, rows, revoked_each)
        with station.registry.transaction() as transaction:
            transaction.set_counter(LAST_ROW, one.number + rows - 1)


def multiply(database: Database, number: int, rows: int, revoked_each: int = 100) -> None:
    """Have a database copy one row, with what must be unique changed, until there are so many."""
    taken = _AS_SQLITE if database.path is not None else _AS_POSTGRESQL
    changed = _COPIED | taken
    columns = ", ".join(column.name for column in ROWS.c)
    values = ", ".join(changed.get(column.name, f"one.{column.name}") for column in ROWS.c)
    values = values.replace("EACH", str(revoked_each))
    series = taken["series"].replace("FIRST", str(number + 1)).replace("LAST", str(number + rows - 1))
    copied = f"INSERT INTO birthmark_rows ({columns}) SELECT {values} FROM birthmark_rows AS one, {series}"  # noqa: S608
    with database.connect() as connection:
        connection.exec_driver_sql(f"{copied} WHERE one.number = {number}")
        connection.exec_driver_sql("ANALYZE")
    database.close()


def enrolled(station: Station) -> Row:
    """Return a device as it is when it is made."""
    authority = station.authority
    key = generate_private_key(SECP256R1()).public_key()
    with station.registry.transaction() as transaction:
        row = transaction.insert(
            kind=Kind.DEVICE,
            name="device-1",
            role="sensor",
            state=State.KEYED,
            hwid=bytes(8),
            txn=bytes(16),
            public_key_der=key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
            cert_serial=authority.new_cert_serial(),
            issuer=authority.key_id,
            bundle_sha256=bytes(32),
        )
    issued = with_certificate(row, authority.issue_device(row, now=station.clock()), anchors=authority.anchor_ids)
    with station.registry.transaction() as transaction:
        return transaction.update(issued.changed(state=State.ATTESTED))


def timed(folder: Path, words: Sequence[str]) -> tuple[float, float]:
    """Run a command as a process; return how long it took and its processor time, in seconds."""
    command = [str(Path(sys.executable).with_name("birthmark")), *words]
    if "--help" not in words:
        command += ["--station", str(folder)]
    environment = {**os.environ, "BIRTHMARK_PASSPHRASE": PHRASE}
    begun_s, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    taken_s, after = time.perf_counter() - begun_s, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr}")
    return taken_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
