"""An engine whose cached pages are kept on a disk, too.

It has the interface of `Engine` and one inside. A request whose next pages are on the disk is held
back until they are read, before the engine gets it. So the scheduler and its plans do not change.
Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cache.view import FULL_VIEW
from scheduler.engine import Engine
from scheduler.messages import (
    CacheCommand,
    Cancel,
    Loaded,
    Prepared,
    ResetCache,
    SetVocabulary,
    StepResult,
    Submit,
)
from scheduler.stats import EngineStats, TierStats
from scheduler.tier.loads import Loads
from scheduler.tier.prompt import Prompt
from scheduler.tier.store import DiskStore
from scheduler.tier.stores import Stores
from scheduler.tier.threads import Readers, Writer

_QUEUE_BYTES = 32 * 2**20
#: At the end, pages are stored for so long.
_FLUSH_S = 1.0


class TieredEngine:
    """See `Engine`."""

    def __init__(
        self,
        engine: Engine,
        store: DiskStore,
        clock_s: Callable[[], float],
        post: Callable[[Loaded], None],
    ) -> None:
        """`post`: brings a message from any thread to `handle`, in the engine's own."""
        self._engine, self._store, self._clock_s = engine, store, clock_s
        info = engine.runner.info
        self._max_model_len, self._page_tokens = info.max_model_len, info.page_size
        self._readers = Readers(store)
        self._writer = Writer(store, max(2, _QUEUE_BYTES // store.payload_bytes), clock_s)
        arrivals = engine.cache.arrivals
        self._loads = Loads(
            arrivals,
            engine.runner,
            self._readers.read,
            store.payload_bytes,
            clock_s=clock_s,
            post=lambda request_id: post(Loaded(request_id)),
        )
        self._stores = Stores(arrivals, engine.runner, self._writer, store.has, clock_s)
        #: Of the requests that have not ended.
        self._prompts: dict[int, Prompt] = {}
        #: When held-back requests arrived; of the released ones, how long they were held back.
        self._arrived_s: dict[int, float] = {}
        self._held_s: dict[int, float] = {}
        self._num_faulty_rows = 0

    @property
    def has_work(self) -> bool:
        """See `Engine`."""
        return self._engine.has_work

    def handle(
        self, message: Submit | Cancel | SetVocabulary | CacheCommand | Prepared | Loaded
    ) -> None:
        """See `Engine`."""
        if isinstance(message, Submit):
            self._accept(message)
            return
        if isinstance(message, Loaded):
            self._release(self._loads.advance(message.request_id))
            return
        if isinstance(message, Cancel):
            for prompt in self._loads.cancel(message.request_id):
                self._accept(prompt.submit)
            self._end(message.request_id)
        elif isinstance(message, ResetCache):
            self._stores.clear()
            self._writer.clear()
        self._engine.handle(message)

    def _accept(self, submit: Submit) -> None:
        prompt = self._prompt(submit)
        # One that is too long is refused by the scheduler.
        if prompt.keys and len(prompt.tokens) < self._max_model_len:
            self._prompts[submit.request_id] = prompt
            pages = self._pages_on_disk(prompt)
            if self._loads.begin(prompt, pages, self._engine.prompt_token_s):
                self._arrived_s.setdefault(submit.request_id, self._clock_s())
                return
        self._pass_on(submit)

    def _pass_on(self, submit: Submit) -> None:
        if (arrived_s := self._arrived_s.pop(submit.request_id, None)) is not None:
            self._held_s[submit.request_id] = self._clock_s() - arrived_s
        self._engine.handle(submit)

    def _prompt(self, submit: Submit) -> Prompt:
        request = submit.request
        tokens = (*request.prompt_token_ids, *submit.output_token_ids)
        # Later pages depend on the view, and are never shared.
        shared = tokens[: request.view.max_keys]
        return Prompt(
            submit, tokens, self._store.keys(shared, request.namespace), self._page_tokens
        )

    def _pages_on_disk(self, prompt: Prompt) -> range:
        """Return the pages on the disk behind the cached ones."""
        num_pages = prompt.num_loadable_pages
        if not num_pages:
            return range(0)
        match = self._engine.cache.match(prompt.tokens, prompt.namespace, FULL_VIEW)
        first = end = match.num_tokens // self._page_tokens
        # A page that is being computed is not read at the same time.
        while not match.in_flight and end < num_pages and self._store.has(prompt.keys[end]):
            end += 1
        return range(first, end)

    def _release(self, prompts: list[Prompt]) -> None:
        """Pass requests on; the first is that of the load, and others may need further pages."""
        for index, prompt in enumerate(prompts):
            if index:
                self._accept(prompt.submit)
            else:
                self._pass_on(prompt.submit)

    # ---- steps -----------------------------------------------------------------------------------

    def idle(self) -> bool:
        """See `Engine`."""
        return self._stores.work_idle() or self._engine.idle()

    def step(self) -> StepResult:
        """See `Engine`."""
        self._stores.work_between_steps()
        result = self._engine.step()
        for one in result.started:
            self._note_started(one.request_id, one.cached_tokens)
        self._forget_faulty(result.stats.scheduler.faulty_rows_total)
        started = [
            replace(one, queue_s=one.queue_s + self._held_s.pop(one.request_id, 0.0))
            for one in result.started
        ]
        ended = [one.request_id for one in result.rejected]
        ended += [request_id for request_id, _ in (*result.finished, *result.failed)]
        for request_id in ended:
            self._end(request_id)
        return replace(result, stats=self._with_tier(result.stats), started=started)

    def _note_started(self, request_id: int, num_cached_tokens: int) -> None:
        if prompt := self._prompts.get(request_id):
            self._store.note_use(prompt.keys[: num_cached_tokens // self._page_tokens])
            self._stores.add_found(prompt, num_cached_tokens)

    def _end(self, request_id: int) -> None:
        self._held_s.pop(request_id, None)
        self._arrived_s.pop(request_id, None)
        if prompt := self._prompts.pop(request_id, None):
            self._stores.add_computed(prompt)

    def _forget_faulty(self, num_faulty_rows: int) -> None:
        """Delete the pages of all open requests after a fault: any may hold its cause."""
        if num_faulty_rows > self._num_faulty_rows:
            self._num_faulty_rows = num_faulty_rows
            self._stores.clear()
            for prompt in self._prompts.values():
                self._writer.forget(prompt.keys)

    # ---- looking in ------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """See `Engine`."""
        return self._with_tier(self._engine.stats())

    def _with_tier(self, stats: EngineStats) -> EngineStats:
        store, loads = self._store.stats(), self._loads.stats()
        tier = TierStats(
            disk_bytes=store.num_bytes,
            disk_pages=store.num_pages,
            disk_stored_pages_total=store.stored_pages_total,
            disk_loaded_pages_total=loads.loaded_pages_total,
            disk_refused_pages_total=loads.refused_pages_total,
            disk_evicted_pages_total=store.evicted_pages_total,
            disk_corrupt_pages_total=store.corrupt_pages_total,
            disk_dropped_pages_total=self._stores.num_dropped + self._writer.num_dropped,
            disk_late_loads_total=loads.late_loads_total,
            disk_load_us_total=int(loads.load_seconds_total * 1e6),
        )
        num_preparing = stats.num_preparing + loads.num_loading
        return stats._replace(tier=tier, num_preparing=num_preparing)

    def check(self) -> None:
        """See `Engine`."""
        self._engine.check()
        self._loads.check()
        assert self._arrived_s.keys() <= self._prompts.keys(), "a request is held and unknown"
        assert self._held_s.keys() <= self._prompts.keys(), "a request was held and is unknown"

    def close(self) -> None:
        """See `Engine`. Pages that wait to be stored are, for a second."""
        self._loads.close()
        self._readers.close()
        until_s = self._clock_s() + _FLUSH_S
        has_more = True
        while has_more and self._clock_s() < until_s:
            has_more = self._stores.work_idle()
        self._writer.close()
        self._engine.close()
