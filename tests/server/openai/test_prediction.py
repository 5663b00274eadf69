"""`prediction` reaches the engine as tokens, whatever its shape; a wrong one is named."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from scheduler.client import FinishReason, GenerateRequest, TokenOutput


async def _answer(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
    del request
    yield TokenOutput((72,), finish_reason=FinishReason.STOP)


@pytest.mark.parametrize(
    "content",
    ["hello", [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]],
)
def test_a_prediction_reaches_the_engine_as_tokens(
    scripted: Callable[..., Any], content: Any
) -> None:
    live = scripted(_answer, scheduler={"speculation": "ngram"})
    answer = live.chat(n=2, prediction={"type": "content", "content": content})
    assert answer.status_code == 200, answer.text
    assert answer.json()["octavo"]["warnings"] == []
    predicted = [request.prediction_token_ids for request in live.client.requests]
    assert predicted == [tuple(b"hello")] * 2


@pytest.mark.parametrize(
    ("speculation", "body", "reason"),
    [
        ("none", {}, "prediction was ignored: this server makes no drafts (--speculation)"),
        ("auto", {"speculation": False}, "prediction was ignored: speculation is false"),
        ("none", {"prediction": None}, None),
        ("none", {"prediction": {"type": "content", "content": ""}}, None),
    ],
)
def test_a_prediction_without_effect_is_warned_of(
    scripted: Callable[..., Any], speculation: str, body: dict[str, Any], reason: str | None
) -> None:
    live = scripted(_answer, scheduler={"speculation": speculation})
    prediction = {"type": "content", "content": "hello"}
    answer = live.chat(**({"prediction": prediction} | body))
    assert answer.status_code == 200, answer.text
    warnings = answer.json()["octavo"]["warnings"]
    assert [one["message"] for one in warnings] == ([] if reason is None else [reason])
    predicted = live.client.requests[0].prediction_token_ids
    assert bool(predicted) == (reason is not None)


@pytest.mark.parametrize("prediction", [None, {"type": "content", "content": ""}])
def test_without_a_text_there_is_no_prediction(
    scripted: Callable[..., Any], prediction: Any
) -> None:
    live = scripted(_answer)
    assert live.chat(prediction=prediction).status_code == 200
    assert live.client.requests[0].prediction_token_ids == ()


def test_of_a_prediction_as_much_is_used_as_an_answer_can_hold(
    scripted: Callable[..., Any],
) -> None:
    live = scripted(_answer)
    limit = live.client.info.max_model_len
    text = "ab" * limit
    assert live.chat(prediction={"type": "content", "content": text}).status_code == 200
    assert live.client.requests[0].prediction_token_ids == tuple(text[:limit].encode())


@pytest.mark.parametrize(
    ("prediction", "param"),
    [
        ("hello", "prediction"),
        ({"content": "x"}, "prediction.type"),
        ({"type": "text", "content": "x"}, "prediction.type"),
        ({"type": "content"}, "prediction.content"),
        ({"type": "content", "content": 3}, "prediction.content"),
        ({"type": "content", "content": [3]}, "prediction.content.0"),
        ({"type": "content", "content": [{"type": "text"}]}, "prediction.content.0.text"),
        (
            {"type": "content", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "prediction.content.0.type",
        ),
        ({"type": "content", "content": "x" * 20_000}, "prediction"),
    ],
)
def test_a_wrong_prediction_is_named(
    scripted: Callable[..., Any], prediction: Any, param: str
) -> None:
    live = scripted(_answer)
    answer = live.chat(prediction=prediction)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert param in answer.json()["error"]["message"]
    assert live.client.requests == []
