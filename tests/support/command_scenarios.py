"""Every command of the station, as it is killed: what is there before it, and what must be there once it is done.

The killing is `command_kills`. A command that is not here is named, with the reason, in
tests/provisioning/test_command_kills.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from support.line_scenarios import LINE_SCENARIOS
from support.scenario import Scenario, all_listed, rows_named, station
from support.softhsm import LABEL, SoftHsm, found_module, with_a_token
from support.station import CHEAP, PASSPHRASE, enrolled_row, keyed_row, public_key_der

from birthmark.device.agent.stop import stop_on_signals
from birthmark.device.console import run
from birthmark.device.credentials import BrokerAddress, Credentials
from birthmark.device.pem import CRL, read_blocks
from birthmark.device.stopping import Stopping
from birthmark.provisioning import audit, audit_check
from birthmark.provisioning.audit_checkpoint import read_checkpoint
from birthmark.provisioning.backup import back_up, read_backup
from birthmark.provisioning.cli import parser
from birthmark.provisioning.crl_store import crl_number_counter, current_crl
from birthmark.provisioning.crls import sign_and_store_crl
from birthmark.provisioning.fleet_policy import POLICY_VERSION, current_policy, trusted_policy
from birthmark.provisioning.gateway_settings import Gateway, Upstream
from birthmark.provisioning.issuing import issue_operator
from birthmark.provisioning.line.batches import open_batch
from birthmark.provisioning.registry.line import Quarantined
from birthmark.provisioning.registry.model import Kind, State
from birthmark.provisioning.retirement import note_retirement
from birthmark.provisioning.revocation import revoke
from birthmark.provisioning.rollover.phases import activate
from birthmark.provisioning.rollover.starting import RootKey, start_issuing, start_root
from birthmark.provisioning.row_records import jsonl_lines
from birthmark.provisioning.settings_edit import add_gateway, add_upstream
from birthmark.provisioning.tokens.uri import TokenUri

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SQLITE = "sqlite:///registry.db"
OTHER_SQLITE = "sqlite:///moved.db"
CURRENT_CA = "CURRENT-CA"
"""Stands for what people call the CA that issues now."""
POLICY = b"[roles.device]\n[[assignments]]\nou = 'device'\nrole = 'device'\n"
SECRET = b"the backup's own passphrase"
REQUESTED = ("pump-1", "pump-2", "pump-3")
NEW_PASSPHRASE = b"another one"
LOST = x509.ReasonFlags.key_compromise


def is_issued(root: Path, name: str, file: str) -> None:
    """One certificate of that name is in use, the one in the file; every other one that was begun is revoked."""
    rows = rows_named(root, name)
    (live,) = [row for row in rows if row.is_live]
    assert live.state is State.ATTESTED, rows
    assert x509.load_pem_x509_certificate((root / file).read_bytes()).serial_number == live.cert_serial
    assert all(row.is_revoked for row in rows if row is not live and row.replaced_by is None), rows
    all_listed(root)


def is_gateway(root: Path) -> None:
    is_issued(root, "localhost", "out/server.pem")
    opened = station(root)
    assert (root / "out" / "clients-ca.pem").read_bytes() == opened.cas.for_brokers.pem
    ((label, _),) = read_blocks((root / "out" / "crl.pem").read_bytes())
    assert label == CRL


def with_devices(root: Path) -> None:
    opened = station(root)
    enrolled_row(opened, "sensor-1")
    enrolled_row(opened, "sensor-2", state=State.PREPARED)
    keyed_row(opened, "sensor-3")


def with_gateway(root: Path) -> None:
    add_gateway(root / "station" / "station.toml", Gateway("gw-1", crl_path=Path("/nowhere/crl.pem")))


def with_upstream(root: Path) -> None:
    upstream = Upstream("cloud", (BrokerAddress("localhost"),), operator_path=Path("/nowhere/alice.pem"))
    add_upstream(root / "station" / "station.toml", upstream)


def with_policy(root: Path) -> None:
    with_gateway(root)
    (root / "policy.toml").write_bytes(POLICY)


def is_published(root: Path) -> None:
    """One version was given, and it is the last one that is kept: signed, and of this text."""
    opened = station(root)
    with opened.registry.view() as view:
        policy = current_policy(view)
        assert policy is not None
        assert (policy.version, policy.text, view.counter(POLICY_VERSION)) == (1, POLICY, 1)
    assert trusted_policy(policy.to_bytes(), opened.cas) == policy
    entries = [entry["action"] for entry in audit.read(root / "station" / "audit.jsonl")]
    assert entries.count("policy-sign") == 1


def with_devices_and_gateway(root: Path) -> None:
    with_devices(root)
    with_gateway(root)


def with_batch(root: Path) -> None:
    opened = station(root)
    open_batch(opened, "W47")
    authority = opened.authority
    for number in range(3):
        with opened.registry.transaction() as transaction:
            transaction.insert(
                kind=Kind.DEVICE,
                name=f"sensor-{number}",
                role="sensor",
                state=State.KEYED,
                hwid=bytes(7) + bytes([number]),
                txn=bytes(15) + bytes([number]),
                public_key_der=public_key_der(),
                cert_serial=authority.new_cert_serial(),
                issuer=authority.key_id,
                batch="W47",
            )


def with_requests(root: Path) -> None:
    (root / "in").mkdir()
    for name in REQUESTED:
        made = x509.CertificateSigningRequestBuilder().subject_name(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        )
        pem = made.sign(generate_private_key(SECP256R1()), SHA256()).public_bytes(Encoding.PEM)
        (root / "in" / f"{name}.csr.pem").write_bytes(pem)


def are_attested(root: Path, leaves: dict[str, x509.Certificate]) -> None:
    """Every device has one row, ATTESTED, with the certificate that was handed out, issued once."""
    with station(root).registry.view() as view:
        rows = {row.name: row for row in view.rows()}
        assert len(rows) == len(view.rows()) == len(leaves)
    for name, leaf in leaves.items():
        assert rows[name].state is State.ATTESTED
        assert rows[name].certificate_der == leaf.public_bytes(Encoding.DER)
    entries = [entry for entry in audit.read(root / "station" / "audit.jsonl") if entry["action"] == "issue"]
    assert sorted(entry["subject"] for entry in entries) == sorted(leaves)


def are_issued_for_requests(root: Path) -> None:
    names = {f"{name}.crt.pem" for name in REQUESTED} | {"ca.pem"}
    assert {path.name for path in (root / "out").iterdir()} == names
    files = {name: root / "out" / f"{name}.crt.pem" for name in REQUESTED}
    are_attested(root, {name: x509.load_pem_x509_certificate(path.read_bytes()) for name, path in files.items()})


def are_issued_in_lines(root: Path) -> None:
    records = [json.loads(line) for line in (root / "out.jsonl").read_text().splitlines()]
    leaves = {each["id"]: x509.load_pem_x509_certificate(each["certificate"].encode()) for each in records}
    assert list(leaves) == sorted(REQUESTED)
    are_attested(root, leaves)


def are_issued_with_keys(root: Path) -> None:
    held = {name: Credentials.from_folder(root / "out" / name) for name in ("board-1", "board-2")}
    are_attested(root, {name: x509.load_der_x509_certificate(one.leaf_der) for name, one in held.items()})
    assert {path.name for path in (root / "out").rglob("*") if path.is_file()} == {"active", "ca.pem"}


def are_exported(root: Path) -> None:
    heading, *lines = (root / "made.csv").read_text().splitlines()
    assert heading.startswith("number,id,")
    assert [line.split(",")[1] for line in lines] == ["sensor-1", "sensor-2", "sensor-3"]


def with_rows_elsewhere(root: Path) -> None:
    """A second station of the same CAs has made devices; what it knows of them is in a file."""
    shutil.copytree(root / "station", root / "elsewhere")
    other = station(root, "elsewhere")
    for number in (1, 2):
        enrolled_row(other, f"sensor-{number}")
    with other.registry.view() as view:
        (root / "made.jsonl").write_text("".join(jsonl_lines(view.rows())))
    shutil.rmtree(root / "elsewhere")


def are_imported(root: Path) -> None:
    with station(root).registry.view() as view:
        assert [(row.name, row.state) for row in view.rows()] == [
            ("sensor-1", State.ATTESTED),
            ("sensor-2", State.ATTESTED),
        ]
    entries = [entry for entry in audit.read(root / "station" / "audit.jsonl") if entry["action"] == "import"]
    assert [entry["subject"] for entry in entries] == ["sensor-1", "sensor-2"]


def with_quarantine(root: Path) -> None:
    opened = station(root)
    with opened.registry.transaction() as transaction:
        transaction.quarantine(Quarantined(bytes(8), opened.clock(), "", "is odd", bytes(16)))


def with_backup(root: Path) -> None:
    opened = station(root)
    enrolled_row(opened, "sensor-1")
    back_up(opened, root / "backup.age", SECRET, cost_log2=2)
    crls = revoke(opened, "sensor-1", LOST).crls
    (root / "gateway.crl").write_bytes(crls.current.der)
    shutil.rmtree(root / "station")


def with_foreign_crl(root: Path) -> None:
    with_backup(root)
    run_here(root, ["restore", "@/backup.age", "--to", "@/station"])


def is_revoked(root: Path, folder: str = "station") -> None:
    (row,) = rows_named(root, "sensor-1", folder)
    assert row.is_revoked
    all_listed(root, folder)


def is_restored(root: Path) -> None:
    is_revoked(root, "restored")
    entries = [entry["action"] for entry in audit.read(root / "restored" / "audit.jsonl")]
    assert entries.count("restore") == 1


def with_one_replaced(root: Path) -> None:
    """The certificate of sensor-1 was replaced by a renewal, and is due to be revoked; a gateway is away."""
    with_devices_and_gateway(root)
    opened = station(root)
    (row,) = rows_named(root, "sensor-1")
    with opened.registry.transaction() as transaction:
        note_retirement(transaction, row, opened.clock())


def is_served(root: Path) -> None:
    is_revoked(root)
    entries = [entry for entry in audit.read(root / "station" / "audit.jsonl") if entry["action"] == "revoke"]
    assert [entry["subject"] for entry in entries] == ["sensor-1"]


def with_renewal_service(root: Path) -> None:
    with_devices(root)
    issue_operator(station(root), "renewd", root / "out", role="service-renewal")


class AfterATurn(Stopping):
    """A service looks once, and is told to end."""

    _turns = 0

    def wait(self, timeout_s: float | None = None) -> bool:  # noqa: ARG002
        self._turns += 1
        return self._turns > 1


@contextlib.contextmanager
def stopping_after_a_turn() -> Iterator[Stopping]:
    with stop_on_signals() as stop:
        yield AfterATurn(stop)


def has_gateways(root: Path, count: int) -> None:
    assert len(station(root).settings.gateways) == count


def has_upstreams(root: Path, count: int) -> None:
    assert len(station(root).settings.upstreams) == count


def has_backup(root: Path) -> None:
    assert read_backup(root / "new.age", SECRET).rows == 0


def batch_is(root: Path, *, is_open: bool) -> None:
    with station(root).registry.view() as view:
        (batch,) = view.batches()
        assert (batch.closed_at is None) is is_open
        if not is_open:
            all_listed(root)
            assert all(row.state is State.VOID and row.is_revoked for row in view.rows())


def is_cleared(root: Path) -> None:
    with station(root).registry.view() as view:
        assert view.quarantined() == []


def has_labels(root: Path) -> None:
    assert (root / "labels" / "sensor-1.svg").read_bytes().endswith(b"</svg>\n")


def with_next_ca(root: Path) -> None:
    opened = station(root)
    start_issuing(opened, lambda: RootKey(PASSPHRASE), derivation=CHEAP)
    sign_and_store_crl(opened)


def with_old_ca(root: Path) -> None:
    enrolled_row(station(root), "sensor-1")
    with_next_ca(root)
    opened = station(root)
    activate(opened, force=True)
    revoke(opened, "sensor-1", LOST)


def with_next_root(root: Path) -> None:
    opened = station(root)
    start_root(opened, PASSPHRASE, derivation=CHEAP)
    activate(opened, force=True)
    sign_and_store_crl(opened)


def cas_are(root: Path, *phases: str) -> None:
    """The issuing CAs that are trusted stand so, each with its CRL; the copies of the certificates are theirs."""
    opened = station(root)
    assert [ca.phase for ca in opened.cas.issuing] == list(phases)
    crls = current_crl(opened)
    assert crls is not None
    assert [crl.issuer for crl in crls.crls] == [ca.key_id for ca in opened.cas.issuing]
    for path, cas in ((opened.folder / "issuing.pem", opened.cas.issuing), (opened.root_path, opened.cas.roots)):
        assert path.read_bytes() == b"".join(ca.pem for ca in cas)


def has_roots(root: Path) -> None:
    assert (root / "ca.pem").read_bytes() == b"".join(ca.pem for ca in station(root).cas.roots)


def has_log(root: Path) -> None:
    """What was exported is the log's beginning, and ends with the word of its own export."""
    lines = (root / "log.jsonl").read_bytes()
    assert (root / "station" / "audit.jsonl").read_bytes().startswith(lines)
    assert audit.parsed(lines.splitlines()[-1])["action"] == "export"  # type: ignore[index]


