"""`birthmark-broker policy check | explain | diff | test`: what a policy says, before it is live.

The answers come from the very function that the broker asks (`policy.Rights`).
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from birthmark.broker.config import read_settings
from birthmark.broker.fleet.policy import kept_policy, policy_in_force
from birthmark.broker.policy import ID
from birthmark.broker.policy_diff import changes, warnings
from birthmark.broker.policy_file import read_policy
from birthmark.broker.toml_file import Table, read_toml
from birthmark.device.console import Parser, command
from birthmark.device.errors import IdentityError, PolicyError
from birthmark.device.escape import escaped
from birthmark.device.identity import DeviceId, Role
from birthmark.device.topics import FLEET_POLICY

if TYPE_CHECKING:
    import argparse

    from birthmark.broker.policy import Decision, Policy
    from birthmark.device.console import Console

DEFAULT_ROLE = "sensor"
"""What the station signs into a device's certificate unless it is told otherwise."""
_ACTIONS = ("publish", "subscribe", "receive")
_EXAMPLES = """
birthmark-broker policy check policy.toml
birthmark-broker policy explain sensor-17 publish devices/sensor-17/telemetry/temperature
birthmark-broker policy explain alice subscribe 'devices/#' --role operator
birthmark-broker policy diff policy.toml new-policy.toml
birthmark-broker policy test policy-tests.toml
"""
_CHECK_EXAMPLES = "birthmark-broker policy check\nbirthmark-broker policy check new-policy.toml --json"
_SHOW_EXAMPLES = """
birthmark-broker policy show
birthmark-broker policy show --text --config /etc/birthmark/broker.toml > policy.toml
"""
_EXPLAIN_EXAMPLES = """
birthmark-broker policy explain sensor-17 publish devices/sensor-17/telemetry/temperature
birthmark-broker policy explain sensor-17 subscribe 'devices/+/commands/#'
birthmark-broker policy explain alice subscribe 'devices/#' --role operator --policy new-policy.toml
"""
_TEST_EXAMPLES = """
birthmark-broker policy test policy-tests.toml
  # [[test]]
  # cn = "sensor-17"
  # ou = "sensor"                                (the default)
  # publish = "devices/sensor-17/telemetry/x"    (or subscribe, or receive)
  # allowed = true
"""


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the `policy` commands."""
    summary = "check, explain, compare or test a policy"
    group = commands.add_parser("policy", help=summary, description=summary, examples=_EXAMPLES)
    actions: argparse._SubParsersAction[Parser] = group.add_subparsers(
        title="actions", metavar="ACTION", required=True
    )

    check = command(actions, "check", _check, "read a policy as the broker would", _CHECK_EXAMPLES)
    check.add_argument("file", nargs="?", type=Path, metavar="FILE", help="default: the broker's own")
    _add_config(check)

    show = command(actions, "show", _show, "say which policy is in force, and its version", _SHOW_EXAMPLES)
    show.add_argument("--text", action="store_true", help="print the policy itself")
    show.add_argument("--config", type=Path, default=Path("broker.toml"), metavar="FILE", help="broker.toml")

    explain = command(actions, "explain", _explain, "say what one identity may do, and why", _EXPLAIN_EXAMPLES)
    explain.add_argument("cn", metavar="CN", help="the identity's CN")
    explain.add_argument("action", choices=_ACTIONS, help="what it asks for")
    explain.add_argument("topic", metavar="TOPIC", help="a topic; with subscribe, a topic filter")
    explain.add_argument("--role", default=DEFAULT_ROLE, help=f"its certificate's OU (default: {DEFAULT_ROLE})")
    _add_policy(explain)

    diff = command(actions, "diff", _diff, "say what changes from one policy to another", _EXAMPLES)
    diff.add_argument("old", type=Path, metavar="OLD", help="the policy as it is")
    diff.add_argument("new", type=Path, metavar="NEW", help="the policy as it would be")

    test = command(actions, "test", _test, "hold a policy against a file of expectations", _TEST_EXAMPLES)
    test.add_argument("file", type=Path, metavar="FILE", help="TOML with [[test]] tables")
    _add_policy(test)


def _add_config(parser: Parser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="the broker.toml that names the policy")


def _add_policy(parser: Parser) -> None:
    parser.add_argument("--policy", type=Path, metavar="FILE", help="default: the broker's own")
    _add_config(parser)


def _policy_of(given: Path | None, config: Path | None) -> tuple[Policy, str, int]:
    """Return a policy, its name and its version: of the file given, else the one that the broker goes by."""
    if given is not None:
        return read_policy(given), str(given), 0
    if config is not None or Path("broker.toml").exists():
        settings = read_settings(config or Path("broker.toml"))
        policy, version = policy_in_force(settings)
        return policy, FLEET_POLICY if version else str(settings.policy_path), version
    path = Path("policy.toml")
    return read_policy(path), str(path), 0


def _check(arguments: argparse.Namespace, console: Console) -> None:
    policy, where, version = _policy_of(arguments.file, arguments.config)
    found = warnings(policy)
    record = {
        "file": where,
        "ok": True,
        "roles": [role.name for role in policy.roles],
        "assignments": len(policy.assignments),
        "sha256": policy.sha256,
        "version": version,
        "warnings": found,
    }
    called = f"{where}, version {version}" if version else where
    roles, assignments = len(policy.roles), len(policy.assignments)
    console.emit(record, f"{called}: ok, {roles} roles, {assignments} assignments, sha256 {policy.sha256[:12]}")
    for warning in found:
        if not console.as_json:
            console.warn(warning)


def _show(arguments: argparse.Namespace, console: Console) -> None:
    settings = read_settings(arguments.config)
    signed = kept_policy(settings)
    if signed is None:
        policy, content = read_policy(settings.policy_path), settings.policy_path.read_bytes()
        record = {"source": str(settings.policy_path), "version": 0, "sha256": policy.sha256}
        said = f"in force: {settings.policy_path}, sha256 {policy.sha256[:12]}; no policy of a fleet has come"
    else:
        content, issued_at = signed.text, datetime.fromtimestamp(signed.issued_at, UTC)
        record = {
            "source": FLEET_POLICY,
            "version": signed.version,
            "sha256": signed.text_sha256,
            "issued_at": f"{issued_at:%FT%TZ}",
            "issuer": signed.issuer,
        }
        said = (
            f"in force: the fleet's policy, version {signed.version}, of {issued_at:%F %T} UTC, signed by the CA"
            f" {signed.issuer}, sha256 {signed.text_sha256[:12]}; {settings.policy_path} has no say"
        )
    if arguments.text:
        text = content.decode("utf-8")
        record, said = record | {"policy": text}, text.removesuffix("\n")
    console.emit(record, said)


def _explain(arguments: argparse.Namespace, console: Console) -> None:
    policy, _, _ = _policy_of(arguments.policy, arguments.config)
    device_id, role = DeviceId(arguments.cn), Role(arguments.role)
    decision = _decision(policy, device_id, role, arguments.action, arguments.topic)
    record = {
        "cn": str(device_id),
        "ou": str(role),
        "action": arguments.action,
        "topic": arguments.topic,
        "allowed": decision.allowed,
        "role": policy.rights(device_id, role).role,
        "rule": decision.rule,
    }
    verdict = console.paint("allowed", "green") if decision.allowed else console.paint("denied", "red")
    shown = f"{device_id} {arguments.action} {escaped(arguments.topic)}"
    lines = [f"{verdict}: {shown}", f"  because: {decision.rule}"]
    if not decision.allowed and (may := _may(policy, device_id, role, arguments.action)):
        lines.append(f"  it may {arguments.action}: {', '.join(may)}")
    console.emit(record, "\n".join(lines))


def _may(policy: Policy, device_id: DeviceId, role: Role, action: str) -> list[str]:
    """What the identity's role may publish, or subscribe and thus receive, with its own id filled in."""
    rights = policy.rights(device_id, role)
    rules = next((rules for rules in policy.roles if rules.name == rights.role), None)
    if rules is None:
        return []
    entries = rules.publish if action == "publish" else rules.subscribe
    return [entry.replace(ID, str(device_id)) for entry in entries]


