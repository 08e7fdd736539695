"""The files of an exported Mosquitto 2.0: what a gateway's settings and policy are there. Pure.

Rules:

- A username is the whole subject of the certificate (`use_subject_as_username`), so the role that the CA signed
  is part of it, and every identity is named in the ACL with its own topics. There is no `pattern`: one is for
  everybody, for services too. Who is not named may do nothing.
- A session belongs to the certificate (`use_username_as_clientid`), whatever client id is asked for.
- The issuing CAs are the anchors, as on the gateway: OpenSSL takes a CA that is marked as trusted (its form
  `TRUSTED CERTIFICATE`) without the root above it. The root is in no file, so no other CA below it is let in.
- The gateway's key stays where it is, and is named.
"""

from __future__ import annotations

import base64
import shlex
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.serialization import Encoding

from birthmark.broker.config import Durability
from birthmark.broker.mosquitto_limits import needed_denials
from birthmark.broker.policy import ID
from birthmark.broker.tls import TLS12_SUITES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime
    from pathlib import Path

    from birthmark.broker.config import BrokerSettings
    from birthmark.broker.crl import Crl
    from birthmark.broker.export_roster import Roster
    from birthmark.broker.mosquitto_limits import Refusal
    from birthmark.broker.policy import Policy, RoleRules
    from birthmark.broker.trust import Trust

MARK = "# Written by `birthmark-broker export mosquitto`; the next export replaces it."
CONF, ACL, CRL, CLIENTS_CA, RELOAD, README, DATA, PID = (
    "mosquitto.conf",
    "acl",
    "crl.pem",
    "clients-ca.pem",
    "reload",
    "README.md",
    "data",
    "mosquitto.pid",
)
_FOR_TLS_CLIENTS = bytes.fromhex("300c300a06082b06010505070302")
"""OpenSSL's X509_CERT_AUX: trusted for id-kp-clientAuth, and for nothing else."""
_LINE_CHARACTERS = 64
NOTES = (
    "A subscription is always granted, and a will always taken; what the policy does not allow comes of neither.",
    "A client id is the certificate's subject, whatever a client asks for; so a service has one session.",
    "An identity that was made, or given another role, after the export may do nothing until the next one.",
    "Shared subscriptions (`$share/...`) and MQTT 5 are taken, within the same rights.",
    "Nothing is said on `gateway/...`, and `$SYS` has Mosquitto's own figures.",
    "Files are not watched: `reload` exports again and has Mosquitto read them.",
)
"""What is otherwise than on the gateway, and no weaker."""


def acl(policy: Policy, roster: Roster) -> str:
    """Return the ACL file: for each identity what its role may write, read and not have."""
    roles = {role.name: role for role in policy.roles}
    blocks = [MARK + "\n"]
    for subject, peer in sorted(roster.peers.items()):
        name = policy.rights(peer.device_id, peer.role).role
        lines = [] if name is None else _topics(roles[name], str(peer.device_id))
        if lines:
            blocks.append("\n".join([f"# role {name}", f"user {subject}", *lines]) + "\n")
    return "\n".join(blocks)


def _topics(role: RoleRules, own: str) -> list[str]:
    less_said, less_heard = needed_denials(role)
    denied = dict.fromkeys((*less_said, *less_heard))
    both = [entry for entry in role.publish if entry in role.subscribe]
    entries = [("deny", entry) for entry in denied]
    entries += [("readwrite" if entry in both else "write", entry) for entry in dict.fromkeys(role.publish)]
    entries += [("read", entry) for entry in dict.fromkeys(role.subscribe) if entry not in both]
    return [
        f"topic {access} {'/'.join(own if level == ID else level for level in entry.split('/'))}"
        for access, entry in entries
    ]


def clients_ca(trust: Trust) -> str:
    """Return the issuing CAs, each as an anchor of its own."""
    return "".join(
        _pem("TRUSTED CERTIFICATE", issuer.certificate.public_bytes(Encoding.DER) + _FOR_TLS_CLIENTS)
        for issuer in trust
    )


def crls_pem(crls: Iterable[Crl]) -> str:
    """Return the CRLs in force."""
    return "".join(_pem("X509 CRL", crl.der) for crl in crls)


def _pem(label: str, der: bytes) -> str:
    text = base64.b64encode(der).decode()
    lines = [text[at : at + _LINE_CHARACTERS] for at in range(0, len(text), _LINE_CHARACTERS)]
    return "\n".join([f"-----BEGIN {label}-----", *lines, f"-----END {label}-----"]) + "\n"


