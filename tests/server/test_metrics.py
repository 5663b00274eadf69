from __future__ import annotations

import os
import re
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from cache.stats import CacheStats
from scheduler.client import (
    EngineStats,
    FinishReason,
    GenerateRequest,
    SchedulerStats,
    Started,
    TokenOutput,
)
from server.exposition import Histogram
from server.memory import resident_bytes
from server.metrics import GrowingCount

#: Series of the first scrape, without the model's name: dashboards may rely on them.
SERIES = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    'prefix_cache_missed_tokens_total{reason="evicted"}',
    "prefix_cache_ghost_hits_total",
    "prefix_cache_ghost_seconds_total",
    "smallest_reusable_prefix_tokens",
    "prompt_tokens_total",
    "generation_tokens_total",
    "num_preemptions_total",
    "late_rows_total",
    'spec_decode_num_draft_tokens_total{drafter="prefix"}',
    'spec_decode_num_accepted_tokens_total{drafter="suffix"}',
    'spec_decode_num_accepted_tokens_per_pos_total{position="0"}',
    'request_success_total{finished_reason="stop"}',
    'request_success_total{finished_reason="length"}',
    'request_success_total{finished_reason="abort"}',
    'request_success_total{finished_reason="error"}',
    "time_to_first_token_seconds_count",
    "inter_token_latency_seconds_count",
    "e2e_request_latency_seconds_count",
    "request_queue_time_seconds_count",
    "request_prefill_time_seconds_count",
    "request_decode_time_seconds_count",
    "iteration_tokens_count",
    "request_prompt_tokens_count",
    "request_generation_tokens_count",
    "request_time_per_output_token_seconds_count",
    "request_params_n_count",
    "request_params_max_tokens_count",
    'time_to_first_token_seconds_bucket{le="0.001"}',
    'inter_token_latency_seconds_bucket{le="0.0005"}',
    'kv_cache_bytes{state="free"}',
    'kv_cache_bytes{state="private"}',
    'kv_cache_bytes{state="cached"}',
    'kv_cache_bytes{state="leased"}',
    'kv_cache_pages{state="free"}',
    'kv_cache_pages{state="private"}',
    'kv_cache_pages{state="cached"}',
    'kv_cache_pages{state="leased"}',
    "kv_tokens_capacity",
    "model_weights_bytes",
    'process_resident_memory_bytes{process="api"}',
    'process_resident_memory_bytes{process="engine"}',
]


def test_every_series_stands_in_the_first_scrape(absent: Any) -> None:
    page = absent.http.get("/metrics").text.splitlines()
    names = [line.rpartition(" ")[0] for line in page]
    bare = [re.sub(r'\{model_name="smollm2"\}|,?model_name="smollm2",?', "", n) for n in names]
    assert {series: bare.count("octavo_" + series) for series in SERIES} == dict.fromkeys(SERIES, 1)


def test_the_page_is_valid_and_under_one_name(live: Any) -> None:
    live.chat(max_tokens=3)
    answer = live.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(answer.text))
    assert len({family.name for family in families}) == len(families)
    for family in families:
        assert family.name.startswith("octavo_")
        assert family.documentation
        assert all(sample.labels["model_name"] == "fake" for sample in family.samples)


def test_vllms_names_are_repeated_if_wanted(start_server: Callable[..., Any]) -> None:
    live = start_server(metrics_alias="vllm")
    live.chat(max_tokens=3)
    page = live.http.get("/metrics").text
    assert 'vllm:generation_tokens_total{engine="0",model_name="fake"} 3.0' in page
    assert 'octavo_generation_tokens_total{model_name="fake"} 3.0' in page
    assert 'vllm:time_to_first_token_seconds_count{engine="0",model_name="fake"} 1.0' in page


