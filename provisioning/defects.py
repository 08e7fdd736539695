"""What is said of a defect where it must not be the end of a service."""

from __future__ import annotations

from pathlib import Path
from traceback import extract_tb


def described(defect: Exception) -> str:
    """Return its kind and where it is, and not what it says: that may quote what nobody is to read."""
    place = extract_tb(defect.__traceback__)[-1]
    return f"{type(defect).__name__} at {Path(place.filename).name}:{place.lineno}"