def has_checkpoint(root: Path) -> None:
    opened = station(root)
    made = read_checkpoint(root / "checkpoint.pem", [ca.certificate for ca in opened.cas.roots])
    assert read_checkpoint(root / "station" / "checkpoint.pem", [opened.root]).head.seq >= made.head.seq
    assert not audit_check.check(opened.registry, [made.head]).problems


def has_new_passphrase(root: Path) -> None:
    opened = station(root)
    assert opened.root_issuer(NEW_PASSPHRASE)
    assert opened.key_path(opened.cas.roots[0]).stat().st_mode & 0o777 == 0o400


def with_medium(root: Path) -> None:
    (root / "medium").mkdir()


def is_detached(root: Path) -> None:
    opened = station(root)
    (ca,) = opened.cas.roots
    assert not opened.key_path(ca).exists()
    assert opened.root_issuer(PASSPHRASE, root / "medium" / opened.key_path(ca).name).certificate == ca.certificate


def is_lost(root: Path) -> None:
    opened = station(root)
    assert opened.key_place(opened.cas.for_clients) == "lost"
    entries = [entry["action"] for entry in audit.read(root / "station" / "audit.jsonl")]
    assert entries.count("ca-key-lost") == 1


def with_token(root: Path) -> None:
    """An empty token, in the scenario's own folder (`enter`)."""
    with_a_token(root / "softhsm")


