"""The repository as files: what is tracked, and where it starts."""

from __future__ import annotations

import subprocess
from pathlib import Path

from support.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
PARTS = ("device", "broker", "provisioning", "firmware_sim")


def tracked() -> list[str]:
    """Return the tracked paths that exist, relative to the root, sorted."""
    listing = subprocess.run(
        # CI may read a clone that belongs to another user; git would refuse that.
        ["git", "-c", "safe.directory=*", "ls-files", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        timeout=PATIENCE_S,
    )
    paths = listing.stdout.decode().split("\0")
    return sorted(path for path in paths if path and (ROOT / path).is_file())
