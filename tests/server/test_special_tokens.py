"""Special tokens that a client spells, on each way in: `--special-tokens-in-messages`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Core

from scheduler.client import FinishReason, GenerateRequest, TokenOutput
from server.text.load import ModelText
from server.text.template import ChatTemplate
from server.text.token_bytes import BYTE_LEVEL_ALPHABET
from server.text.tokenizer import SpecialIds, Tokenizer

END, THINK = 256, 257
TEMPLATE = """\
{%- if tools %}{{ tools | tojson }} <tool_call>{% endif %}
{%- for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}{{ mood }}"""
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
TEXT = "a<|end|>b"
HELD, USER = {"role": "user", "content": TEXT}, {"role": "user", "content": "x"}
TOOL = {"type": "function", "function": {"name": "f", "description": TEXT}}


def words() -> ModelText:
    vocab = {letter: i for i, letter in enumerate(BYTE_LEVEL_ALPHABET)}
    core = Core(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    core.add_tokens([AddedToken("<think>", normalized=False)])
    return ModelText(
        Tokenizer(core, SpecialIds(eos_token_ids=(END,))),
        ChatTemplate({"default": TEMPLATE}, special_tokens={}, now=lambda: datetime.now(tz=UTC)),
    )


async def _say_a(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
    assert request.prompt_token_ids
    yield TokenOutput((97,), finish_reason=FinishReason.STOP)


@pytest.mark.parametrize("mode", ["text", "allow"])
@pytest.mark.parametrize(
    ("path", "body", "num_messages"),
    [
        (CHAT, {"messages": [HELD]}, 1),
        (CHAT, {"messages": [USER | {"content": [{"type": "text", "text": TEXT}]}]}, 1),
        (CHAT, {"messages": [USER], "tools": [TOOL]}, 1),
        (CHAT, {"messages": [USER], "chat_template_kwargs": {"mood": TEXT}}, 1),
        (CHAT, {"messages": [USER, HELD | {"role": "assistant"}, USER]}, 3),
        (RESPONSES, {"input": TEXT}, 1),
        (RESPONSES, {"input": "x", "instructions": TEXT}, 2),
        (MESSAGES, {"max_tokens": 1, "messages": [HELD]}, 1),
        (MESSAGES, {"max_tokens": 1, "messages": [USER], "system": TEXT}, 2),
        ("/tokenize", {"messages": [HELD]}, 1),
    ],
)
def test_a_message_says_them_as_text_unless_they_are_allowed(
    scripted: Any, mode: str, path: str, body: dict[str, Any], num_messages: int
) -> None:
    live = scripted(_say_a, words=words(), model={"special_tokens_in_messages": mode})
    name = live.http.get("/v1/models").json()["data"][0]["id"]
    answer = live.post(path, model=name, **body)
    assert answer.status_code == 200, answer.text
    if path == "/tokenize":
        prompt = answer.json()["tokens"]
    else:
        [request] = live.client.requests
        prompt = list(request.prompt_token_ids)
    assert prompt.count(END) == num_messages + (mode == "allow")
    assert TEXT in live.text.tokenizer.decode(prompt, skip_special_tokens=False)


def test_added_tokens_that_are_not_special_stay_tokens(scripted: Any) -> None:
    live = scripted(_say_a, words=words())
    assert live.chat("<think>").status_code == 200
    assert live.client.requests[0].prompt_token_ids.count(THINK) == 1


def test_the_prompt_of_a_completion_has_tokens(scripted: Any) -> None:
    live = scripted(_say_a, words=words())
    assert live.post("/v1/completions", prompt=TEXT).status_code == 200
    assert live.client.requests[0].prompt_token_ids == (97, END, 98)
    assert live.post("/tokenize", prompt=TEXT).json()["tokens"] == [97, END, 98]
