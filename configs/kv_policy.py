"""The policy of a sequence's keys: which of them a query reads, and which are kept.

Knows nothing of requests or of pages.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

PolicyType: TypeAlias = Literal["full", "window", "sinks", "morph", "h2o"]
Fusion: TypeAlias = Literal["sum", "max"]

#: Below this, text falls apart (transformers' issue 31537).
MIN_WINDOW_TOKENS = 64
#: As in StreamingLLM (arXiv:2309.17453).
DEFAULT_SINK_TOKENS = 4
#: Of policies by score, whose window only scores: the paper has 30 to 200 (arXiv:2503.00979). Its
#: queries are stored.
MIN_SCORING_TOKENS, MAX_SCORING_TOKENS = 16, 256

_WRITTEN = re.compile(
    r"full|window:(?P<window>\d{1,9})|sinks:(?P<sinks>\d{1,9})\+(?P<rest>\d{1,9})"
    r"|(?P<by_score>morph|h2o):(?P<newest>\d{1,9})/(?P<capacity>\d{1,9})(:(?P<fusion>sum|max))?"
)


@dataclass(frozen=True, slots=True)
class KVPolicy:
    """The keys that a query reads. Raises `ValueError` that begins with the field's name."""

    type: PolicyType = "full"
    #: Tokens that a query reads, itself included, and first tokens that it always reads; 0: none.
    window: int = 0
    sinks: int = 0
    #: Of `morph` and `h2o`: keys that are kept, those of the window included. Of `morph`: how the
    #: scores by the window's queries become one.
    capacity: int = 0
    fusion: Fusion = "sum"

    def __post_init__(self) -> None:
        self._require_own_fields()
        if self.is_by_score:
            if not MIN_SCORING_TOKENS <= self.window <= MAX_SCORING_TOKENS:
                bounds = f"from {MIN_SCORING_TOKENS} to {MAX_SCORING_TOKENS}"
                raise ValueError(
                    f"window must be {bounds} with type {self.type}, got {self.window}"
                )
            least = max(MIN_WINDOW_TOKENS, self.window + 1)
            if self.capacity < least:
                reason = f"at least {MIN_WINDOW_TOKENS} and above the window of {self.window}"
                raise ValueError(f"capacity must be {reason}, got {self.capacity}")
            return
        if self.type != "full" and self.window < MIN_WINDOW_TOKENS:
            raise ValueError(f"window must be at least {MIN_WINDOW_TOKENS}, got {self.window}")
        if self.type == "sinks" and self.sinks < 1:
            raise ValueError(f"sinks must be at least 1, got {self.sinks}")

    def _require_own_fields(self) -> None:
        """Raise `ValueError` for a field that the type does not have."""
        if self.type == "full" and self.window:
            raise ValueError("window must be left out with type full")
        if self.type != "sinks" and self.sinks:
            hint = "; type sinks has both" if self.type == "window" else ""
            raise ValueError(f"sinks must be left out with type {self.type}{hint}")
        if not self.is_by_score and self.capacity:
            raise ValueError(f"capacity must be left out with type {self.type}")
        if self.type != "morph" and self.fusion != "sum":
            raise ValueError(f"fusion must be left out with type {self.type}")

    @property
    def is_by_score(self) -> bool:
        """Whether keys are kept by their scores."""
        return self.type in {"morph", "h2o"}

    @property
    def num_keys(self) -> int:
        """Return how many keys are kept; 0: all. Further ones gather until the next are dropped."""
        return self.capacity or self.sinks + self.window

    def __str__(self) -> str:
        match self.type:
            case "full":
                return "full"
            case "window":
                return f"window:{self.window}"
            case "sinks":
                return f"sinks:{self.sinks}+{self.window}"
            case "h2o":
                return f"h2o:{self.window}/{self.capacity}"
            case "morph":
                fusion = "" if self.fusion == "sum" else f":{self.fusion}"
                return f"morph:{self.window}/{self.capacity}{fusion}"


def parse_kv_policy(text: str) -> KVPolicy:
    """Read a policy that is written as `str` writes it: `sinks:4+1020`. Raises `ValueError`."""
    found = _WRITTEN.fullmatch(text)
    if found is None:
        raise ValueError(
            "must be full, window:TOKENS, sinks:TOKENS+TOKENS, morph:WINDOW/CAPACITY[:sum|max] or "
            f"h2o:WINDOW/CAPACITY, got {text!r}"
        )
    if found["window"]:
        return KVPolicy("window", int(found["window"]))
    if found["rest"]:
        return KVPolicy("sinks", int(found["rest"]), int(found["sinks"]))
    if found["capacity"]:
        window, capacity = int(found["newest"]), int(found["capacity"])
        if found["by_score"] == "h2o" and found["fusion"]:
            raise ValueError("fusion must be left out with type h2o")
        name: PolicyType = "h2o" if found["by_score"] == "h2o" else "morph"
        return KVPolicy(name, window, 0, capacity, "max" if found["fusion"] == "max" else "sum")
    return KVPolicy()
