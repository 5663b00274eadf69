"""Every metric in the dashboard is one that the server exports."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from inline_client import InlineClient
from prometheus_client.parser import text_string_to_metric_families

from configs.schema import SchedulerSection
from model.fake import FakeRunner
from server.metrics import Metrics

CONFIGS = Path(__file__).parents[2] / "configs"

#: The names promised to people who build dashboards of their own.
PROMISED = {
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "num_preemptions_total",
    "request_success_total",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket",
    "request_prefill_time_seconds_bucket",
    "request_decode_time_seconds_bucket",
    "iteration_tokens_bucket",
    "kv_cache_bytes",
    "kv_cache_pages",
    "kv_tokens_capacity",
    "kv_bytes_per_token",
    "model_weights_bytes",
    "process_resident_memory_bytes",
}


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Each series of a first scrape with the names of its labels."""
    client = InlineClient(FakeRunner(), SchedulerSection(), lambda: 0.0)
    page, _ = Metrics(client, lambda: "fake", "none").exposition()
    return {
        sample.name: set(sample.labels)
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def panels() -> list[dict[str, Any]]:
    dashboard = json.loads((CONFIGS / "grafana.json").read_text())
    found: list[dict[str, Any]] = dashboard["panels"]
    return found


def expressions(panels: list[dict[str, Any]]) -> list[str]:
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def test_promised_names_stand_in_the_first_scrape(exported: dict[str, set[str]]) -> None:
    assert {f"octavo_{name}" for name in PROMISED} - set(exported) == set()


def test_dashboard_draws_only_exported_metrics(
    exported: dict[str, set[str]], panels: list[dict[str, Any]]
) -> None:
    drawn = {name for text in expressions(panels) for name in re.findall(r"octavo_\w+", text)}
    assert drawn - set(exported) == set()


def test_dashboard_draws_every_promised_metric(panels: list[dict[str, Any]]) -> None:
    text = " ".join(expressions(panels))
    stems = {name.removesuffix("_bucket") for name in PROMISED}
    assert {stem for stem in stems if f"octavo_{stem}" not in text} == set()


def test_labels_in_the_dashboard_exist(
    exported: dict[str, set[str]], panels: list[dict[str, Any]]
) -> None:
    for text in expressions(panels):
        for name, selector in re.findall(r"(octavo_\w+)\{([^}]*)\}", text):
            assert set(re.findall(r"(\w+)[!=]=?~?\"", selector)) <= exported[name], text
    by = {
        (label, name)
        for text in expressions(panels)
        for label, name in re.findall(r"by \((\w+)\) \((?:rate\()?(octavo_\w+)", text)
    }
    assert len(by) > 4
    assert {(label, name) for label, name in by if label not in exported[name]} == set()


def test_panels_explain_themselves_and_do_not_overlap(panels: list[dict[str, Any]]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["type"] == "row" or panel["description"], panel["title"]
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_prometheus_scrapes_the_server_of_the_compose_file() -> None:
    assert '["octavo:8000"]' in (CONFIGS / "prometheus.yml").read_text()
    compose = (CONFIGS.parent / "docker-compose.yml").read_text()
    assert "\n  octavo:\n" in compose
    assert "./configs/prometheus.yml:" in compose
    assert "./configs/grafana.json:" in compose
