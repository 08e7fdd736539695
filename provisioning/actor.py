"""Who is at work at a station, for the audit log.

From the system, not from the environment, which anybody sets. Who logged in stays known to it across sudo and su,
where it keeps account of logins at all.
"""

from __future__ import annotations

import os
import pwd
import socket
from pathlib import Path
from typing import Final

_LOGIN_USER: Final = Path("/proc/self/loginuid")
_NOBODY: Final = 0xFFFFFFFF
"""Of a process that no login led to."""


def actor() -> str:
    """Return `user@host`; `person/user@host` after a change of user."""
    user, person = os.getuid(), _login_user()
    who = _user_name(user) if person is None or person == user else f"{_user_name(person)}/{_user_name(user)}"
    return f"{who}@{socket.gethostname()}"


def _login_user() -> int | None:
    try:
        number = int(_LOGIN_USER.read_text())
    except (OSError, ValueError):
        return None
    return None if number == _NOBODY else number


def _user_name(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:  # a container's user may have no name
        return str(number)