def _decision(policy: Policy, device_id: DeviceId, role: Role, action: str, topic: str) -> Decision:
    rights = policy.rights(device_id, role)
    if action == "publish":
        return rights.publish(topic)
    if action == "subscribe":
        return rights.subscribe(topic)
    return rights.receive(topic)


def _diff(arguments: argparse.Namespace, console: Console) -> None:
    found = changes(read_policy(arguments.old), read_policy(arguments.new))
    for change in found:
        record = {"sign": change.sign, "where": change.where, "what": change.what, "effect": change.effect}
        console.emit(record, console.paint(str(change), "green" if change.sign == "+" else "red"))
    if not found:
        console.say("no difference in what anybody may do")


def _test(arguments: argparse.Namespace, console: Console) -> int:
    policy, _, _ = _policy_of(arguments.policy, arguments.config)
    root, _ = read_toml(arguments.file, PolicyError)
    root.only(("test",))
    cases = root.tables("test")
    if not cases:
        raise root.complain(cause="it has no [[test]] tables", hint="see `birthmark-broker policy test --help`")
    failures = 0
    for number, case in enumerate(cases, start=1):
        device_id, role, action, topic, expected = _expectation(case)
        decision = _decision(policy, device_id, role, action, topic)
        passed = decision.allowed is expected
        failures += not passed
        record = {
            "test": number,
            "passed": passed,
            "cn": str(device_id),
            "ou": str(role),
            "action": action,
            "topic": topic,
            "allowed": decision.allowed,
            "rule": decision.rule,
        }
        said = "allowed" if decision.allowed else "denied"
        mark = console.paint("pass", "green") if passed else console.paint("FAIL", "red")
        if console.as_json or not passed:
            console.emit(
                record, f"{mark} [{number}] {device_id} {action} {escaped(topic)}: {said}, {decision.rule}"
            )
    console.say(f"{len(cases) - failures} passed, {failures} failed")
    return 1 if failures else 0


def _expectation(case: Table) -> tuple[DeviceId, Role, str, str, bool]:
    case.only(("cn", "ou", "allowed", *_ACTIONS))
    asked = [action for action in _ACTIONS if action in case]
    if len(asked) != 1:
        raise case.complain(cause="it needs one of publish, subscribe and receive")
    if "allowed" not in case:
        raise case.complain(cause="the key 'allowed' is missing")
    try:
        device_id, role = DeviceId(case.text("cn")), Role(case.text("ou", DEFAULT_ROLE))
    except IdentityError as error:
        raise case.complain(cause=error.message, hint=error.hint) from error
    return device_id, role, asked[0], case.text(asked[0]), case.boolean("allowed", default=False)
