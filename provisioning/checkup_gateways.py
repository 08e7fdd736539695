"""The checks of `birthmark doctor` that go by what gateways say: of themselves, and of whom they saw.

"Used from several addresses" means, of one certificate within `ADDRESS_WINDOW`: it came from one address, then
from another, and then from the first again, so that a copy and its original may be taking turns; or from
`MANY_ADDRESSES` different ones. IPv6 addresses count by their /64, since a host changes the rest by itself.
"""

from __future__ import annotations

import ipaddress
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from birthmark.device.escape import escaped
from birthmark.provisioning.checkup import Facts, Level, Remark
from birthmark.provisioning.checkup_census import NAMED, NEVER_AFTER, seen_serial

if TYPE_CHECKING:
    from collections.abc import Iterator

    from birthmark.device.messages import AddressSeen, Sighting
    from birthmark.provisioning.gateway_look import Look

ADDRESS_WINDOW: Final = timedelta(days=7)
MANY_ADDRESSES: Final = 4
LET_IN_MARGIN: Final = timedelta(minutes=2)
"""For clocks that differ, between a revocation and a connection after it."""


def check_gateways(facts: Facts) -> Iterator[Remark]:
    """A gateway that cannot be looked at, is off, or says that something is wrong."""
    for look in facts.gateways:
        if look.cause:
            hint = "see that it runs and can be reached; birthmark crl says more"
            yield Remark("gateways", Level.SOON, f"{look.name}: {escaped(look.cause)}", hint, (look.name,))
            continue
        if look.status is None:
            continue
        if not look.status.online:
            yield _absence(look, facts)
            continue
        alarms = ", ".join(escaped(alarm, 40) for alarm in look.status.alarms)
        if alarms:
            hint = "docs/operations.md says what each alarm means"
            yield Remark("gateways", Level.BROKEN, f"{look.name} has alarms: {alarms}", hint, (look.name,))
        if look.sightings is None:
            text = f"the policy of {look.name} keeps from its operator who connected there"
            if look.via:
                text = f"{look.via} does not tell who connected at {look.name}"
            hint = 'add "gateway/+/seen/+" to the operator\'s subscribe list in policy.toml'
            yield Remark("gateways", Level.NOTE, text, hint, (look.name,))


def _absence(look: Look, facts: Facts) -> Remark:
    heard_at = facts.last_heard.get(look.name)
    since = "" if heard_at is None else f" since {heard_at:%Y-%m-%d %H:%M}"
    if look.via:
        hint = "does it run? its log says why it has no link; the CRL and the policy wait for it there"
        return Remark("gateways", Level.SOON, f"{look.name} has no link to {look.via}{since}", hint, (look.name,))
    return Remark("gateways", Level.BROKEN, f"{look.name} was stopped{since}", "start it", (look.name,))


def check_upstreams(facts: Facts) -> Iterator[Remark]:
    """A gateway that says that one of its links is down."""
    for look in facts.gateways:
        for state in look.status.upstreams if look.status is not None and look.status.online else ():
            if not state.connected:
                reason = f": {escaped(state.reason)}" if state.reason else ""
                link = f"{look.name} has no link to {escaped(state.name, 64)}{reason}"
                text = f"{link}; {state.spooled} messages wait"
                yield Remark("upstreams", Level.SOON, text, "its log says more: docs/upstream.md", (look.name,))


def check_policy(facts: Facts) -> Iterator[Remark]:
    """The fleet's policy: signed by a CA that goes, or not the one that a gateway goes by."""
    ours = facts.policy
    if ours is not None and not any(ca.key_id == ours.issuer and ca.is_issuing for ca in facts.cas):
        text = f"version {ours.version} of the policy is signed by a CA that issues no more"
        yield Remark("policy", Level.SOON, text, "birthmark policy publish signs it anew")
    for look in facts.gateways:
        if look.status is None or (ours is None and not look.status.policy_version):
            continue
        version, current = look.status.policy_version, 0 if ours is None else ours.version
        if version < current:
            goes_by = f"version {version} of the policy" if version else "a policy of its own"
            text = f"{look.name} goes by {goes_by}, and {current} is current"
            yield Remark("policy", Level.SOON, text, "birthmark policy publish brings it", (look.name,))
        elif version > current:
            text = f"{look.name} goes by version {version} of the policy, and {current or 'none'} is ours"
            hint = "was this station restored? publish again, which gives a version above that one"
            yield Remark("policy", Level.BROKEN, text, hint, (look.name,))


