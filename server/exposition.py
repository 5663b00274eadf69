"""Metric families as Prometheus reads them, under our names and under vLLM's.

Knows nothing of where the numbers come from (`server/metrics.py`).
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from scheduler.client import LIFETIMES_S, CacheStats, EngineStats, ModelInfo
from server.kv_sizes import page_bytes, windowed_page_bytes
from server.memory import descendants, resident_bytes

#: By the values of the labels.
Values: TypeAlias = Mapping[tuple[str, ...], float]

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_LONG_SECONDS = (*_SECONDS[1:], 20.0, 60.0, 120.0, 300.0)
_STEP_TOKENS = tuple(float(2**power) for power in range(15))
_TOKENS = tuple(float(mantissa * 10**power) for power in range(7) for mantissa in (1, 2, 5))
_ANSWERS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)

#: By stem, the help and the upper bounds. vLLM has all of them.
HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("from a request's arrival to its first token", _LONG_SECONDS),
    "inter_token_latency_seconds": ("between two tokens of a request", _SECONDS),
    "e2e_request_latency_seconds": ("from a request's arrival to its end", _LONG_SECONDS),
    "request_queue_time_seconds": ("from submission to admission", _LONG_SECONDS),
    "request_prefill_time_seconds": ("from admission to the first token", _LONG_SECONDS),
    "request_decode_time_seconds": ("from the first token to the last", _LONG_SECONDS),
    "request_inference_time_seconds": ("from admission to the last token", _LONG_SECONDS),
    "request_time_per_output_token_seconds": ("mean of a request, without its first", _SECONDS),
    "iteration_tokens": ("tokens, prompt and decode together, a step", _STEP_TOKENS),
    "request_prompt_tokens": ("tokens of a request's prompt", _TOKENS),
    "request_generation_tokens": ("tokens of an answer", _TOKENS),
    "request_max_num_generation_tokens": ("tokens of the longest answer to a prompt", _TOKENS),
    "request_params_n": ("answers generated to a prompt", _ANSWERS),
    "request_params_max_tokens": ("most tokens that an answer may have", _TOKENS),
}
#: Metrics that vLLM has too (vllm/v1/metrics/loggers.py), by our stems.
_SHARED_STEMS = {
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
    *("prefix_cache_queries", "prefix_cache_hits", "num_preemptions"),
    *("prompt_tokens", "generation_tokens", "request_success"),
    *("spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens"),
    "spec_decode_num_accepted_tokens_per_pos",
    *HISTOGRAMS,
}
#: Where vLLM's stem is another.
_VLLM_STEMS = {"iteration_tokens": "iteration_tokens_total"}


class Histogram:
    """Counts of observations by upper bound.

    Not `prometheus_client.Histogram`: that has one name, no weights and a lock a bucket. This one
    has two names, and counts all tokens of a read at once.
    """

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Take in `value`, seen `count` times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Return Prometheus' cumulative buckets, and the sum."""
        total = 0
        cumulative: list[tuple[str, float]] = []
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            cumulative.append((str(bound), total))
        return cumulative, self._sum


class Page:
    """Builds families whose first label is the model's name."""

    def __init__(self, model_name: str) -> None:
        self._labels = {"model_name": model_name}

    def name(self, stem: str) -> str | None:
        """Return the name of a metric of this stem; None: it is not on this page."""
        return f"octavo_{stem}"

    def counter(self, name: str, text: str, values: Values, *labels: str) -> Iterator[Metric]:
        """Yield the counter `name` + `_total`."""
        yield from self._family(CounterMetricFamily, name, text, values, labels)

    def gauge(self, name: str, text: str, values: Values, *labels: str) -> Iterator[Metric]:
        """Yield the gauge `name`."""
        yield from self._family(GaugeMetricFamily, name, text, values, labels)

    def histogram(self, name: str, text: str, histogram: Histogram) -> Iterator[Metric]:
        """Yield the histogram `name`."""
        if full_name := self.name(name):
            family = HistogramMetricFamily(full_name, text, labels=[*self._labels])
            family.add_metric([*self._labels.values()], *histogram.buckets())
            yield family

    def cache_config(self, info: ModelInfo) -> Iterator[Metric]:
        """Yield nothing; vLLM has a metric with the cache's settings as labels."""
        del info
        return iter(())

    def _family(
        self,
        kind: type[CounterMetricFamily | GaugeMetricFamily],
        name: str,
        text: str,
        values: Values,
        labels: Sequence[str],
    ) -> Iterator[Metric]:
        if full_name := self.name(name):
            family = kind(full_name, text, labels=[*self._labels, *labels])
            for label_values, value in values.items():
                family.add_metric([*self._labels.values(), *label_values], value)
            yield family