#: Name, type and labels beside model_name and engine, as vllm/v1/metrics/loggers.py has them; a
#: counter's samples end with _total.
VLLM = {
    "num_requests_running": ("gauge", set[str]()),
    "num_requests_waiting": ("gauge", set()),
    "kv_cache_usage_perc": ("gauge", set()),
    "prefix_cache_queries": ("counter", set()),
    "prefix_cache_hits": ("counter", set()),
    "num_preemptions": ("counter", set()),
    "prompt_tokens": ("counter", set()),
    "generation_tokens": ("counter", set()),
    "request_success": ("counter", {"finished_reason"}),
    "spec_decode_num_draft_tokens": ("counter", set()),
    "spec_decode_num_accepted_tokens": ("counter", set()),
    "spec_decode_num_accepted_tokens_per_pos": ("counter", {"position"}),
    "request_prompt_tokens": ("histogram", set()),
    "request_generation_tokens": ("histogram", set()),
    "iteration_tokens_total": ("histogram", set()),
    "request_max_num_generation_tokens": ("histogram", set()),
    "request_params_n": ("histogram", set()),
    "request_params_max_tokens": ("histogram", set()),
    "time_to_first_token_seconds": ("histogram", set()),
    "inter_token_latency_seconds": ("histogram", set()),
    "request_time_per_output_token_seconds": ("histogram", set()),
    "e2e_request_latency_seconds": ("histogram", set()),
    "request_queue_time_seconds": ("histogram", set()),
    "request_inference_time_seconds": ("histogram", set()),
    "request_prefill_time_seconds": ("histogram", set()),
    "request_decode_time_seconds": ("histogram", set()),
}
CACHE_LABELS = {"block_size", "cache_dtype", "enable_prefix_caching", "num_gpu_blocks", "engine"}


def test_vllms_page_has_vllms_names_types_and_labels_alone(
    start_server: Callable[..., Any],
) -> None:
    live = start_server(metrics_alias="vllm")
    page = live.http.get("/metrics").text
    families = {
        family.name.removeprefix("vllm:"): family
        for family in text_string_to_metric_families(page)
        if family.name.startswith("vllm:")
    }
    cache = families.pop("cache_config_info")
    [sample] = cache.samples
    assert (cache.type, sample.value, set(sample.labels)) == ("gauge", 1.0, CACHE_LABELS)
    assert sample.labels["block_size"] == str(live.client.info.page_size)
    assert sample.labels["num_gpu_blocks"] == str(live.client.info.num_pages)
    found = {
        name: (
            family.type,
            {label for sample in family.samples for label in sample.labels}
            - {"model_name", "engine", "le"},
        )
        for name, family in families.items()
    }
    assert found == VLLM
    for family in families.values():
        for sample in family.samples:
            assert (sample.labels["model_name"], sample.labels["engine"]) == ("fake", "0")


@pytest.mark.parametrize("alias", ["none", "vllm"])
def test_who_accepts_openmetrics_gets_it(start_server: Callable[..., Any], alias: str) -> None:
    live = start_server(metrics_alias=alias)
    live.chat(max_tokens=3)
    # The header that Prometheus sends.
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    answer = live.http.get("/metrics", headers={"Accept": accept})
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = list(openmetrics(answer.text))  # type: ignore[no-untyped-call] # untyped there
    plain = list(text_string_to_metric_families(live.http.get("/metrics").text))
    assert {family.name for family in families} == {family.name for family in plain}
    assert {family.type for family in families} == {"counter", "gauge", "histogram"}


def test_the_size_of_requests_is_counted(live: Any) -> None:
    live.post("/v1/completions", prompt=["ab", "abc"], n=2, max_tokens=5)
    live.post("/v1/completions", prompt="abcd", max_tokens=1)
    live.wait_idle()
    counts = {
        "request_prompt_tokens": (5, 2 * 2 + 2 * 3 + 4),
        "request_generation_tokens": (5, 4 * 5 + 1),
        "request_params_max_tokens": (5, 4 * 5 + 1),
        "request_params_n": (3, 2 + 2 + 1),
        "request_max_num_generation_tokens": (3, 5 + 5 + 1),
    }
    for name, (count, total) in counts.items():
        assert live.metric(f"octavo_{name}_count") == count, name
        assert live.metric(f"octavo_{name}_sum") == total, name
    assert live.metric("octavo_request_time_per_output_token_seconds_count") == 4
    assert live.metric("octavo_request_inference_time_seconds_count") == 5


