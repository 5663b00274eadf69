"""Sizes in bytes, as people write them: `512MiB`, `2GB`, `1.5g`, `1048576`."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {_letter: 1024**_power, f"{_letter}IB": 1024**_power, f"{_letter}B": 1000**_power}

#: A larger number is not the size of any memory, and would overflow a float.
_MAX_DIGITS = 30
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size_bytes(value: object) -> object:
    """Parse a size in bytes: a bare letter and `KiB` count in 1024s, `KB` in 1000s.

    Other values than strings pass through for the caller's own validation. Raises `ValueError` with
    the allowed forms.
    """
    if not isinstance(value, str):
        return value
    found = _SIZE.fullmatch(value)
    factor = _UNITS.get(found.group(2).upper()) if found else None
    if found is None or factor is None or len(found.group(1)) > _MAX_DIGITS:
        message = f"{value!r} is not a size; write it as 512MiB, 2GiB or a number of bytes"
        raise ValueError(message)
    return int(float(found.group(1)) * factor)


def format_size(num_bytes: float) -> str:
    """Return `num_bytes` with three significant digits and a binary unit."""
    amount = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(amount) < 999.5:
            return f"{amount:.3g} {unit}"
        amount /= 1024
    return f"{amount:.3g} TiB"
