"""`birthmark policy publish | show`: the policy of every gateway of a fleet."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from birthmark.device.console import Console, Parser, command
from birthmark.device.errors import PolicyError
from birthmark.provisioning.cas import SHORT
from birthmark.provisioning.crl_delivery import warn_of_missed
from birthmark.provisioning.delivery import Outcome
from birthmark.provisioning.fleet_policy import current_policy, read_policy_text, sign_policy
from birthmark.provisioning.options import (
    add_passphrase_option,
    add_station_option,
    add_timeout_option,
    open_station,
)
from birthmark.provisioning.policy_delivery import deliver_policy

if TYPE_CHECKING:
    import argparse

    from birthmark.device.fleet_policy import SignedPolicy
    from birthmark.provisioning.station import Station


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "policy",
        help="sign a policy and bring it to every gateway",
        description="sign a policy and bring it to every gateway",
        examples="birthmark policy publish policy.toml\nbirthmark policy show",
    )
    actions: argparse._SubParsersAction[Parser] = parser.add_subparsers(
        title="actions", metavar="ACTION", required=True
    )
    publish = command(
        actions,
        "publish",
        _publish,
        "sign a policy, or take the last one, and bring it to every gateway",
        """\
birthmark policy publish policy.toml
birthmark policy publish
birthmark policy publish policy.toml --timeout 60 --json""",
    )
    add_passphrase_option(publish)
    publish.add_argument(
        "file", metavar="FILE", nargs="?", type=Path, help="a policy.toml; without one the last is brought again"
    )
    add_timeout_option(publish)
    show = command(
        actions,
        "show",
        _show,
        "say which policy was published last",
        "birthmark policy show\nbirthmark policy show --text > policy.toml",
    )
    show.add_argument("--text", action="store_true", help="print the policy itself")
    for each in (publish, show):
        add_station_option(each)


def _publish(arguments: argparse.Namespace, console: Console) -> int:
    text = None if arguments.file is None else read_policy_text(arguments.file)
    station = open_station(arguments)
    policy, is_new = sign_policy(station, _last(station).text if text is None else text)
    deliveries = deliver_policy(station, policy, arguments.timeout)
    record = {
        **_record(policy),
        "newly": is_new,
        "gateways": [delivery.record() for delivery in deliveries],
    }
    again = "" if is_new else " (it was before)"
    head = f"version {policy.version} of the policy is signed{again}"
    console.emit(record, "\n".join([head, *(f"  {delivery.described()}" for delivery in deliveries)]))
    if not deliveries:
        console.warn("no gateway is configured: see `birthmark gateway add --help`")
    pending = [delivery.gateway for delivery in deliveries if delivery.outcome is not Outcome.DONE]
    if pending:
        console.warn(
            f"not every gateway goes by it ({', '.join(pending)}): one that is away takes it when it is back; "
            "`birthmark policy publish` tries again"
        )
    warn_of_missed(console, deliveries, "birthmark policy publish")
    return 1 if pending else 0


def _show(arguments: argparse.Namespace, console: Console) -> None:
    policy = _last(open_station(arguments))
    if arguments.text and not console.as_json:
        for line in policy.text.decode("utf-8").splitlines():
            console.emit_line(line)
        return
    console.facts(_record(policy) | ({"policy": policy.text.decode("utf-8")} if arguments.text else {}))


def _last(station: Station) -> SignedPolicy:
    with station.registry.view() as view:
        policy = current_policy(view)
    if policy is None:
        raise PolicyError(
            "could not find a policy of this station: none was published",
            hint="birthmark policy publish FILE; until then every gateway goes by its own policy.toml",
        )
    return policy


def _record(policy: SignedPolicy) -> dict[str, Any]:
    return {
        "version": policy.version,
        "issued_at": datetime.fromtimestamp(policy.issued_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "signed_by": policy.issuer[:SHORT],
        "sha256": policy.text_sha256,
    }