def test_requests_are_counted(live: Any) -> None:
    for _ in range(2):
        live.chat(max_tokens=4)
    live.chat(max_tokens=0)
    live.http.get("/nothing")
    live.wait_idle()
    num_prompt = live.chat(max_tokens=1).json()["usage"]["prompt_tokens"]
    assert live.metric("octavo_prompt_tokens_total") == 3 * num_prompt
    assert live.metric("octavo_generation_tokens_total") == 9
    assert live.metric('octavo_request_success_total{finished_reason="length"}') == 3
    assert live.metric("octavo_time_to_first_token_seconds_count") == 3
    assert live.metric("octavo_inter_token_latency_seconds_count") == 6
    assert live.metric("octavo_e2e_request_latency_seconds_count") == 3
    assert live.metric("octavo_request_queue_time_seconds_count") == 3
    assert live.metric("octavo_prefix_cache_hits_total") > 0
    assert live.metric("octavo_iteration_tokens_sum") > 0
    assert live.metric('octavo_http_responses_total{status="400"}') == 1
    assert live.metric('octavo_http_responses_total{status="404"}') == 1


def test_the_engines_snapshot_is_shown(scripted: Callable[..., Any]) -> None:
    async def script(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        del request
        yield TokenOutput(started=Started(1, 0.25, 0), finish_reason=FinishReason.STOP)

    live = scripted(script)
    live.client.engine_stats = EngineStats(
        SchedulerStats(num_running=3, num_waiting=1, preemptions_total=7, late_rows_total=5),
        CacheStats(pages_total=10, pages_free=4, pages_private=1, pages_cached=5, pages_leased=2),
        num_preparing=1,
    )
    live.client.observers[0](100)
    live.chat()
    assert live.metric("octavo_num_requests_running") == 3
    assert live.metric("octavo_num_requests_waiting") == 2
    assert live.metric("octavo_late_rows_total") == 5
    assert live.metric("octavo_kv_cache_usage_perc") == pytest.approx(0.3)
    assert live.metric('octavo_kv_cache_pages{state="leased"}') == 2
    assert live.metric('octavo_kv_cache_bytes{state="cached"}') == 5 * 4 * 4
    assert live.metric("octavo_kv_tokens_capacity") == live.client.info.num_pages * 4
    assert live.metric('octavo_kv_bytes_per_token{format="int"}') == 4
    assert live.metric("octavo_iteration_tokens_sum") == 100

    assert "cuda_memory_bytes" not in live.http.get("/metrics").text
    live.client.info = replace(live.client.info, device_bytes=(("weights", 16), ("pages", 50)))
    assert live.metric('octavo_cuda_memory_bytes{state="pages"}') == 50
    assert live.metric("octavo_request_queue_time_seconds_sum") == 0.25
    steps = live.client.engine_stats.scheduler._replace(preemptions_total=2)
    live.client.engine_stats = live.client.engine_stats._replace(scheduler=steps)
    assert live.metric("octavo_num_preemptions_total") == 9, "another engine counts on"


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 5)), max_size=20))
def test_a_histogram_counts_what_it_is_shown(observations: list[tuple[float, int]]) -> None:
    histogram = Histogram([0.5, 1.0, 10.0])
    for value, count in observations:
        histogram.observe(value, count)
    buckets, total = histogram.buckets()
    for bound, cumulative in buckets:
        assert cumulative == sum(count for value, count in observations if value <= float(bound))
    assert total == pytest.approx(sum(value * count for value, count in observations))


@given(st.lists(st.lists(st.integers(0, 9), min_size=1), max_size=5))
def test_a_count_goes_on_over_restarts(lives: list[list[int]]) -> None:
    """Each life of an engine counts from 0; a scrape reads the value at that time."""
    count, shown, finished = GrowingCount(), 0, 0
    for grows in lives:
        value = 0
        for growth in grows:
            value += growth
            read = count.read(value)
            assert shown <= read <= finished + value
            shown = read
        finished += value


def test_memory_is_read_from_the_system() -> None:
    assert resident_bytes([os.getpid()]) > 10 * 2**20
    assert resident_bytes([]) == 0
