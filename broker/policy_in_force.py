"""The policy that a gateway goes by: its fleet's, or else that of `policy.toml`.

Rules (docs/adr/0026-one-policy-for-a-fleet.md):

- While the fleet has one (`fleet/policy.py`), `policy.toml` has no say, and need not even be there. A change of it
  is an alarm: somebody expects an effect.
- Without one, a change of `policy.toml` applies at once, and one that cannot be used changes nothing.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from typing import TYPE_CHECKING

from birthmark.broker.alarms import Alarm
from birthmark.broker.fleet.policy import FleetPolicy
from birthmark.broker.policy_file import read_policy

if TYPE_CHECKING:
    from pathlib import Path

    from birthmark.broker.config import BrokerSettings
    from birthmark.broker.fleet.policy import PolicyInstallation
    from birthmark.broker.policy import Policy
    from birthmark.broker.trust import Trust

_log = logging.getLogger(__name__)


class PolicyInForce:
    """One policy, and where it is from. Its methods may run in another thread.

    Args:
        settings: name the files.
        trust: the trusted issuing CAs.

    Raises:
        BirthmarkError: there is no policy that can be used.
    """

    def __init__(self, settings: BrokerSettings, trust: Trust) -> None:
        self._path = settings.policy_path
        self.fleet = FleetPolicy.open(settings.data_folder, trust)
        in_force = self.fleet.in_force
        self.policy: Policy = in_force.policy if in_force else read_policy(self._path)
        self._passed_over = _sha256(self._path)
        """Of `policy.toml` as it was when the fleet's policy had its say first."""
        self._is_edited = False
        self._taking = threading.Lock()

    @property
    def version(self) -> int:
        """Of the fleet's policy in force; 0: it is that of `policy.toml`."""
        return self.fleet.version

    def take_file(self) -> bool:
        """Take up `policy.toml`; return whether another policy is in force now.

        Raises:
            PolicyError: it cannot be used.
        """
        with self._taking:
            if self.fleet.in_force is not None:
                self._look_for_edit()
                return False
            policy = read_policy(self._path)
            if policy.sha256 == self.policy.sha256:
                return False
            self.policy = policy
            return True

    def install(self, payload: bytes, trust: Trust) -> PolicyInstallation:
        """Judge a policy of the fleet, and go by it if it is newer: as `FleetPolicy.install`."""
        with self._taking:
            answer = self.fleet.install(payload, trust)
            if answer.outcome == "installed" and self.fleet.in_force is not None:
                self.policy = self.fleet.in_force.policy
                self._passed_over, self._is_edited = _sha256(self._path), False
            return answer

    def alarms(self, trust: Trust) -> list[Alarm]:
        """Return what about it needs a person."""
        found = self.fleet.alarms(trust)
        if self._is_edited:
            message = f"{self._path} was changed and has no say: the fleet's policy, version {self.version}, does"
            hint = "`birthmark policy publish FILE` at the station changes it for the fleet; or take this one back"
            found.append(Alarm("policy-local", message, hint))
        return found

    def _look_for_edit(self) -> None:
        now = _sha256(self._path)
        self._is_edited = now is not None and now not in (self._passed_over, self.policy.sha256)
        if self._is_edited:
            _log.error(
                "%s was changed and changes nothing: the fleet's policy, version %s, stays in force",
                self._path,
                self.version,
                extra={"fields": {"event": "policy_local", "path": str(self._path)}},
            )


def _sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
