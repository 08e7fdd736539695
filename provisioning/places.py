"""Where a station is, and what its command takes from the environment: what is known before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

FOLDER_VARIABLE: Final = "BIRTHMARK_STATION"
PASSPHRASE_VARIABLE: Final = "BIRTHMARK_PASSPHRASE"  # noqa: S105 - its name alone
KEYS_FOLDER: Final = "keys"
ISSUING_FILE: Final = "issuing.pem"


def default_folder() -> Path:
    """Return the station's folder when none is named: BIRTHMARK_STATION, else one under XDG_DATA_HOME."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    data_home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(data_home) / "birthmark" / "station"