def enter(root: Path) -> None:
    """Have the tokens of a scenario's folder be those that there are, for this process and its children."""
    module = found_module()
    if module is not None and (root / "softhsm").exists():
        SoftHsm(root / "softhsm", module).start()


def keys_in_token(root: Path) -> int:
    module = found_module()
    assert module is not None
    return len(SoftHsm(root / "softhsm", module).token(TokenUri(LABEL)).private_keys())


def has_token_key(root: Path) -> None:
    """The next CA's key is in the token, and no other key is."""
    cas_are(root, "current", "new")
    assert [bool(ca.key_uri) for ca in station(root).cas.issuing] == [False, True]
    assert keys_in_token(root) == 1


def is_founded_or_named(root: Path) -> None:
    """The station is there with its key; or, killed as soon as the token had made it, only the key is."""
    if (root / "station").exists():
        assert station(root).cas.for_clients.key_uri
    assert keys_in_token(root) == 1


def crl_number_of(root: Path) -> int:
    crls = current_crl(station(root))
    assert crls is not None
    return crls.current.number


def token_scenarios() -> dict[str, Scenario]:
    """Return those with a token; none where SoftHSM is not installed."""
    module = found_module()
    if module is None:
        return {}
    uri = f"pkcs11:token={LABEL};object=issuing?module-path={module}"
    return {
        "init --issuing-key": Scenario(
            ["init", "--issuing-key", uri],
            prepare=with_token,
            finished=is_founded_or_named,
            founds=False,
            done_already=["there is something already", "the token has one of that name"],
        ),
        "ca rollover start issuing --key": Scenario(
            ["ca", "rollover", "start", "issuing", "--key", uri], prepare=with_token, finished=has_token_key
        ),
    }