def conf(settings: BrokerSettings, folder: Path, run_as: str) -> str:
    """Return `mosquitto.conf` for a folder; Mosquitto drops to the user `run_as` if root starts it."""
    limits = settings.limits
    lines = [
        MARK,
        f"user {run_as}",
        f"pid_file {folder / DATA / PID}",
        "log_dest stderr",
        "",
        f"listener {settings.listen_port} {settings.listen_host}",
        f"cafile {folder / CLIENTS_CA}",
        f"crlfile {folder / CRL}",
        f"certfile {settings.credentials_path}",
        f"keyfile {settings.credentials_path}",
        f"ciphers {TLS12_SUITES}",
        "require_certificate true",
        "use_subject_as_username true",
        "use_username_as_clientid true",
        f"max_connections {limits.max_connections}",
        "",
        "allow_anonymous false",
        f"acl_file {folder / ACL}",
        "check_retain_source true",
        "set_tcp_nodelay true",
        # Mosquitto compares the remaining length and one byte with it.
        f"max_packet_size {limits.max_packet_bytes + 1}",
        f"max_inflight_messages {limits.max_inflight}",
        f"max_queued_messages {limits.max_queued_messages}",
        f"max_queued_bytes {limits.max_queued_bytes}",
        f"persistent_client_expiration {max(1, limits.session_expiry_s // 3_600)}h",
    ]
    if settings.durability is Durability.NONE:
        lines += ["persistence false"]
    else:
        lines += ["persistence true", f"persistence_location {folder / DATA}/", "autosave_interval 1"]
    return "\n".join(lines) + "\n"


def reload_script(command: list[str], folder: Path) -> str:
    """Return the script that exports again by the same command, and has Mosquitto read what it wrote."""
    again = shlex.join(command)
    pid_file = shlex.quote(str(folder / DATA / PID))
    # A process id may be somebody else's by now, whom the signal would end.
    return f"""#!/bin/sh
{MARK}
# Run it after every new CRL, policy or identity. If the export is refused, Mosquitto keeps what it has.
set -eu
"${{BIRTHMARK_BROKER:-birthmark-broker}}" {again}
pid=$(cat {pid_file} 2>/dev/null || true)
if [ -z "$pid" ] || [ "$(cat "/proc/$pid/comm" 2>/dev/null)" != mosquitto ]; then
    echo "error: could not reload Mosquitto: it does not run by this folder; its files are new" >&2
    exit 1
fi
kill -HUP "$pid"
"""


def readme(
    settings: BrokerSettings,
    policy: Policy,
    version: int,
    roster: Roster,
    crls: Mapping[str, Crl],
    *,
    accepted: list[Refusal],
    moment: datetime,
) -> str:
    """Return what the folder is, how it is used, and in what it is not the gateway."""
    where = f"the fleet's, version {version}" if version else str(settings.policy_path)
    issuers = [
        f"- CRL number {crl.number}, {len(crl.serials)} revoked, until {crl.next_update:%F %H:%M} UTC. **After"
        " that nobody of this CA is let in**: bring a new CRL and run `reload` before."
        for crl in crls.values()
    ]
    left_out = f"{roster.revoked} revoked, {roster.out_of_date} out of date"
    weaker = [f"- `{each.code}`: {each.reason}." for each in accepted]
    return "\n".join(
        [
            f"# Mosquitto as the gateway {settings.name}",
            "",
            f"Written by `birthmark-broker export mosquitto` on {moment:%F %H:%M} UTC, for Mosquitto 2.0.",
            "",
            f"- Policy: {where}, sha256 {policy.sha256}.",
            f"- Identities: {len(roster.peers)}. Left out: {left_out}.",
            *issuers,
            "",
            "## Use",
            "",
            f"`{DATA}` and the gateway's key, {settings.credentials_path}, belong to the user that",
            "Mosquitto runs as: it reads the key again at every reload. `reload` exports once more, from the",
            "files as they are then; what is revoked loses its rights at once. A restart ends its connections.",
            "",
            "```",
            f"mosquitto -c {CONF}",
            f"./{RELOAD}        # after a new CRL, policy or identity",
            "```",
            "",
            "## Weaker than the gateway, and accepted",
            "",
            *(weaker or ["Nothing."]),
            "",
            "## Otherwise than on the gateway, and no weaker",
            "",
            *(f"- {note}" for note in NOTES),
            "",
        ]
    )
