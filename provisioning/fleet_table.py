"""One row a gateway: what it goes by, how far that is behind, and what else is to be said of it. Pure.

Rules:

- What a gateway says counts, and of one that is away what is known of it (`gateway_receipts.completed`).
- Behind is who goes by an older CRL than the station's, of a CA that has issued, or by an older version of the
  fleet's policy. One that is reached by a path takes no policy, and is not behind for that.
- What a gateway says of itself takes a bounded part of the table, whatever it says.
- A status is half a minute old at most, and on the way as long as a message: a clock within that is right.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from birthmark.device.escape import escaped
from birthmark.provisioning.cas import SHORT

if TYPE_CHECKING:
    from collections.abc import Mapping

    from birthmark.device.messages import UpstreamState
    from birthmark.provisioning.gateway_look import Look
    from birthmark.provisioning.gateway_receipts import Standing

STATUS_AGE_S: Final = 35.0
AHEAD_S: Final = 5.0
_UNITS: Final = ((86400, "d"), (3600, "h"), (60, "min"))
MOST_UNDER_WAY: Final = 20
"""Messages on their way up that are not worth a word: what a gateway says of itself goes that way, too."""
MOST_COUNTED: Final = 99_999
MOST_SHOWN: Final = 16
"""Alarms and upstreams of one gateway; there are fewer kinds, and nobody has so many."""
MOST_CHARACTERS: Final = 64
"""Of each of their names."""
COLUMNS: Final = ("gateway", "state", "crl", "policy", "clock", "sessions", "last_receipt", "alarms", "upstreams")


@dataclass(frozen=True, slots=True)
class Aims:
    """What every gateway should go by."""

    crls: Mapping[str, int]
    """The station's CRL numbers, of those CAs that have issued, by key identifier; the one in charge first."""
    policy_version: int
    """Of the fleet's policy (0: none was published)."""


@dataclass(frozen=True, slots=True)
class GatewayRow:
    """What is known of one gateway."""

    look: Look
    standing: Standing
    aims: Aims

    @property
    def state(self) -> str:
        """Return `online`, `away`, `stopped`, `by path` or `unknown`."""
        if self.look.status is not None:
            away = "away" if self.look.via else "stopped"
            return "online" if self.look.status.online else away
        return "unknown" if self.look.cause else "by path"

    @property
    def crls(self) -> dict[str, int | None]:
        """Return the number of the CRL that it goes by, of each CA that has issued; None where it has none."""
        said = dict(self.look.crl_numbers)
        return {key_id: said.get(key_id) for key_id in self.aims.crls}

    @property
    def crls_behind(self) -> dict[str, int]:
        """Return by how many numbers each CRL is behind; negative for one that is newer than the station's."""
        return {key_id: self.aims.crls[key_id] - (number or 0) for key_id, number in self.crls.items()}

    @property
    def policy_version(self) -> int | None:
        """Return the version of the fleet's policy that it goes by (0: a policy of its own); None: not known."""
        return None if self.look.status is None else self.look.status.policy_version

    @property
    def policy_behind(self) -> int | None:
        """Return by how many versions that is behind."""
        version = self.policy_version
        return None if version is None else self.aims.policy_version - version

    @property
    def clock_difference_s(self) -> float | None:
        """Return how far its clock is before ours, less for the age of what it said; None: not known."""
        status = self.look.status
        return status.clock - self.look.looked_at_s if status is not None and status.online else None

    @property
    def is_well(self) -> bool:
        """Whether it is there, and behind in nothing."""
        return (
            self.state in ("online", "by path") and not any(self.crls_behind.values()) and not self.policy_behind
        )

    def shown(self) -> dict[str, Any]:
        """Return it for people."""
        status, heard_at = self.look.status, self.standing.heard_at
        state = self.state
        if state in ("away", "stopped") and heard_at is not None:
            state = f"{state} since {heard_at:%Y-%m-%d %H:%M}"
        return {
            "gateway": self.look.name,
            "state": state,
            "crl": _numbers(self.crls, self.crls_behind),
            "policy": _version(self.policy_version, self.policy_behind),
            "clock": _clock(self.clock_difference_s),
            "sessions": status.sessions if status is not None and status.online else None,
            "last_receipt": _moment(self._last_receipt()),
            "alarms": [escaped(code, MOST_CHARACTERS) for code in status.alarms[:MOST_SHOWN]] if status else [],
            "upstreams": [_upstream(each) for each in status.upstreams[:MOST_SHOWN]]
            if status and status.online
            else [],
        }

    def record(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        status = self.look.status
        return {
            "gateway": self.look.name,
            "reached_by": self.look.reached_by,
            "state": self.state,
            "cause": self.look.cause or None,
            "last_heard": _moment(self.standing.heard_at),
            "crls": {
                key_id: {"number": number, "behind": self.crls_behind[key_id]}
                for key_id, number in self.crls.items()
            },
            "policy_version": self.policy_version,
            "policy_behind": self.policy_behind,
            "clock_difference_s": self.clock_difference_s,
            "sessions": status.sessions if status is not None and status.online else None,
            "last_receipt": _moment(self._last_receipt()),
            "alarms": list(status.alarms) if status is not None else [],
            "upstreams": [_upstream_record(each) for each in status.upstreams] if status is not None else [],
            "trouble": self.standing.trouble or None,
            "trouble_since": _moment(self.standing.trouble_since),
            "well": self.is_well,
        }

    def _last_receipt(self) -> datetime | None:
        return max((one.at for one in self.standing.confirmed.values()), default=None)


def _numbers(crls: Mapping[str, int | None], behind: Mapping[str, int]) -> str:
    parts = []
    for key_id, number in crls.items():
        text = "none" if number is None else str(number)
        if len(crls) > 1:
            text = f"{key_id[:SHORT]}:{text}"
        parts.append(text + _lag(behind[key_id]))
    return ", ".join(parts) or "-"


def _version(version: int | None, behind: int | None) -> str | None:
    if version is None:
        return None
    return ("own" if version == 0 else str(version)) + _lag(behind or 0)


def _lag(behind: int) -> str:
    if behind == 0:
        return ""
    if behind > MOST_COUNTED:  # numbers jump with a restore
        return " (behind)"
    return f" ({behind} behind)" if behind > 0 else " (newer than ours)"


def _clock(difference_s: float | None) -> str | None:
    if difference_s is None:
        return None
    if -STATUS_AGE_S <= difference_s <= AHEAD_S:
        return "right"
    seconds = abs(difference_s)
    unit_s, unit = next((each for each in _UNITS if seconds >= 2 * each[0]), (1, "s"))
    return f"{_counted(round(seconds / unit_s))} {unit} {'ahead' if difference_s > 0 else 'behind'}"


def _counted(number: int, most: int = MOST_COUNTED) -> str:
    return str(number) if number <= most else f"over {most}"


def _upstream(state: UpstreamState) -> str:
    name, spooled = escaped(state.name, MOST_CHARACTERS), _counted(state.spooled, 10**12)
    if state.connected:
        return f"{name}: up" + (f", {spooled} to go" if state.spooled > MOST_UNDER_WAY else "")
    return f"{name}: down, {spooled} to go"


def _upstream_record(state: UpstreamState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in type(state).__slots__}


def _moment(moment: datetime | None) -> str | None:
    return None if moment is None else moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
