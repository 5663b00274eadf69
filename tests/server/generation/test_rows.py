"""A token that the tokenizer knows and the model has no row for is refused on every way in."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Core

from scheduler.client import FinishReason, GenerateRequest, TokenOutput
from server.generation.prompts import row_notes
from server.text.load import ModelText
from server.text.template import ChatTemplate
from server.text.token_bytes import BYTE_LEVEL_ALPHABET
from server.text.tokenizer import SpecialIds, Tokenizer

#: Its id is 300, as many as the model has rows.
EXTRA = "<extra>"
SHOWS_ALL = """\
{%- if tools %}{{ tools | tojson }} <tool_call>{% endif %}{{ mood }}
{%- for m in messages %}[{{ m.role }}]{{ m.content }}{{ m.name }}{{ m.reasoning_content }}
{%- for call in m.tool_calls or [] %}{{ call.id }}:{{ call.function | tojson }}{% endfor %}
{{- m.tool_call_id }}{% endfor %}"""
USER = {"role": "user", "content": "x"}
HELD = {"role": "user", "content": f"a{EXTRA}b"}
CALLED = {
    "id": "1",
    "type": "function",
    "function": {"name": "f", "arguments": f'{{"a":"{EXTRA}"}}'},
}
TOOL = {"type": "function", "function": {"name": "f", "description": EXTRA}}
CHAT, COMPLETION, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"


def extended() -> Tokenizer:
    """Return a tokenizer of bytes, numbers up to 299, and one token more."""
    tokens = [*BYTE_LEVEL_ALPHABET, *(f"Ġ{i}" for i in range(256, 300))]
    core = Core(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_tokens([AddedToken(EXTRA, normalized=False)])
    return Tokenizer(core, SpecialIds(eos_token_ids=(0,)))


def words(template: str) -> ModelText:
    return ModelText(
        extended(),
        ChatTemplate({"default": template}, special_tokens={}, now=lambda: datetime.now(tz=UTC)),
    )


async def _say_a(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
    assert max(request.prompt_token_ids) < 300, "the engine was asked for a row that is not there"
    assert all(max(word) < 300 for word in request.params.bad_words), "likewise"
    yield TokenOutput((97,), finish_reason=FinishReason.STOP)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": [USER, HELD]}, "messages.1"),
        (CHAT, {"messages": [USER | {"name": EXTRA}]}, "messages.0"),
        (CHAT, {"messages": [{"role": "system", "content": EXTRA}, USER]}, "messages.0"),
        (CHAT, {"messages": [USER, {"role": "assistant", "tool_calls": [CALLED]}]}, "messages.1"),
        (CHAT, {"messages": [USER], "tools": [TOOL]}, "tools"),
        (
            CHAT,
            {"messages": [USER], "chat_template_kwargs": {"mood": EXTRA}},
            "chat_template_kwargs",
        ),
        (CHAT, {"messages": [USER], "bad_words": ["x", EXTRA]}, "bad_words"),
        (CHAT, {"messages": [USER], "logit_bias": {"300": 1}}, "logit_bias"),
        (CHAT, {"messages": [USER], "stop_token_ids": [300]}, "stop_token_ids"),
        (CHAT, {"messages": [USER], "allowed_token_ids": [300]}, "allowed_token_ids"),
        (COMPLETION, {"prompt": EXTRA}, "prompt"),
        (COMPLETION, {"prompt": ["x", EXTRA]}, "prompt"),
        (COMPLETION, {"prompt": [97, 300]}, "prompt"),
        (COMPLETION, {"prompt": [[97], [97, 300]]}, "prompt.1"),
        (COMPLETION, {"prompt": "x", "bad_words": [EXTRA]}, "bad_words"),
        (RESPONSES, {"input": EXTRA}, "input.0"),
        (RESPONSES, {"input": "x", "instructions": EXTRA}, "instructions"),
        (MESSAGES, {"max_tokens": 1, "messages": [HELD]}, "messages.0"),
        (MESSAGES, {"max_tokens": 1, "messages": [USER], "system": EXTRA}, "system"),
        (COUNT, {"messages": [HELD]}, "messages.0"),
        ("/tokenize", {"prompt": EXTRA}, "prompt"),
        ("/tokenize", {"messages": [HELD]}, "messages.0"),
        ("/detokenize", {"tokens": [300]}, "tokens"),
    ],
)
def test_every_way_in_names_the_field_that_holds_it(
    scripted: Any, path: str, body: dict[str, Any], param: str
) -> None:
    live = scripted(_say_a, words=words(SHOWS_ALL))
    model = {"model": live.http.get("/v1/models").json()["data"][0]["id"]}
    answer = live.post(path, **body, **(model if path in {MESSAGES, COUNT} else {}))
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert not live.client.requests


def test_what_the_template_writes_itself_is_refused_too(scripted: Any) -> None:
    live = scripted(_say_a, words=words(EXTRA + SHOWS_ALL))
    error = live.chat("x").json()["error"]
    assert error["param"] == "messages"
    assert "'<extra>', token 300 of the tokenizer; the model has only 300" in error["message"]


def test_a_conversation_that_was_stored_does_not_bring_it_in(scripted: Any) -> None:
    async def say_it(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        assert request.prompt_token_ids
        yield TokenOutput(tuple(EXTRA.encode()), finish_reason=FinishReason.STOP)

    live = scripted(say_it, words=words(SHOWS_ALL))
    first = live.post(RESPONSES, input="x").json()["id"]
    answer = live.post(RESPONSES, input="y", previous_response_id=first)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "previous_response_id"
    assert len(live.client.requests) == 1


def test_texts_without_it_are_served(scripted: Any) -> None:
    live = scripted(_say_a, words=words(SHOWS_ALL))
    assert live.chat("<extr a> 299").status_code == 200
    assert live.post("/tokenize", prompt="<extra").json()["tokens"] == list(b"<extra")


def test_the_start_notes_it() -> None:
    assert row_notes(extended(), 301) == []
    [note] = row_notes(extended(), 299)
    assert note.startswith("the tokenizer has 301 tokens, the model 299 rows: ")
    assert note.endswith("texts with the ids 299 to 300 are refused")
