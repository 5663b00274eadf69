"""How much memory there is, and how many pages of keys and values it becomes. Free of torch.

Knows nothing of who will use the pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cache.view import FULL_VIEW, View
from configs.sizes import format_size

#: Where nothing is stated: at most this share of what is free, and at most this many bytes. More
#: is the operator's to give: on a CPU the same memory is the page cache's and the neighbours'.
_SHARE_OF_FREE = 0.5
_LARGEST_UNSTATED_BYTES = 4 * 2**30

#: Of a GPU's memory, what is left alone: this much, or one part in so many if that is more.
_LEAST_RESERVE_BYTES = 512 * 2**20
_RESERVE_SHARE = 50

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


class MemoryPlanError(ValueError, MemoryError):
    """It cannot fit; the message says by how much, and which flag changes that.

    Where it did fit before, the machine is short of memory: others have taken it.
    """


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """The pool that was decided on."""

    num_pages: int
    page_size: int
    bytes_per_token: int
    max_model_len: int
    notes: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that fit at one time."""
        return self.num_pages * self.page_size

    @property
    def total_bytes(self) -> int:
        """What the pages take."""
        return self.num_tokens * self.bytes_per_token


def free_memory_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """Return what this process may still allocate: the machine's, or its container's if less."""
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        # What of the page cache was not used lately is given up when asked for; after a model was
        # read it is most of what counts as used.
        stat = cgroup / "memory.stat"
        counts = dict(map(str.split, stat.read_text().splitlines())) if stat.exists() else {}
        unused_cache = int(counts.get("inactive_file", 0))
        free = min(free, int(text) - int(used.read_text()) + unused_cache)
    return max(free, 0)


def angles_bytes(bytes_per_position: int, longest: int, most_tokens: int) -> int:
    """Return what the table of angles takes at most.

    It has a row for each position of the longest sequence: at most as many as the model's, and no
    more than there is room for tokens.
    """
    return bytes_per_position * min(longest, most_tokens)


def plan_pool(  # noqa: PLR0913 - all that the size depends on
    *,
    stated_bytes: int | None,
    free_bytes: int,
    bytes_per_token: int,
    page_size: int,
    max_num_seqs: int,
    stated_max_model_len: int | None,
    model_max_len: int,
    view: View = FULL_VIEW,
    takes_all: bool = False,
) -> PoolPlan:
    """Decide how many pages there are and how long a sequence may be.

    A stated amount is taken as it is (but for the rest of a page); otherwise it is what all
    sequences at their longest need, within half of what is free, or, where it `takes_all`, all of
    what is free. Raises `MemoryPlanError`.
    """
    if stated_max_model_len is not None and stated_max_model_len > model_max_len:
        message = f"max_model_len: {stated_max_model_len} is over the model's own {model_max_len}"
        raise MemoryPlanError(message)
    wanted_len = stated_max_model_len or model_max_len
    page_bytes = page_size * bytes_per_token
    if stated_bytes is None and takes_all:
        amount = free_bytes
    elif stated_bytes is None:
        everything = max_num_seqs * -(-wanted_len // page_size) * page_bytes
        amount = min(everything, int(free_bytes * _SHARE_OF_FREE), _LARGEST_UNSTATED_BYTES)
    elif stated_bytes > free_bytes:
        message = (
            f"kv_cache_memory: {format_size(stated_bytes)} were stated but only "
            f"{format_size(free_bytes)} are free for them; "
            f"lower --kv-cache-memory by {format_size(stated_bytes - free_bytes)}"
        )
        raise MemoryPlanError(message)
    else:
        amount = stated_bytes
    num_pages = amount // page_bytes
    if num_pages * page_size < 2:
        message = (
            f"kv_cache_memory: {format_size(amount)} hold no page of {page_size} tokens "
            f"({format_size(page_bytes)} each); raise --kv-cache-memory"
        )
        raise MemoryPlanError(message)
    plan = PoolPlan(num_pages, page_size, bytes_per_token, wanted_len)
    num_read_pages = view.num_pages(page_size)
    if num_read_pages is not None and num_read_pages <= num_pages:
        return plan
    return _fit_length(plan, stated_max_model_len)


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """What of a GPU's memory is spoken for before there are pages; all of it was measured."""

    #: Of the whole device, and of it what nobody has taken: the weights are there already.
    total_bytes: int
    free_bytes: int
    #: The largest step there may be, and what it takes beside the pages.
    step_tokens: int
    step_rows: int
    step_bytes: int
    #: The recorded decode steps.
    graph_bytes: int

    @property
    def reserve_bytes(self) -> int:
        """What stays unused: for what cannot be foreseen, fragments above all."""
        return max(_LEAST_RESERVE_BYTES, self.total_bytes // _RESERVE_SHARE)

    @property
    def page_bytes(self) -> int:
        """What is left for pages. Raises `MemoryPlanError` where that is nothing."""
        taken = self.step_bytes + self.graph_bytes + self.reserve_bytes
        if taken < self.free_bytes:
            return self.free_bytes - taken
        raise MemoryPlanError(
            f"max_num_batched_tokens: beside the weights {format_size(self.free_bytes)} of "
            f"{format_size(self.total_bytes)} are free, but a step of {self.step_tokens} tokens in "
            f"{self.step_rows} rows takes {format_size(self.step_bytes)}, its graphs "
            f"{format_size(self.graph_bytes)} and the reserve {format_size(self.reserve_bytes)}: "
            f"{format_size(taken - self.free_bytes)} too much even without pages; lower "
            "--max-num-batched-tokens or --max-num-seqs"
        )

    def account(self, weights_bytes: int, page_bytes: int) -> tuple[tuple[str, int], ...]:
        """Name what takes how much, for metrics and for the operator."""
        return (
            ("weights", weights_bytes),
            ("pages", page_bytes),
            ("step", self.step_bytes),
            ("graphs", self.graph_bytes),
            ("reserve", self.reserve_bytes),
        )


def _fit_length(plan: PoolPlan, stated_len: int | None) -> PoolPlan:
    if plan.max_model_len <= plan.num_tokens:
        return plan
    if stated_len is not None:
        missing = (stated_len - plan.num_tokens) * plan.bytes_per_token
        message = (
            f"max_model_len: {stated_len} tokens do not fit in {format_size(plan.total_bytes)} of "
            f"keys and values ({plan.num_tokens} tokens); raise --kv-cache-memory by "
            f"{format_size(missing)} or lower --max-model-len to {plan.num_tokens}"
        )
        raise MemoryPlanError(message)
    note = (
        f"requests are limited to {plan.num_tokens} tokens, what the keys and values have room "
        f"for; the model could take {plan.max_model_len} (--kv-cache-memory)"
    )
    return PoolPlan(plan.num_pages, plan.page_size, plan.bytes_per_token, plan.num_tokens, (note,))
