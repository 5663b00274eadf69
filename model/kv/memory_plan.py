"""How much memory there is, and how many pages of keys and values it becomes. Free of torch.

Knows nothing of the contents of pages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cache.view import FULL_VIEW, View
from configs.sizes import format_size
from model.kv.group_split import GroupSizes

#: By default: at most this share of the free memory, and at most this many bytes. On a CPU the page
#: cache and other programs need the same memory.
_SHARE_OF_FREE = 0.5
_MAX_DEFAULT_BYTES = 4 * 2**30

#: The reserve of a GPU's memory: this much, or one part in so many if that is more.
_MIN_RESERVE_BYTES = 512 * 2**20
_RESERVE_SHARE = 50

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


class MemoryPlanError(ValueError, MemoryError):
    """A lack of memory; the message has the amount and the flag to change.

    Where the same setting did fit before, other programs have taken the memory.
    """


@dataclass(frozen=True, slots=True)
class WindowedPool:
    """The pool of the windowed layers, where these have pages of their own."""

    num_pages: int
    bytes_per_page: int
    #: The widest of these layers.
    view: View


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """The pool that was decided on."""

    num_pages: int
    page_size: int
    #: Of the tokens of a page in all layers.
    bytes_per_page: int
    max_model_len: int
    notes: tuple[str, ...] = ()
    windowed: WindowedPool | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that fit at one time."""
        return self.num_pages * self.page_size

    @property
    def total_bytes(self) -> int:
        """Return the bytes of all pages."""
        if self.windowed is None:
            return self.num_pages * self.bytes_per_page
        windowed_bytes = self.windowed.bytes_per_page
        own_bytes = self.bytes_per_page - windowed_bytes
        return self.num_pages * own_bytes + self.windowed.num_pages * windowed_bytes


def free_memory_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """Return the memory this process may still allocate, of the machine or of its container."""
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        # The system frees unused page cache on demand; after loading a model most of the used
        # memory is page cache.
        stat = cgroup / "memory.stat"
        counts = dict(map(str.split, stat.read_text().splitlines())) if stat.exists() else {}
        unused_cache = int(counts.get("inactive_file", 0))
        free = min(free, int(text) - int(used.read_text()) + unused_cache)
    return max(free, 0)


def angles_bytes(bytes_per_position: int, longest: int, max_tokens: int) -> int:
    """Return the largest size of the table of angles: a row for each position of a sequence."""
    return bytes_per_position * min(longest, max_tokens)


def plan_pool(  # noqa: PLR0913 - settings and sizes, by keyword
    *,
    stated_bytes: int | None,
    free_bytes: int,
    fixed_bytes: int,
    bytes_per_page: int,
    page_size: int,
    max_num_seqs: int,
    stated_max_model_len: int | None,
    model_max_len: int,
    view: View = FULL_VIEW,
    takes_all: bool = False,
    groups: GroupSizes | None = None,
) -> PoolPlan:
    """Decide how many pages there are and how long a sequence may be.

    `fixed_bytes` are needed beside the pages. A stated amount is used as it is, in whole pages. The
    default is the need of all sequences at their longest, within half of the free memory; with
    `takes_all`, all of the free memory. `groups`: where windowed layers have pages of their own.
    Raises `MemoryPlanError`.
    """
    if stated_max_model_len is not None and stated_max_model_len > model_max_len:
        raise MemoryPlanError(
            f"max_model_len: {stated_max_model_len} is over the model's own {model_max_len}"
        )
    wanted_len = stated_max_model_len or model_max_len
    free_bytes = max(free_bytes - fixed_bytes, 0)
    if stated_bytes is None and takes_all:
        amount = free_bytes
    elif stated_bytes is None:
        everything = max_num_seqs * -(-wanted_len // page_size) * bytes_per_page
        everything = groups.wanted_bytes() if groups else everything
        amount = min(everything, int(free_bytes * _SHARE_OF_FREE), _MAX_DEFAULT_BYTES)
    elif stated_bytes > free_bytes:
        raise MemoryPlanError(
            f"kv_cache_memory: {format_size(stated_bytes)} were stated but only "
            f"{format_size(free_bytes)} are free for them; "
            f"lower --kv-cache-memory by {format_size(stated_bytes - free_bytes)}"
        )
    else:
        amount = stated_bytes
    num_pages = amount // bytes_per_page
    if num_pages * page_size < 2:
        raise MemoryPlanError(
            f"kv_cache_memory: {format_size(amount)} hold no page of {page_size} tokens "
            f"({format_size(bytes_per_page)} each); raise --kv-cache-memory"
        )
    plan = PoolPlan(num_pages, page_size, bytes_per_page, wanted_len)
    if groups is not None:
        num_pages, num_windowed_pages = groups.split(amount, stated_max_model_len)
        pool = WindowedPool(num_windowed_pages, groups.windowed_bytes, groups.view)
        plan = replace(plan, num_pages=num_pages, windowed=pool)
    num_read_pages = view.num_pages(page_size)
    if num_read_pages is not None and num_read_pages <= num_pages:
        return plan
    return _fit_length(plan, stated_max_model_len)


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """The measured uses of a GPU's memory beside the pages."""

    #: Of the whole device, and the free part of it, after loading the weights.
    total_bytes: int
    free_bytes: int
    #: The largest step, and its memory beside the pages.
    step_tokens: int
    step_rows: int
    step_bytes: int
    #: The recorded decode steps.
    graph_bytes: int

    @property
    def reserve_bytes(self) -> int:
        """Return the unused rest, for fragmentation above all."""
        return max(_MIN_RESERVE_BYTES, self.total_bytes // _RESERVE_SHARE)

    @property
    def page_bytes(self) -> int:
        """Return the memory left for pages. Raises `MemoryPlanError` if there is none."""
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
        """Return the uses by name, for metrics and for the operator."""
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
        missing = -(-(stated_len - plan.num_tokens) * plan.bytes_per_page // plan.page_size)
        raise MemoryPlanError(
            f"max_model_len: {stated_len} tokens do not fit in {format_size(plan.total_bytes)} of "
            f"keys and values ({plan.num_tokens} tokens); raise --kv-cache-memory by "
            f"{format_size(missing)} or lower --max-model-len to {plan.num_tokens}"
        )
    note = (
        f"requests are limited to {plan.num_tokens} tokens, what the keys and values have room "
        f"for; the model could take {plan.max_model_len} (--kv-cache-memory)"
    )
    return replace(plan, max_model_len=plan.num_tokens, notes=(note,))