def check_gateway_crls(facts: Facts) -> Iterator[Remark]:
    """A gateway that goes by an older CRL than the station's: what was revoked since gets in there."""
    for look in facts.gateways:
        held = dict(look.crl_numbers)
        for ca in facts.cas:
            if ca.is_root or ca.crl is None:
                continue
            number = held.get(ca.key_id)
            if number == ca.crl.number or (number is None and look.status is None):
                continue
            if number is None:
                text = f"{look.name} has no CRL of {ca.name}: it does not trust that CA"
                yield Remark("gateway-crls", Level.SOON, text, "bring it the CA's certificate", (look.name,))
            elif number < ca.crl.number:
                how = "confirmed CRL {} of {} last" if look.status is None else "goes by CRL {} of {}"
                text = f"{look.name} {how.format(number, ca.name)}, and {ca.crl.number} is current"
                yield Remark("gateway-crls", Level.BROKEN, text, "birthmark crl brings it", (look.name,))
            else:
                text = f"{look.name} goes by CRL {number} of {ca.name}, and {ca.crl.number} is ours"
                hint = (
                    "was this station restored? take it over: birthmark restore --crl FILE. "
                    "Or was another restored from its backup? then stop using this one"
                )
                yield Remark("gateway-crls", Level.BROKEN, text, hint, (look.name,))


def check_let_in(facts: Facts) -> Iterator[Remark]:
    """A certificate that was let in after its revocation."""
    for gateway, sighting in _sightings(facts):
        revoked_at = facts.census.revoked_at.get(seen_serial(sighting))
        if revoked_at is not None and sighting.last_seen > (revoked_at + LET_IN_MARGIN).timestamp():
            text = f"{gateway} let {_shown(sighting)} in after its revocation on {revoked_at:%Y-%m-%d %H:%M}"
            hint = "bring the CRL there at once: birthmark crl"
            yield Remark("let-in", Level.BROKEN, text, hint, (_shown(sighting),))


def check_unknown(facts: Facts) -> Iterator[Remark]:
    """A certificate that a gateway let in and that this registry does not know."""
    known = facts.census.names_by_serial
    strangers = {
        f"{_shown(sighting)} ({escaped(sighting.cert_serial, 40)})"
        for _, sighting in _sightings(facts)
        if known.get(seen_serial(sighting), "").lower() != sighting.id.lower()
    }
    names = sorted(strangers)
    if names:
        plural = "identity was" if len(names) == 1 else "identities were"
        text = f"{len(names)} {plural} let in with a certificate of our CA that this registry does not know"
        hint = "made after the backup this station is from? if not wanted: birthmark revoke --cert-serial HEX"
        yield Remark("unknown", Level.BROKEN, text, hint, tuple(names[:NAMED]))


def check_addresses(facts: Facts) -> Iterator[Remark]:
    """A certificate that is used from several addresses: a copy?"""
    since_s = (facts.now - ADDRESS_WINDOW).timestamp()
    used: dict[tuple[str, str], list[AddressSeen]] = {}
    for _, sighting in _sightings(facts):
        recent = [seen for seen in sighting.addresses if seen.last_seen >= since_s]
        used.setdefault((_shown(sighting), sighting.cert_serial), []).extend(recent)
    found: dict[str, str] = {}
    for (name, _), addresses in used.items():
        places = _places(addresses)
        if _take_turns(places) or len(places) >= MANY_ADDRESSES:
            found[name] = ", ".join(escaped(place, 50) for place in sorted(places)[:MANY_ADDRESSES])
    for name, where in sorted(found.items())[:NAMED]:
        text = f"the certificate of {name} is used from several addresses: {where}"
        hint = "does it move about? if not, its key was copied: birthmark revoke, and reflash it"
        yield Remark("addresses", Level.SOON, text, hint, (name,))
    if len(found) > NAMED:
        text = f"{len(found) - NAMED} more certificates are used from several addresses"
        yield Remark("addresses", Level.SOON, text, about=tuple(sorted(found)[NAMED : 2 * NAMED]))


def check_never_connected(facts: Facts) -> Iterator[Remark]:
    """Devices that were made a while ago and were never seen, where every gateway could be asked."""
    if not facts.gateways or any(look.sightings is None for look in facts.gateways):
        return
    never = facts.census.never_connected
    if never.count:
        plural = "device was" if never.count == 1 else "devices were"
        text = f"{never.count} {plural} made more than {NEVER_AFTER.days} days ago and never connected"
        hint = "in stock? if lost, revoke it: birthmark revoke ID --reason lost"
        yield Remark("never-connected", Level.NOTE, text, hint, tuple(never.names))


def _sightings(facts: Facts) -> Iterator[tuple[str, Sighting]]:
    for look in facts.gateways:
        for sighting in look.sightings or ():
            yield look.name, sighting


def _shown(sighting: Sighting) -> str:
    return escaped(sighting.id, 64)


def _places(addresses: list[AddressSeen]) -> dict[str, tuple[float, float]]:
    """Return the places that addresses stand for, each with its first and last time."""
    places: dict[str, tuple[float, float]] = {}
    for seen in addresses:
        place = _place(seen.address)
        first, last = places.get(place, (seen.first_seen, seen.last_seen))
        places[place] = (min(first, seen.first_seen), max(last, seen.last_seen))
    return places


def _place(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(ipaddress.ip_network((parsed, 64), strict=False)) if parsed.version == 6 else str(parsed)


def _take_turns(places: dict[str, tuple[float, float]]) -> bool:
    """Whether one place was used before another and again after it."""
    times = sorted(places.values())
    return any(later[0] < earlier[1] for earlier, later in pairwise(times))
