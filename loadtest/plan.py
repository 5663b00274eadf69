"""The options of a user as a workload, a way of sending it and bounds. Pure but for traces.

A plan may hold several loads (`--concurrency 1,8,32`): each becomes a run of its own.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loadtest.arrivals import PROCESSES
from loadtest.drive import Bounds
from loadtest.presets import PRESETS
from loadtest.probe import PromptForm
from loadtest.trace import read_trace
from loadtest.workloads import Endpoint, Shape, Workload

#: More than a machine can use; it is there so that a slow first batch is not measured.
_MOST_WARM_UPS = 8
TRACE = "trace"


@dataclass(frozen=True, slots=True)
class Load:
    """How hard to press: a closed loop, or an open one of some rate."""

    concurrency: int | None = None
    rate_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """One run, before a server is known. Fields are the options of the command line."""

    workload: str = "c8"
    trace: Path | None = None
    speed: float = 1.0
    load: Load = Load()
    arrivals: str = "poisson"
    burst: int = 8
    seed: int = 0
    num_requests: int | None = None
    duration_s: float | None = None
    timeout_s: float = 600.0
    warm_up: int | None = None
    prompt_tokens: int | None = None
    max_tokens: int | None = None
    num_turns: int | None = None
    endpoint: Endpoint | None = None
    prompt_form: PromptForm = "auto"
    has_schema: bool = True
    has_continuous_usage: bool = False
    slo: Mapping[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def make_workload(self) -> Workload:
        """Return the requests. Raises `ValueError` (of a trace, naming its line)."""
        num_conversations = self.num_requests
        if num_conversations is None and self.duration_s is not None:
            num_conversations = sys.maxsize
        shape = Shape(
            seed=self.seed,
            concurrency=self.load.concurrency,
            num_conversations=num_conversations,
            prompt_tokens=self.prompt_tokens,
            max_tokens=self.max_tokens,
            num_turns=self.num_turns,
            endpoint=self.endpoint,
            has_schema=self.has_schema,
        )
        if self.trace is not None:
            return read_trace(self.trace, shape, self.speed)
        workload = PRESETS[self.workload][1](shape)
        if self.endpoint not in (None, workload.endpoint):
            raise ValueError(f"{workload.name} can only be asked at the endpoint chat")
        if self.load.rate_per_s is not None and len(workload.lanes) > 1:
            raise ValueError(f"{workload.name} has lanes of its own and takes no --rate")
        return workload

    def bounds(self, workload: Workload) -> Bounds:
        """Return when the run is over."""
        return Bounds(workload.num_conversations, self.duration_s or math.inf, self.timeout_s)

    def due_s(self, workload: Workload) -> Iterator[float] | None:
        """Return when conversations begin in an open loop; None for a closed one."""
        if self.load.rate_per_s is not None:
            return PROCESSES[self.arrivals](self.load.rate_per_s, self.seed, self.burst)
        if workload.due_s is not None and self.load.concurrency is None:
            return iter(workload.due_s)
        return None

    def num_warm_ups(self, workload: Workload) -> int:
        """Return how many conversations are sent before the clock starts."""
        if self.warm_up is not None:
            return self.warm_up
        return min(_MOST_WARM_UPS, workload.lanes[0].concurrency)

    def describe(self, workload: Workload) -> dict[str, Any]:
        """Return the parameters of the load, for the header of its record."""
        about: dict[str, Any] = {"endpoint": workload.endpoint, **workload.shape}
        if self.load.rate_per_s is not None:
            about |= {"loop": "open", "rate_per_s": self.load.rate_per_s, "arrivals": self.arrivals}
            about |= {"burst": self.burst} if self.arrivals == "burst" else {}
        elif self.due_s(workload) is not None:
            about["loop"] = "open"
        else:
            about |= {"loop": "closed", "concurrency": workload.lanes[0].concurrency}
        if workload.num_conversations < sys.maxsize:
            about["requests"] = workload.num_conversations
        if self.duration_s is not None:
            about["duration_s"] = self.duration_s
        if self.extra:
            about["extra"] = self.extra
        return about | {"warm_up": self.num_warm_ups(workload)}

    def of_round(self, number: int) -> Plan:
        """Return the plan of a comparison's round: other words, so that no cache knows them."""
        return replace(self, seed=self.seed + number)
