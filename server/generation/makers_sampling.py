"""The sampling that a model's makers recommend in generation_config.json, as far as it is valid.

A value that no request could have is left out with a note, because the operator did not write it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.formats.json_file import shown
from scheduler.client import SamplingParams

#: The same as vLLM's.
_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def makers_sampling(stated: Mapping[str, object]) -> tuple[dict[str, float], list[str]]:
    """Return the values by the names of parameters, and a note on each that is left out."""
    taken: dict[str, float] = {}
    notes = []
    for name in _NAMES:
        if (value := stated.get(name)) is None:
            continue
        try:
            taken[name] = _checked(name, value)
        except ValueError as error:
            notes.append(f"generation_config.json: {name}: {shown(value)} is not used: {error}")
    does_sample = stated.get("do_sample")
    if does_sample is False:
        taken["temperature"] = 0.0
    elif does_sample not in (None, True):
        notes.append(
            f"generation_config.json: do_sample: {shown(does_sample)} is neither true nor false"
        )
    return taken, notes


def _checked(name: str, value: object) -> float:
    try:
        # A number may stand there as a text; of the truth values float() would make numbers.
        number = float("" if isinstance(value, bool) else value)  # type: ignore[arg-type] # caught
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be a number") from None
    if name == "top_k":
        if not number.is_integer():
            raise ValueError(f"{name} must be a whole number")
        # -1 and 0 both mean that there is no limit.
        number = max(0, int(number))
    params: dict[str, Any] = {name: number}
    SamplingParams(max_tokens=1, **params)
    return number