def is_moved(root: Path, url: str) -> None:
    opened = station(root)
    assert opened.settings.registry.url == url
    with opened.registry.view() as view:
        assert [row.name for row in view.rows()] == ["sensor-1", "sensor-2", "sensor-3"]
        assert view.counter(crl_number_counter(opened.cas.for_clients.key_id)) >= 1
    actions = [entry["action"] for entry in audit.read(opened.registry.audit_path)]
    assert actions.count("registry-migrate") == 1


SCENARIOS: dict[str, Scenario] = {
    **LINE_SCENARIOS,
    "init": Scenario(["init"], founds=False, done_already=["there is something already"]),
    "issue": Scenario(
        ["issue", "--from", "@/in", "--out", "@/out"], prepare=with_requests, finished=are_issued_for_requests
    ),
    "issue, a line a device": Scenario(
        ["issue", "--from", "@/in", "--out", "@/out.jsonl"], prepare=with_requests, finished=are_issued_in_lines
    ),
    "issue --keys station": Scenario(
        ["issue", "--from", "@/in.csv", "--out", "@/out", "--keys", "station"],
        prepare=lambda root: (root / "in.csv").write_text("id\nboard-1\nboard-2\n"),
        finished=are_issued_with_keys,
    ),
    "registry export": Scenario(
        ["registry", "export", "-o", "@/made.csv"], prepare=with_devices, finished=are_exported
    ),
    "registry import": Scenario(
        ["registry", "import", "@/made.jsonl"], prepare=with_rows_elsewhere, finished=are_imported
    ),
    "issue-broker": Scenario(
        ["issue-broker", "localhost", "127.0.0.1", "--out", "@/out"],
        finished=is_gateway,
        done_already=["the name belongs to broker localhost"],
    ),
    "issue-operator": Scenario(
        ["issue-operator", "alice", "--out", "@/out"],
        finished=lambda root: is_issued(root, "alice", "out/alice.pem"),
        done_already=["the name belongs to service alice"],
    ),
    "issue-operator --renew": Scenario(
        ["issue-operator", "alice", "--renew", "--out", "@/out"],
        prepare=lambda root: issue_operator(station(root), "alice", root / "out"),
        finished=lambda root: is_issued(root, "alice", "out/alice.pem"),
    ),
    "revoke": Scenario(["revoke", "sensor-1", "--reason", "lost"], prepare=with_devices, finished=is_revoked),
    "revoke, a gateway away": Scenario(
        ["revoke", "sensor-1", "--reason", "lost", "--timeout", "0.05"],
        prepare=with_devices_and_gateway,
        finished=is_revoked,
        code=1,
    ),
    "revoke --cert-serial": Scenario(
        ["revoke", "--cert-serial", "5a" * 16, "--reason", "lost"], finished=all_listed
    ),
    "crl": Scenario(["crl"], finished=lambda root: crl_number_of(root) >= 2),
    "crl --root": Scenario(["crl", "--root"]),
    "crl serve": Scenario(
        ["crl", "serve", "--every-hours", "0.0001", "--timeout", "0.05"],
        prepare=with_one_replaced,
        finished=is_served,
    ),
    "renew": Scenario(
        ["renew", "sensor-1", "--broker", "localhost:1", "--identity", "@/out/renewd.pem"],
        prepare=with_renewal_service,
        finished=all_listed,
        code=4,
    ),
    "ca detach-root": Scenario(
        ["ca", "detach-root", "--to", "@/medium", "--same-disk"], prepare=with_medium, finished=is_detached
    ),
    "gateway add": Scenario(
        ["gateway", "add", "gw-1", "--path", "/nowhere/crl.pem"],
        finished=lambda root: has_gateways(root, 1),
        done_already=["there is one of that name"],
    ),
    "gateway remove": Scenario(
        ["gateway", "remove", "gw-1"],
        prepare=with_gateway,
        finished=lambda root: has_gateways(root, 0),
        done_already=["there is none of that name"],
    ),
    "upstream add": Scenario(
        ["upstream", "add", "cloud", "--host", "localhost", "--operator", "@/out/alice.pem"],
        prepare=lambda root: issue_operator(station(root), "alice", root / "out"),
        finished=lambda root: has_upstreams(root, 1),
        done_already=["there is one of that name"],
    ),
    "upstream remove": Scenario(
        ["upstream", "remove", "cloud"],
        prepare=with_upstream,
        finished=lambda root: has_upstreams(root, 0),
        done_already=["there is none of that name"],
    ),
    "policy publish": Scenario(
        ["policy", "publish", "@/policy.toml"], prepare=with_policy, finished=is_published, code=1
    ),
    "batch open": Scenario(
        ["batch", "open", "W47"],
        finished=lambda root: batch_is(root, is_open=True),
        done_already=["W47 is open"],
    ),
    "batch close": Scenario(
        ["batch", "close"],
        prepare=with_batch,
        finished=lambda root: batch_is(root, is_open=False),
        done_already=["none is open"],
    ),
    "quarantine clear": Scenario(
        ["quarantine", "clear", bytes(8).hex(), "--reason", "reset at the bench"],
        prepare=with_quarantine,
        finished=is_cleared,
        done_already=["it is not in quarantine"],
    ),
    "label": Scenario(["label", "sensor-1", "--out", "@/labels"], prepare=with_devices, finished=has_labels),
    "backup": Scenario(["backup", "@/new.age"], finished=has_backup, done_already=["it is there already"]),
    "restore": Scenario(
        ["restore", "@/backup.age", "--to", "@/restored", "--crl", "@/gateway.crl"],
        prepare=with_backup,
        finished=is_restored,
        done_already=["there is something already"],
    ),
    "restore --crl": Scenario(
        ["restore", "--crl", "@/gateway.crl"], prepare=with_foreign_crl, finished=is_revoked
    ),
    "audit export": Scenario(["audit", "export", "--out", "@/log.jsonl"], finished=has_log),
    "audit checkpoint": Scenario(
        ["audit", "checkpoint", "--out", "@/checkpoint.pem"],
        finished=has_checkpoint,
        done_already=["it is there already"],
    ),
    "ca lost": Scenario(["ca", "lost", CURRENT_CA], finished=is_lost),
    "ca export": Scenario(["ca", "export", "root", "--out", "@/ca.pem"], finished=has_roots),
    "ca passphrase": Scenario(["ca", "passphrase", "root"], finished=has_new_passphrase),
    "ca rollover start issuing": Scenario(
        ["ca", "rollover", "start", "issuing"], finished=lambda root: cas_are(root, "current", "new")
    ),
    **token_scenarios(),
    "ca rollover start root": Scenario(
        ["ca", "rollover", "start", "root"], finished=lambda root: cas_are(root, "current", "new")
    ),
    "ca rollover activate": Scenario(
        ["ca", "rollover", "activate", "--force"],
        prepare=with_next_ca,
        finished=lambda root: cas_are(root, "current", "old"),
        done_already=["none was started"],
    ),
    "ca rollover activate --brokers": Scenario(
        ["ca", "rollover", "activate", "--brokers"],
        prepare=with_next_root,
        finished=lambda root: cas_are(root, "current", "old"),
    ),
    "ca rollover retire": Scenario(
        ["ca", "rollover", "retire", "issuing"],
        prepare=with_old_ca,
        finished=lambda root: cas_are(root, "current"),
        done_already=["there is none"],
    ),
    "doctor": Scenario(["doctor", "--offline"], prepare=with_devices, code=1),
    "registry migrate": Scenario(
        ["registry", "migrate", SQLITE],
        prepare=with_devices,
        finished=lambda root: is_moved(root, SQLITE),
        done_already=["that is where it is"],
    ),
    "registry migrate, back": Scenario(
        ["registry", "migrate", "tinydb"],
        prepare=with_devices,
        finished=lambda root: is_moved(root, ""),
        done_already=["that is where it is"],
        registry=SQLITE,
    ),
    "registry migrate, to another database": Scenario(
        ["registry", "migrate", OTHER_SQLITE],
        prepare=with_devices,
        finished=lambda root: is_moved(root, OTHER_SQLITE),
        done_already=["that is where it is"],
        registry=SQLITE,
    ),
    "init --registry": Scenario(
        ["init", "--registry", SQLITE], founds=False, done_already=["there is something already"]
    ),
}
OFTEN = ("issue-operator", "revoke", "batch close", "restore")
"""What is killed on SQLite, too, where there is little time; the whole proof does it with everything."""


def chosen(kills: int) -> dict[str, Scenario]:
    """Return the scenarios for so many kills each."""
    on_sqlite = [
        name
        for name, scenario in SCENARIOS.items()
        if scenario.founds and not scenario.registry and SQLITE not in scenario.words
    ]
    names = OFTEN if kills else on_sqlite
    return SCENARIOS | {f"{name}, on SQLite": replace(SCENARIOS[name], registry=SQLITE) for name in names}


def run_here(root: Path, words: Sequence[str]) -> tuple[int, str]:
    """Run a command in this process; return its exit code and what it said."""
    words = [word.replace("@", str(root)) for word in words]
    if CURRENT_CA in words:
        words[words.index(CURRENT_CA)] = station(root).cas.for_clients.short
    if not (words[0] == "restore" and "--to" in words) and "--verify" not in words:
        words += ["--station", str(root / "station")]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = run(parser(), words)
    return code, said.getvalue()
