"""Packages of the wheel's extras: whether one is installed, and the command that installs it.

Knows nothing of their purpose.
"""

from __future__ import annotations

import importlib.util


def why_missing(package: str, extra: str) -> str:
    """Return that a package is not installed, and its extra; empty if it is installed."""
    if importlib.util.find_spec(package):
        return ""
    return f"{package} is not installed: pip install 'octavo[{extra}]'"
