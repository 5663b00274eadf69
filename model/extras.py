"""Packages that an extra of the wheel brings: whether one is here, and the command that gets it.

Knows nothing of what they are for.
"""

from __future__ import annotations

import importlib.util


def why_missing(package: str, extra: str) -> str:
    """Say that a package is not installed, and with which extra it is; nothing if it is here."""
    if importlib.util.find_spec(package):
        return ""
    return f"{package} is not installed: pip install 'octavo[{extra}]'"
