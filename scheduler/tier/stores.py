"""Which pages are stored, and when their contents are read.

Pages that a request found in the cache are stored between two steps, for a millisecond at most.
The first pages of a prompt that none found yet are stored when the engine has nothing else to do.
Knows nothing of files.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from cache.arrivals import Arrivals
from model.interface import ModelRunner
from scheduler.tier.prompt import Prompt
from scheduler.tier.record import PageKey
from scheduler.tier.threads import Writer

#: Of a prompt whose pages no request has found yet, at most so many are stored.
_UNFOUND_PAGES = 64
#: Prompts that wait to be stored.
_MAX_JOBS = 256
_BUSY_S = 0.001
_IDLE_S = 0.005


@dataclass(slots=True, eq=False)
class _Job:
    prompt: Prompt
    next_page: int
    end: int


class Stores:
    """Prompts whose pages are to be stored."""

    def __init__(
        self,
        arrivals: Arrivals,
        runner: ModelRunner,
        writer: Writer,
        has: Callable[[PageKey], bool],
        clock_s: Callable[[], float],
    ) -> None:
        self._arrivals = arrivals
        self._runner = runner
        self._writer = writer
        self._has = has
        self._clock_s = clock_s
        self._found = deque[_Job]()
        self._unfound = deque[_Job]()
        #: Pages that were to be stored, and were evicted or forgotten before.
        self.num_dropped = 0

    def add_found(self, prompt: Prompt, num_cached_tokens: int) -> None:
        """Queue the cached pages that a request has found."""
        end = min(num_cached_tokens // prompt.page_tokens, len(prompt.keys))
        self._add(self._found, prompt, end)

    def add_computed(self, prompt: Prompt) -> None:
        """Queue the first pages of a prompt that was computed."""
        self._add(self._unfound, prompt, min(_UNFOUND_PAGES, len(prompt.keys)))

    def _add(self, jobs: deque[_Job], prompt: Prompt, end: int) -> None:
        if all(map(self._has, prompt.keys[:end])):
            return
        jobs.append(_Job(prompt, 0, end))
        if len(jobs) > _MAX_JOBS:
            self._drop(jobs.popleft())

    def _drop(self, job: _Job) -> None:
        lacking = job.prompt.keys[job.next_page : job.end]
        self.num_dropped += sum(not self._has(key) for key in lacking)

    def work_between_steps(self) -> None:
        """Store found pages for a millisecond."""
        if self._found:
            self._work(self._found, self._clock_s() + _BUSY_S, 0.0)

    def work_idle(self) -> bool:
        """Store pages for some milliseconds; return whether there are more."""
        jobs = self._found or self._unfound
        if jobs:
            self._work(jobs, self._clock_s() + _IDLE_S, _IDLE_S)
        return bool(self._found or self._unfound)

    def _work(self, jobs: deque[_Job], until_s: float, timeout_s: float) -> None:
        while jobs:
            job = jobs[0]
            prompt = job.prompt
            page_ids = self._arrivals.resident(prompt.tokens, prompt.namespace, job.end)
            while job.next_page < len(page_ids):
                key = prompt.keys[job.next_page]
                if not self._has(key):
                    if self._clock_s() >= until_s:
                        return
                    contents = self._runner.read_page(page_ids[job.next_page])
                    if not self._writer.put(key, contents, timeout_s):
                        return
                job.next_page += 1
            self._drop(jobs.popleft())

    def clear(self) -> None:
        """Forget all prompts."""
        self._found.clear()
        self._unfound.clear()
