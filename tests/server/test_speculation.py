"""The effect of drafts on requests and reports: none but counts."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from scheduler.client import FinishReason, GenerateRequest, TokenOutput
from scheduler.stats import DraftStats, EngineStats, SchedulerStats, SpeculationStats


async def _drafted(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
    drafts = (4, 1) if request.may_speculate else (0, 0)
    yield TokenOutput((72, 73), draft_tokens=drafts[0], accepted_draft_tokens=drafts[1])
    yield TokenOutput((74,), finish_reason=FinishReason.STOP)


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5}),
    ],
)
@pytest.mark.parametrize("speculation", [None, True, False])
def test_a_request_may_go_without(
    scripted: Callable[..., Any], route: str, body: dict[str, Any], speculation: bool | None
) -> None:
    live = scripted(_drafted)
    answer = live.post(route, **body, speculation=speculation)
    assert answer.status_code == 200, answer.text
    assert "warnings" not in answer.json().get("octavo", {}) or not [
        one for one in answer.json()["octavo"]["warnings"] if one["param"] == "speculation"
    ]
    assert [request.may_speculate for request in live.client.requests] == [speculation is not False]


def test_a_wrong_value_is_named(scripted: Callable[..., Any]) -> None:
    answer = scripted(_drafted).chat(speculation="no")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "speculation"


def test_usage_counts_drafts_of_all_choices(scripted: Callable[..., Any]) -> None:
    answer = scripted(_drafted).chat(n=2).json()
    assert answer["usage"]["completion_tokens_details"] == {
        "accepted_prediction_tokens": 2,
        "rejected_prediction_tokens": 6,
    }
    assert answer["octavo"]["speculation"] == {"offered": 8, "accepted": 2}


def test_without_drafts_there_is_nothing_to_report(scripted: Callable[..., Any]) -> None:
    answer = scripted(_drafted).chat(speculation=False).json()
    assert "completion_tokens_details" not in answer["usage"]
    assert "speculation" not in answer["octavo"]


def test_metrics_by_drafter_and_by_place(scripted: Callable[..., Any]) -> None:
    live = scripted(_drafted)
    stem = "octavo_spec_decode_num"
    assert live.metric(stem + '_draft_tokens_total{drafter="suffix"}') == 0
    assert live.metric(stem + '_accepted_tokens_per_pos_total{position="0"}') == 0

    def counted(offered: int, accepted: int, *by_position: int) -> EngineStats:
        drafts = SpeculationStats((DraftStats("suffix", offered, accepted),), by_position)
        return EngineStats(SchedulerStats(speculation=drafts))

    live.client.engine_stats = counted(9, 5, 3, 2)
    assert live.metric(stem + '_draft_tokens_total{drafter="suffix"}') == 9
    assert live.metric(stem + '_accepted_tokens_total{drafter="suffix"}') == 5
    assert live.metric(stem + '_accepted_tokens_per_pos_total{position="1"}') == 2
    # Another engine counts on.
    live.client.engine_stats = counted(4, 1, 1)
    assert live.metric(stem + '_draft_tokens_total{drafter="suffix"}') == 13
    assert live.metric(stem + '_accepted_tokens_per_pos_total{position="0"}') == 4
    assert live.metric(stem + '_accepted_tokens_per_pos_total{position="1"}') == 2
