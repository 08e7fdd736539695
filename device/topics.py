"""The topic scheme: who says what where (MQTT 3.1.1 §4.7).

Up:    devices/{id}/telemetry/...  devices/{id}/status  devices/{id}/replies/...
Down:  devices/{id}/commands/...   fleet/announcements/...
Both:  devices/{id}/renewal/request|answer   devices/{id}/time/request|answer
Gateway: gateway/{name}/crl in; gateway/{name}/receipts, gateway/{name}/policy-receipts, gateway/{name}/status,
         gateway/{name}/seen/{id} and gateway/{name}/crl-in-force/{issuer} out
Fleet:   fleet/crl/{issuer} and fleet/policy, retained, for every gateway that is one of a fleet
`$...` is the broker's alone, and so is what a gateway says (out).
"""

from __future__ import annotations

from birthmark.device.errors import IdentityError
from birthmark.device.escape import quoted
from birthmark.device.identity import BrokerName, DeviceId

ANNOUNCEMENTS = "fleet/announcements/#"
TIME_REQUESTS = "devices/+/time/request"
"""What a gateway takes for itself, and answers."""
RENEWAL_REQUESTS = "devices/+/renewal/request"
"""What the renewal service listens to."""
FLEET_POLICY = "fleet/policy"
"""Where the policy of a fleet is retained (`fleet_policy.SignedPolicy`)."""
SAID_BY_GATEWAYS = ("receipts", "policy-receipts", "status", "seen", "crl-in-force")
"""The third level of what a gateway says of itself."""


def telemetry(device_id: DeviceId, name: str) -> str:
    """Where a device publishes one kind of reading."""
    return f"devices/{device_id}/telemetry/{name}"


def status(device_id: DeviceId) -> str:
    """Where a device's presence is retained, and its last will lands."""
    return f"devices/{device_id}/status"


def command(device_id: DeviceId, name: str) -> str:
    """Where a device listens for one command."""
    return f"devices/{device_id}/commands/{name}"


def commands(device_id: DeviceId) -> str:
    """The filter for every command to one device."""
    return f"devices/{device_id}/commands/#"


def reply(device_id: DeviceId, name: str) -> str:
    """Where a device answers one command; for one that asks for it, see `requests.reply_name`."""
    return f"devices/{device_id}/replies/{name}"


def renewal_request(device_id: DeviceId) -> str:
    """Where a device asks for a new certificate, and confirms that it has one."""
    return f"devices/{device_id}/renewal/request"


def renewal_answer(device_id: DeviceId) -> str:
    """Where the renewal service answers a device, or asks it to renew."""
    return f"devices/{device_id}/renewal/answer"


def time_request(device_id: DeviceId) -> str:
    """Where a device asks its gateway for the time."""
    return f"devices/{device_id}/time/request"


def time_answer(device_id: DeviceId) -> str:
    """Where the gateway tells a device the time."""
    return f"devices/{device_id}/time/answer"


def gateway_crl(name: BrokerName) -> str:
    """Where a gateway takes a new CRL from (DER)."""
    return f"gateway/{name}/crl"


def is_said_by_gateway(topic: str) -> bool:
    """Whether a topic is one on which a gateway says something of itself: for the broker alone."""
    levels = topic.split("/", 3)
    return len(levels) > 2 and levels[0] == "gateway" and levels[2] in SAID_BY_GATEWAYS


def is_of_gateway(topic: str, name: BrokerName | str) -> bool:
    """Whether a topic, or a filter, lies below `gateway/{name}/`; names are one, however their case."""
    levels = topic.split("/", 2)
    return len(levels) > 2 and levels[0] == "gateway" and levels[1].lower() == str(name).lower()


def gateway_receipts(name: BrokerName) -> str:
    """Where a gateway says what it did with a CRL."""
    return f"gateway/{name}/receipts"


def gateway_policy_receipts(name: BrokerName) -> str:
    """Where a gateway says what it did with a policy of its fleet."""
    return f"gateway/{name}/policy-receipts"


def gateway_status(name: BrokerName) -> str:
    """Where a gateway's own state is retained."""
    return f"gateway/{name}/status"


def gateway_seen(name: BrokerName, who: str) -> str:
    """Where a gateway retains when and from where it last saw one identity; `+` for all of them."""
    return f"gateway/{name}/seen/{who}"


def sighting_of(topic: str) -> tuple[BrokerName, DeviceId]:
    """Return which gateway speaks of whom on a topic `gateway/{name}/seen/{id}`; raises `IdentityError`."""
    levels = topic.split("/")
    if len(levels) != 4 or (levels[0], levels[2]) != ("gateway", "seen"):
        raise IdentityError(f"could not read {quoted(topic, 80)}: it is no topic of a sighting")
    return BrokerName(levels[1]), DeviceId(levels[3])


def gateway_crl_in_force(name: BrokerName, issuer: str) -> str:
    """Where a gateway retains the CRL (DER) that it goes by for one issuing CA; `+` for all of them."""
    return f"gateway/{name}/crl-in-force/{issuer}"


def fleet_crl(issuer: str) -> str:
    """Where the CRL (DER) of one issuing CA is retained for a whole fleet; `+` for all of them."""
    return f"fleet/crl/{issuer}"
