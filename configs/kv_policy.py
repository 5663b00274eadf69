"""The policy of a sequence's keys: all of them, a window, or the first tokens and a window.

Knows nothing of requests or of pages.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

PolicyType: TypeAlias = Literal["full", "window", "sinks"]

#: Below this, text falls apart (transformers' issue 31537).
MIN_WINDOW_TOKENS = 64
#: As in StreamingLLM (arXiv:2309.17453).
DEFAULT_SINK_TOKENS = 4

_WRITTEN = re.compile(
    r"full|window:(?P<window>\d{1,9})|sinks:(?P<sinks>\d{1,9})\+(?P<rest>\d{1,9})"
)
#: Kinds of other servers or papers.
_NOT_SERVED = {
    "morph": "MorphKV drops keys by their scores",
    "h2o": "H2O drops keys by their scores",
}


@dataclass(frozen=True, slots=True)
class KVPolicy:
    """The keys that a query reads. Raises `ValueError` that begins with the field's name."""

    type: PolicyType = "full"
    #: Tokens that a query reads, itself included, and first tokens that it always reads; 0: none.
    window: int = 0
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.type == "full":
            if self.window or self.sinks:
                name = "window" if self.window else "sinks"
                raise ValueError(f"{name} must be left out with type full")
            return
        if self.window < MIN_WINDOW_TOKENS:
            raise ValueError(f"window must be at least {MIN_WINDOW_TOKENS}, got {self.window}")
        if self.type == "window" and self.sinks:
            raise ValueError("sinks must be left out with type window; type sinks has both")
        if self.type == "sinks" and self.sinks < 1:
            raise ValueError(f"sinks must be at least 1, got {self.sinks}")

    def __str__(self) -> str:
        match self.type:
            case "full":
                return "full"
            case "window":
                return f"window:{self.window}"
            case "sinks":
                return f"sinks:{self.sinks}+{self.window}"


def why_not_served(type_name: str) -> str:
    """Return why a type of policy is refused by name; empty for others."""
    reason = _NOT_SERVED.get(type_name)
    return f"{type_name} is not served: {reason}; use sinks or window" if reason else ""


def parse_kv_policy(text: str) -> KVPolicy:
    """Read `full`, `window:4096` or `sinks:4+1020`. Raises `ValueError`."""
    if reason := why_not_served(text.partition(":")[0]):
        raise ValueError(reason)
    found = _WRITTEN.fullmatch(text)
    if found is None:
        raise ValueError(f"must be full, window:TOKENS or sinks:TOKENS+TOKENS, got {text!r}")
    if found["window"]:
        return KVPolicy("window", int(found["window"]))
    if found["rest"]:
        return KVPolicy("sinks", int(found["rest"]), int(found["sinks"]))
    return KVPolicy()
