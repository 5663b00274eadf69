"""`bad_words` and `allowed_token_ids` on their way from a body to the engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from scheduler.client import FinishReason, GenerateRequest, SamplingParams, TokenOutput
from server.generation import request_fields

COMPLETION = "/v1/completions"
CHAT = "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETION: {"prompt": "x"},
    CHAT: {"messages": [{"role": "user", "content": "x"}]},
}


@pytest.fixture(scope="module")
def roomy(start_shared: Callable[..., Any]) -> Any:
    """A server that takes bodies of the usual size."""
    return start_shared()


async def _silence(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
    assert request.prompt_token_ids
    yield TokenOutput(finish_reason=FinishReason.LENGTH)


def _params(scripted: Callable[..., Any], path: str, **asked: Any) -> SamplingParams:
    live = scripted(_silence)
    answer = live.post(path, **BODIES[path], **asked)
    assert answer.status_code == 200, answer.text
    assert answer.json()["octavo"]["warnings"] == []
    params: SamplingParams = live.client.requests[0].params
    return params


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("words", "sequences"),
    [
        (["ab"], ((97, 98), (32, 97, 98))),
        ([" ab", "ab"], ((97, 98), (32, 97, 98))),
        (["\n", " "], ((10,), (32, 10), (32,))),
        (["é"], ((195, 169), (32, 195, 169))),
        ([], ()),
        (None, ()),
    ],
    ids=["one", "twice", "spaces", "two bytes", "none", "null"],
)
def test_words_are_banned_with_a_space_and_without(
    scripted: Callable[..., Any],
    path: str,
    words: list[str] | None,
    sequences: tuple[tuple[int, ...], ...],
) -> None:
    assert _params(scripted, path, bad_words=words).bad_words == sequences


@pytest.mark.parametrize("path", BODIES)
def test_allowed_tokens_reach_the_engine_once_each(scripted: Callable[..., Any], path: str) -> None:
    params = _params(scripted, path, allowed_token_ids=[5, 299, 5])
    assert params.allowed_token_ids == (5, 299)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [3, 300]}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"allowed_token_ids": ["3"]}, "allowed_token_ids.0"),
        ({"allowed_token_ids": [1] * (request_fields.MAX_ALLOWED_TOKENS + 1)}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words.0"),
        ({"bad_words": "word"}, "bad_words"),
        ({"bad_words": ["x" * (request_fields.MAX_BAD_WORD_CHARS + 1)]}, "bad_words.0"),
        ({"bad_words": ["x"] * (request_fields.MAX_BAD_WORDS + 1)}, "bad_words"),
        ({"bad_words": [3] * 9}, "bad_words.0"),
    ],
)
def test_wrong_ones_are_refused(roomy: Any, path: str, asked: dict[str, Any], param: str) -> None:
    answer = roomy.post(path, **BODIES[path], **asked)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
