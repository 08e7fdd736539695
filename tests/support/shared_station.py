"""One of several processes at work on one registry: run as `shared_station.py FOLDER STATION WORKER COUNT`.

Each takes ids of one template as `birthmark run` does, certifies them, revokes some, signs CRLs and policies.
Whatever it has been promised (a transaction that has returned, a CRL that is in its file) it says on stdout, one
JSON object a line. If the registry fails under it, as when its server is restarted, it ends with that error's exit
code.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cryptography import x509
from support.station import PASSPHRASE, issue, public_key_der

from birthmark.device.errors import EnrollmentRefusedError, RegistryError
from birthmark.provisioning.authority import with_certificate
from birthmark.provisioning.crls import sign_and_store_crl
from birthmark.provisioning.fleet_policy import sign_policy
from birthmark.provisioning.issuing import issue_operator
from birthmark.provisioning.registry.model import Kind, State
from birthmark.provisioning.revocation import revoke
from birthmark.provisioning.station import Station

POLICY = b"[roles.device]\n[[assignments]]\nou = 'device'\nrole = 'device'\n"


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def enrol(station: Station, name: str) -> bool:
    """Bring a device to ATTESTED; return whether its id was free."""
    authority = station.authority
    try:
        with station.registry.transaction() as transaction:
            hwid, txn = os.urandom(8), os.urandom(16)
            row = transaction.insert(kind=Kind.DEVICE, name=name, role="sensor", hwid=hwid, txn=txn)
    except EnrollmentRefusedError:
        return False
    with station.registry.transaction() as transaction:
        row = transaction.update(
            row.changed(
                state=State.KEYED,
                public_key_der=public_key_der(),
                cert_serial=authority.new_cert_serial(),
                issuer=authority.key_id,
            )
        )
    der = issue(station, row)
    issued = with_certificate(row, der, anchors=authority.anchor_ids)
    with station.registry.transaction() as transaction:
        transaction.update(issued.changed(state=State.ATTESTED))
    say(name=name, number=row.number, cert_serial=row.cert_serial, certificate=hashlib.sha256(der).hexdigest())
    return True


def sign(station: Station) -> None:
    for crl in sign_and_store_crl(station).crls:
        say(crl=crl.number, issuer=crl.issuer, sha256=crl.sha256)


def main(folder: Path, name: str, worker: str, count: int) -> None:
    station = Station.open(folder / name, passphrase=PASSPHRASE)
    for number in range(count):
        name = f"sensor-{number}"
        if not enrol(station, name):
            continue
        if number % 4 == 0:
            crls = revoke(station, name, x509.ReasonFlags.superseded).crls
            say(revoked=name)
            for crl in crls.crls:
                say(crl=crl.number, issuer=crl.issuer, sha256=crl.sha256)
        elif number % 4 == 1:
            sign(station)
        elif number % 4 == 3:
            policy, is_new = sign_policy(station, POLICY + f"# {os.getpid()} {number}\n".encode())
            say(policy=policy.version, text=policy.text_sha256, newly=is_new)
        elif number % 8 == 2:
            row = issue_operator(station, f"op-{worker}-{os.getpid()}-{number}", folder / "out").row
            say(name=row.name, number=row.number, cert_serial=row.cert_serial)
    sign(station)
    say(done=worker)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
    except RegistryError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
