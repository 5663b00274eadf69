"""Counts for Prometheus, and their exposition.

Every series stands in the first scrape. Stems are vLLM's. Counts are kept in plain numbers (one
event loop, no locks: an observation is a bisection and two additions) and become metric families
(`server/exposition.py`) only at a scrape.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from scheduler.cache_story import MISS_REASONS
from scheduler.client import EngineClient, EngineUnavailableError, GenerateRequest, PinEnd
from scheduler.stats import MissStats, SpeculationStats
from server.exposition import HISTOGRAMS, Histogram, Page, VllmPage, gauges
from server.http.context import RequestRecord

FINISHED_REASONS = ("stop", "length", "abort", "error")
#: 499 is a client that closed its connection before its answer.
STATUSES = (200, 400, 401, 404, 405, 408, 413, 429, 499, 500, 503)
#: `error.code` of requests refused or ended because they cannot be served now.
REJECTED_REASONS = ("queue_full", "key_limit", "unavailable")

#: Counters the engine keeps: our name, its field, help.
_ENGINE_COUNTERS = (
    ("prefix_cache_queries", "prefix_queries_tokens_total", "prompt tokens looked up"),
    ("prefix_cache_hits", "prefix_hits_tokens_total", "prompt tokens found in the cache"),
    ("prompt_tokens_computed", "prompt_tokens_computed_total", "prompt tokens not reused"),
    ("num_preemptions", "preemptions_total", "sequences put back into the queue"),
    ("evicted_pages", "evicted_pages_total", "cached pages given up"),
    ("copied_pages", "copied_pages_total", "pages copied to share a part of them"),
    ("kv_disk_stored_pages", "disk_stored_pages_total", "pages stored on the disk"),
    ("kv_disk_loaded_pages", "disk_loaded_pages_total", "pages read from the disk for requests"),
    ("kv_disk_refused_pages", "disk_refused_pages_total", "on the disk, but faster to compute"),
    ("kv_disk_evicted_pages", "disk_evicted_pages_total", "removed from the disk to make room"),
    ("kv_disk_corrupt_pages", "disk_corrupt_pages_total", "damaged on the disk, and computed"),
    ("kv_disk_dropped_pages", "disk_dropped_pages_total", "not stored: evicted, or a failed write"),
    ("kv_disk_late_loads", "disk_late_loads_total", "loads given up at their deadline"),
    ("kv_disk_load_seconds", "disk_load_us_total", "that requests waited for the disk"),
    ("late_rows", "late_rows_total", "rows computed again: their grammar was not ready in time"),
    ("faulty_rows", "faulty_rows_total", "rows taken back: their step failed, or was not finite"),
    ("steps", "steps_total", "steps of the engine"),
)


#: Drafters that a server may have.
_DRAFTERS = ("grammar", "prefix", "prediction", "suffix", "ngram", "model")


class GrowingCount:
    """A counter read from a process that may be replaced: it goes on where the old one ended."""

    __slots__ = ("_before", "_last")

    def __init__(self) -> None:
        self._before = 0
        self._last = 0

    def read(self, value: int) -> int:
        """Return the count over all processes, of which the newest has counted `value`."""
        if value < self._last:
            self._before += self._last
        self._last = value
        return self._before + value


class Metrics(Collector):
    """Collects the engine's newest snapshot and the reports of requests."""

    def __init__(self, client: EngineClient, model_name: Callable[[], str], alias: str) -> None:
        self._client = client
        self._model_name = model_name
        self._pages = (Page, VllmPage) if alias == "vllm" else (Page,)
        self._histograms = {name: Histogram(of[1]) for name, of in HISTOGRAMS.items()}
        self._inter_token = self._histograms["inter_token_latency_seconds"]
        self._prompt_tokens = 0
        self._kv_dropped_tokens = 0
        self._generation_tokens = 0
        self._finished = dict.fromkeys(FINISHED_REASONS, 0)
        self._responses = dict.fromkeys(STATUSES, 0)
        self._rejected = dict.fromkeys(REJECTED_REASONS, 0)
        self._engine_counts = {field: GrowingCount() for _, field, _ in _ENGINE_COUNTERS}
        self._missed_tokens = {reason: GrowingCount() for reason in MISS_REASONS}
        self._ghost_tokens, self._ghost_us = GrowingCount(), GrowingCount()
        self._pin_counts = [GrowingCount() for _ in PinEnd]
        #: By metric and the value of its label.
        self._draft_counts = defaultdict[tuple[str, str], GrowingCount](GrowingCount)
        self._own_gauges: list[tuple[str, str, Callable[[], float]]] = []
        self._own_counters: list[tuple[str, str, Callable[[], int]]] = []
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        client.on_step(self._histograms["iteration_tokens"].observe)

    # ---- what requests report

    def on_started(self, record: RequestRecord) -> None:
        """Count an admission."""
        self._prompt_tokens += record.prompt_tokens
        if record.queue_s is not None:
            self._histograms["request_queue_time_seconds"].observe(record.queue_s)

    def on_first_token(self, record: RequestRecord) -> None:
        """Take in how long a request waited for it."""
        for name, duration_s in (
            ("time_to_first_token_seconds", record.ttft_s),
            ("request_prefill_time_seconds", record.prefill_s),
        ):
            if duration_s is not None:
                self._histograms[name].observe(duration_s)

    def on_tokens(self, count: int, since_last_token_s: float | None) -> None:
        """Count new tokens of one request; None: its first ones."""
        self._generation_tokens += count
        if since_last_token_s is not None:
            self._inter_token.observe(since_last_token_s / count, count)

    def on_finished(self, record: RequestRecord, now_s: float, request: GenerateRequest) -> None:
        """Count the end of a request that the engine had: one answer to one prompt."""
        self._finished[record.finish_reason] += 1
        self._kv_dropped_tokens += record.dropped_tokens
        num_tokens = record.output_tokens
        seen: dict[str, float | None] = {
            "e2e_request_latency_seconds": now_s - record.arrived_at_s,
            "request_inference_time_seconds": record.inference_s,
            "request_decode_time_seconds": record.decode_s,
            "request_prompt_tokens": len(request.prompt_token_ids),
            "request_generation_tokens": num_tokens,
            "request_params_max_tokens": request.params.max_tokens,
        }
        if num_tokens > 1 and record.decode_s is not None:
            seen["request_time_per_output_token_seconds"] = record.decode_s / (num_tokens - 1)
        for name, value in seen.items():
            if value is not None:
                self._histograms[name].observe(value)

    def on_answered(self, records: Sequence[RequestRecord]) -> None:
        """Count the end of all answers to one prompt, unless the engine refused one."""
        if all(record.finish_reason for record in records):
            longest = max(record.output_tokens for record in records)
            self._histograms["request_params_n"].observe(len(records))
            self._histograms["request_max_num_generation_tokens"].observe(longest)

    def on_response(self, status: int) -> None:
        """Count an answer of any route."""
        self._responses[status] = self._responses.get(status, 0) + 1

    def add_gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Show the result of `read` with each scrape."""
        self._own_gauges.append((name, text, read))

    def add_counter(self, name: str, text: str, read: Callable[[], int]) -> None:
        """Show the result of `read` with each scrape, as `name` + `_total`."""
        self._own_counters.append((name, text, read))

    def on_rejected(self, code: str) -> None:
        """Count a request that could not be served now."""
        self._rejected[code] = self._rejected.get(code, 0) + 1

    # ---- what Prometheus asks

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """Return the page and its content type: OpenMetrics if accepted, else plain text."""
        if "openmetrics" in choose_encoder(accept)[1]:
            # No name needs escaping; the escaping would take vLLM's colons for a fault.
            encode: Callable[..., bytes] = openmetrics.generate_latest
            page = encode(self._registry, escaping=openmetrics.ALLOWUTF8)
            return page, openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4

    def collect(self) -> Iterator[Metric]:
        """Yield every family, on our page and on vLLM's."""
        stats = self._client.stats()
        try:
            info = self._client.info
        except EngineUnavailableError:
            info = None
        counted = stats.scheduler._asdict() | stats.cache._asdict() | stats.tier._asdict()
        engine_counts = {
            field: counts.read(counted[field]) for field, counts in self._engine_counts.items()
        }
        ended_pins: dict[tuple[str, ...], float] = {
            (why,): count.read(value)
            for why, count, value in zip(
                PinEnd, self._pin_counts, stats.cache.pins.ended_total, strict=True
            )
        }
        drafts = self._read_drafts(stats.scheduler.speculation)
        misses = self._read_misses(stats.scheduler.misses)
        for kind in self._pages:
            page = kind(self._model_name())
            yield from self._counters(page, engine_counts)
            yield from page.counter("cache_pins_ended", "pins by their end", ended_pins, "cause")
            yield from self._drafts(page, drafts)
            yield from _misses(page, misses)
            yield from gauges(page, stats, info)
            for name, text, read in self._own_gauges:
                yield from page.gauge(name, text, {(): read()})
            for name, histogram in self._histograms.items():
                yield from page.histogram(name, HISTOGRAMS[name][0], histogram)

    def _read_drafts(self, stats: SpeculationStats) -> dict[str, dict[tuple[str, ...], int]]:
        """Return by metric the counts of all engines so far, by drafter or place in the draft."""
        read: dict[str, dict[str, int]] = {
            "num_draft_tokens": dict.fromkeys(_DRAFTERS, 0),
            "num_accepted_tokens": dict.fromkeys(_DRAFTERS, 0),
            "num_accepted_tokens_per_pos": {"0": 0},
        }
        for name, of in self._draft_counts:
            # An engine that was replaced may have had drafts that this one has not.
            read[name].setdefault(of, 0)
        for drafter in stats.drafters:
            read["num_draft_tokens"][drafter.drafter] = drafter.offered_tokens_total
            read["num_accepted_tokens"][drafter.drafter] = drafter.accepted_tokens_total
        for position, count in enumerate(stats.accepted_by_position):
            read["num_accepted_tokens_per_pos"][str(position)] = count
        return {
            name: {(of,): self._draft_counts[name, of].read(count) for of, count in counts.items()}
            for name, counts in read.items()
        }

    def _read_misses(self, stats: MissStats) -> MissStats:
        """Return the counts of all engines so far."""
        missed = dict(stats.missed_tokens_total)
        return MissStats(
            tuple(
                (name, int(of.read(missed.get(name, 0))))
                for name, of in self._missed_tokens.items()
            ),
            int(self._ghost_tokens.read(stats.ghost_tokens_total)),
            int(self._ghost_us.read(stats.ghost_us_total)),
        )

    def _drafts(
        self, page: Page, counts: dict[str, dict[tuple[str, ...], int]]
    ) -> Iterator[Metric]:
        for name, text, label in (
            ("num_draft_tokens", "tokens of drafts that were verified", "drafter"),
            ("num_accepted_tokens", "tokens of drafts that were accepted", "drafter"),
            ("num_accepted_tokens_per_pos", "the same by their place in the draft", "position"),
        ):
            values: dict[tuple[str, ...], int] = counts[name]
            labels = [label]
            if label == "drafter" and isinstance(page, VllmPage):
                # vLLM has one drafter.
                values, labels = {(): sum(values.values())}, []
            yield from page.counter(f"spec_decode_{name}", text, values, *labels)

    def _counters(self, page: Page, engine_counts: dict[str, int]) -> Iterator[Metric]:
        for name, field, text in _ENGINE_COUNTERS:
            count: float = engine_counts[field]
            value = count / 1e6 if field.endswith("_us_total") else count
            yield from page.counter(name, text, {(): value})
        for name, text, read in self._own_counters:
            yield from page.counter(name, text, {(): read()})
        yield from page.counter("prompt_tokens", "of admitted requests", {(): self._prompt_tokens})
        yield from page.counter(
            "generation_tokens", "sent to clients", {(): self._generation_tokens}
        )
        yield from page.counter(
            "kv_dropped_tokens",
            "out of view at the end of bounded sequences",
            {(): self._kv_dropped_tokens},
        )
        yield from page.counter(
            "request_success",
            "requests the engine ended, by reason",
            {(reason,): count for reason, count in self._finished.items()},
            "finished_reason",
        )
        yield from page.counter(
            "http_responses",
            "answers on every route, by status; 499: the client left first",
            {(str(status),): count for status, count in self._responses.items()},
            "status",
        )
        yield from page.counter(
            "requests_rejected",
            "requests that could not be served now, by the error's code",
            {(code,): count for code, count in self._rejected.items()},
            "reason",
        )


def _misses(page: Page, stats: MissStats) -> Iterator[Metric]:
    yield from page.counter(
        "prefix_cache_missed_tokens",
        "prompt tokens not reused, by reason; the last of each prompt is not counted",
        {(reason,): count for reason, count in stats.missed_tokens_total},
        "reason",
    )
    yield from page.counter(
        "prefix_cache_ghost_hits",
        "prompt tokens evicted for lack of room: a larger pool would have had them",
        {(): stats.ghost_tokens_total},
    )
    yield from page.counter(
        "prefix_cache_ghost_seconds",
        "estimated time to compute these tokens again",
        {(): stats.ghost_us_total / 1e6},
    )
