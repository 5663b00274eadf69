"""Requests whose pages are read from the disk before the scheduler gets them.

A request waits while its pages are read, run by run, by threads. Between two steps the runs that
are ready are entered into the cache. From then on they are cached pages like others. Requests that
need the same page next wait for the same load. Knows nothing of files.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from cache.arrivals import Arrivals
from cache.node import NO_PAGE
from model.interface import ModelRunner
from scheduler.tier.price import LoadPrice
from scheduler.tier.prompt import Prompt
from scheduler.tier.threads import Alarm, Run

_RUN_PAGES = 16
_RUN_BYTES = 8 * 2**20
#: Of all loads together, read or waiting to be entered.
_MAX_RUNS = 8
#: Of one load: while one is entered, two are read.
_MAX_RUNS_A_LOAD = 3


class LoadStats(NamedTuple):
    """A snapshot of the loads. Counters (`*_total`) only grow."""

    num_loading: int = 0
    loaded_pages_total: int = 0
    #: Pages that were on the disk, and faster to compute.
    refused_pages_total: int = 0
    #: Loads that were given up at their deadline.
    late_loads_total: int = 0
    load_seconds_total: float = 0.0


@dataclass(slots=True, eq=False)
class _Load:
    prompt: Prompt
    #: Those to be loaded, all on the disk; the next one to be entered, and to be read.
    pages: range
    next_page: int
    next_read: int
    began_s: float
    deadline_s: float
    alarm: Alarm
    runs: deque[Run] = field(default_factory=deque)
    #: Requests that wait for the same page.
    others: list[Prompt] = field(default_factory=list)
    #: When the first pages came, and how many.
    first_s: float = 0.0
    num_first: int = 0
    num_entered: int = 0


class Loads:
    """The requests that wait, and their loads."""

    def __init__(
        self,
        arrivals: Arrivals,
        runner: ModelRunner,
        read: Callable[[Run], None],
        page_bytes: int,
        *,
        clock_s: Callable[[], float],
        post: Callable[[int], None],
    ) -> None:
        """`post`: asks for a call of `advance` with a request id, from any thread."""
        self._arrivals = arrivals
        self._runner = runner
        self._read = read
        self._run_pages = max(1, min(_RUN_PAGES, _RUN_BYTES // page_bytes))
        self._clock_s = clock_s
        self._post = post
        self._price = LoadPrice(runner.info.page_size)
        #: By the request that began each, the oldest first.
        self._loads: dict[int, _Load] = {}
        #: By request that waits for the load of another: that one.
        self._leaders: dict[int, int] = {}
        self._num_loaded = self._num_refused = self._num_late = 0
        self._load_s = 0.0

    # ---- requests in and out ---------------------------------------------------------------------

    def begin(self, prompt: Prompt, pages: range, token_s: float | None) -> bool:
        """Return whether a request is to wait for these pages, which follow its cached ones.

        They are on the disk. `token_s`: the time to compute a token.
        """
        if not pages:
            return False
        for load in self._loads.values():
            if load.prompt.keys[load.next_page].chain == prompt.keys[pages.start].chain:
                load.others.append(prompt)
                self._leaders[prompt.request_id] = load.prompt.request_id
                return True
        if not self._price.pays(len(pages), token_s):
            self._num_refused += len(pages)
            return False
        deadline_s = self._price.deadline_s(len(pages), token_s)
        now_s = self._clock_s()
        alarm = Alarm(deadline_s, lambda: self._post(prompt.request_id))
        load = _Load(prompt, pages, pages.start, pages.start, now_s, now_s + deadline_s, alarm)
        self._loads[prompt.request_id] = load
        self._read_more()
        return True

    def advance(self, request_id: int) -> list[Prompt]:
        """Enter the pages that were read for a request; return the requests that wait no longer."""
        load = self._loads.get(request_id)
        if load is None:
            return []
        while load.runs and load.runs[0].pages is not None:
            if not self._enter(load, load.runs.popleft()):
                return self._finish(load)
        if load.next_page == load.pages.stop:
            return self._finish(load)
        if self._clock_s() >= load.deadline_s:
            self._num_late += 1
            # As if all had come now: the next one is to be refused rather than waited for.
            num_pages, took_s = len(load.pages), self._clock_s() - load.began_s
            self._price.observe(took_s, took_s, num_pages, num_pages)
            return self._finish(load)
        self._read_more()
        return []

    def cancel(self, request_id: int) -> list[Prompt]:
        """Forget a request; return the requests that waited for its load. Unknown ids are fine."""
        leader = self._leaders.pop(request_id, None)
        if leader is not None:
            others = self._loads[leader].others
            self._loads[leader].others = [one for one in others if one.request_id != request_id]
        load = self._loads.get(request_id)
        return self._finish(load)[1:] if load is not None else []

    def stats(self) -> LoadStats:
        """Return a snapshot."""
        return LoadStats(
            len(self._loads) + len(self._leaders),
            self._num_loaded,
            self._num_refused,
            self._num_late,
            self._load_s,
        )

    def close(self) -> None:
        """Forget all requests."""
        for load in list(self._loads.values()):
            self._finish(load)

    # ---- parts -----------------------------------------------------------------------------------

    def _read_more(self) -> None:
        """Begin to read further runs, those of the oldest load first."""
        num_runs = sum(len(load.runs) for load in self._loads.values())
        for load in self._loads.values():
            while (
                num_runs < _MAX_RUNS
                and len(load.runs) < _MAX_RUNS_A_LOAD
                and load.next_read < load.pages.stop
            ):
                request_id, first = load.prompt.request_id, load.next_read
                load.next_read = min(first + self._run_pages, load.pages.stop)
                keys = load.prompt.keys[first : load.next_read]
                run = Run(keys, partial(self._post, request_id))
                load.runs.append(run)
                self._read(run)
                num_runs += 1

    def _enter(self, load: _Load, run: Run) -> bool:
        """Enter the pages of a run; False where further ones would be of no use."""
        contents = run.pages
        assert contents is not None, "a run that is being read"
        prompt = load.prompt
        pages = range(load.next_page, load.next_page + len(contents))
        page_ids = self._arrivals.enter(prompt.tokens, prompt.namespace, pages)
        for page_id, content in zip(page_ids, contents, strict=False):
            if page_id != NO_PAGE:
                self._runner.write_page(page_id, content)
                load.num_entered += 1
        load.next_page += len(page_ids)
        if not load.num_first:
            load.num_first, load.first_s = len(page_ids), self._clock_s() - load.began_s
        return len(page_ids) == len(run.keys)

    def _finish(self, load: _Load) -> list[Prompt]:
        """End a load; return its request and the others that waited for it."""
        load.alarm.cancel()
        for run in load.runs:
            run.is_dropped = True
        del self._loads[load.prompt.request_id]
        for other in load.others:
            del self._leaders[other.request_id]
        took_s = self._clock_s() - load.began_s
        self._num_loaded += load.num_entered
        self._load_s += took_s
        if load.next_page == load.pages.stop:
            self._price.observe(load.first_s, took_s, load.num_first, len(load.pages))
        self._read_more()
        return [load.prompt, *load.others]

    def check(self) -> None:
        """Assert that loads and requests agree."""
        waiting = {
            other.request_id: load.prompt.request_id
            for load in self._loads.values()
            for other in load.others
        }
        assert waiting == self._leaders, "a request waits for a load that is not there"
        num_runs = sum(len(load.runs) for load in self._loads.values())
        assert num_runs <= _MAX_RUNS, "too many runs are read ahead"
        for load in self._loads.values():
            assert load.next_page <= load.next_read <= load.pages.stop, (
                "pages were read out of order"
            )