class VllmPage(Page):
    """The metrics that vLLM has too, with its names and labels; it has no others."""

    def __init__(self, model_name: str) -> None:
        super().__init__(model_name)
        self._labels["engine"] = "0"

    def name(self, stem: str) -> str | None:
        """See `Page`."""
        return f"vllm:{_VLLM_STEMS.get(stem, stem)}" if stem in _SHARED_STEMS else None

    def cache_config(self, info: ModelInfo) -> Iterator[Metric]:
        """Yield vLLM's gauge of 1, with those of its labels that mean something here."""
        labels = {
            "block_size": str(info.page_size),
            "cache_dtype": info.kv_cache_dtype,
            "enable_prefix_caching": "True",
            "num_gpu_blocks": str(info.num_pages),
            "engine": "0",
        }
        text = "settings of the cache, in its labels; blocks are pages"
        family = GaugeMetricFamily("vllm:cache_config_info", text, labels=[*labels])
        family.add_metric([*labels.values()], 1)
        yield family


def _pages(cache: CacheStats) -> dict[tuple[str, ...], float]:
    """Return the pages by their state."""
    return {
        ("free",): cache.pages_free,
        ("private",): cache.pages_private,
        ("cached",): cache.pages_cached,
        ("leased",): cache.pages_leased,
    }


def _kv_bytes(cache: CacheStats, info: ModelInfo | None) -> dict[tuple[str, ...], float]:
    """Return the bytes of the pages by their state; those of two groups differ in size."""
    if info is None:
        return dict.fromkeys(_pages(cache), 0.0)
    parts = _pages(cache.windowed or CacheStats())
    return {
        state: (count - parts[state]) * page_bytes(info) + parts[state] * windowed_page_bytes(info)
        for state, count in _pages(cache).items()
    }


def gauges(page: Page, stats: EngineStats, info: ModelInfo | None) -> Iterator[Metric]:
    """Yield the gauges of one moment; `info` of None: the engine has not started."""
    cache, steps = stats.cache, stats.scheduler
    pid = os.getpid()
    yield from page.gauge("num_requests_running", "in the batch", {(): steps.num_running})
    yield from page.gauge("num_requests_waiting", "in the queue", {(): stats.num_waiting})
    num_tokens = steps.num_waiting_tokens
    yield from page.gauge("num_tokens_waiting", "tokens of those in the queue", {(): num_tokens})
    used = cache.used_share
    yield from page.gauge("kv_cache_usage_perc", "pages in use by requests, 0 to 1", {(): used})
    pages, kv_bytes = _pages(cache), _kv_bytes(cache, info)
    yield from page.gauge("kv_cache_pages", "leased pages are cached ones too", pages, "state")
    yield from page.gauge("kv_cache_bytes", "the same in bytes", kv_bytes, "state")
    yield from page.gauge("kv_disk_pages", "pages on the disk", {(): stats.tier.disk_pages})
    yield from page.gauge(
        "kv_disk_bytes", "of pages on the disk, other models' too", {(): stats.tier.disk_bytes}
    )
    pinned: dict[tuple[str, ...], float] = {
        (lifetime,): count for lifetime, count in zip(LIFETIMES_S, cache.pins.pages, strict=True)
    }
    yield from page.gauge(
        "kv_pinned_pages", "cached pages with pins, by the longest lifetime", pinned, "lifetime"
    )
    capacity_tokens = info.num_pages * info.page_size if info else 0
    yield from page.gauge(
        "kv_tokens_capacity", "tokens that fit at one time", {(): capacity_tokens}
    )
    if info:
        yield from page.gauge(
            "kv_bytes_per_token",
            "keys and values of a token in all layers, by their format",
            {(info.kv_cache_dtype,): info.kv_bytes_per_token},
            "format",
        )
    smallest_tokens = info.smallest_reusable_prefix_tokens if info else 0
    yield from page.gauge(
        "smallest_reusable_prefix_tokens",
        "tokens in a page of whole pages, else 1: prefixes are reused in multiples of it",
        {(): smallest_tokens},
    )
    weights_bytes = info.weights_bytes if info else 0
    yield from page.gauge("model_weights_bytes", "the model's weights", {(): weights_bytes})
    if info and info.device_bytes:
        states: dict[tuple[str, ...], float] = {(name,): size for name, size in info.device_bytes}
        yield from page.gauge("cuda_memory_bytes", "what the GPU's memory is for", states, "state")
    yield from page.gauge(
        "process_resident_memory_bytes",
        "resident memory; engine: all child processes together",
        {("api",): resident_bytes([pid]), ("engine",): resident_bytes(descendants(pid))},
        "process",
    )
    if info:
        yield from page.cache_config(info)
