"""The operator's settings of a model: its sampling, its calls of tools and its reasoning."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import TypeAdapter

from event_streams import chunks_of
from scheduler.client import FinishReason, GenerateRequest, TokenOutput
from server.generation.sampling import makers_sampling
from server.openai import response_models
from server.text.load import ModelText
from server.text.template import ChatTemplate

USER = [{"role": "user", "content": "1+1?"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
THINKING = PLAIN + "{# </think> #}"
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


def says(output: str) -> Any:
    async def script(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        assert request.prompt_token_ids
        for byte in output.encode():
            yield TokenOutput((byte,))
        yield TokenOutput(finish_reason=FinishReason.STOP)

    return script


@pytest.fixture
def start(scripted: Callable[..., Any], text: ModelText) -> Callable[..., Any]:
    """Start a server with a model of this template and output."""

    def started(output: str = "hi", template: str = PLAIN, **model: Any) -> Any:
        words = ChatTemplate(
            {"default": template}, special_tokens={}, now=lambda: datetime.now(tz=UTC)
        )
        defaults = model.pop("defaults", {})
        words_of_model = replace(text, template=words, sampling_defaults=defaults)
        return scripted(says(output), words=words_of_model, model=model)

    return started


# ---- generation_config.json

DEFAULTS = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}
NEUTRAL = {"temperature": 1, "top_p": 1, "top_k": 0, "repetition_penalty": 1}


@pytest.mark.parametrize("route", ["chat", "completion"])
def test_requests_that_do_not_say_get_the_models_sampling(
    start: Callable[..., Any], route: str
) -> None:
    live = start(defaults=DEFAULTS)

    def ask(**body: Any) -> Any:
        if route == "chat":
            assert live.chat(**body).status_code == 200
        else:
            assert live.post("/v1/completions", prompt="x", **body).status_code == 200
        return live.client.requests[-1].params

    params = ask()
    assert {name: getattr(params, name) for name in DEFAULTS} == DEFAULTS
    params = ask(**NEUTRAL)
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (
        1,
        1,
        0,
        1,
    )
    assert ask(top_k=-1).top_k == 0
    [card] = live.http.get("/v1/models").json()["data"]
    assert card["sampling_defaults"] == DEFAULTS


def test_they_can_be_left_out(start: Callable[..., Any]) -> None:
    live = start(defaults=DEFAULTS, generation_config="vllm")
    live.chat()
    params = live.client.requests[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (
        1,
        1,
        0,
        1,
    )
    assert live.http.get("/v1/models").json()["data"][0]["sampling_defaults"] == {}


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"temperature": "0.6", "top_p": "1"}, {"temperature": 0.6, "top_p": 1.0}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": "20"}, {"top_k": 20}),
        ({"top_k": 20.0}, {"top_k": 20}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": None}, {}),
        ({"max_new_tokens": "many", "eos_token_id": 2}, {}),
    ],
)
def test_what_can_be_meant_is_taken(stated: dict[str, Any], expected: dict[str, float]) -> None:
    assert makers_sampling(stated) == (expected, [])


ODD = [10**400, math.inf, -math.inf, math.nan, "", "warm", "nan", "1e999", True, [1], {}]


CASES = [(name, value) for name in DEFAULTS for value in ODD]
CASES += [("temperature", -1), ("temperature", 2.1), ("top_p", 2), ("top_p", 0), ("top_k", 0.5)]
CASES += [("repetition_penalty", 0), ("repetition_penalty", -1)]


@pytest.mark.parametrize(("name", "value"), CASES, ids=lambda one: repr(one)[:20])
def test_what_no_request_could_have_is_left_out_and_said(
    start: Callable[..., Any], name: str, value: Any
) -> None:
    """An odd value once ended the start with a traceback."""
    live = start(defaults={name: value, "min_p": 0.1})
    assert live.chat().status_code == 200
    assert live.http.get("/v1/models").json()["data"][0]["sampling_defaults"] == {"min_p": 0.1}
    taken, [note] = makers_sampling({name: value, "min_p": 0.1})
    assert taken == {"min_p": 0.1}
    assert note.startswith(f"generation_config.json: {name}: ")
    assert "\n" not in note
    assert len(note) < 300


@pytest.mark.parametrize("value", [0, "false", [], {}])
def test_a_do_sample_that_is_no_truth_value_is_said(value: Any) -> None:
    taken, [note] = makers_sampling({"do_sample": value})
    assert taken == {}
    assert "do_sample" in note


# ---- parsers by name


def test_a_parser_may_be_named_where_the_template_does_not_tell(start: Callable[..., Any]) -> None:
    asked, off = {"tools": [TOOL]}, {"tools_in_prompt": "off"}
    assert start(CALL, **off).chat(**asked).status_code == 400
    [choice] = start(CALL, **off, tool_call_parser="hermes").chat(**asked).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    llama = json.dumps({"name": "add", "parameters": {}})
    [choice] = start(llama, tool_call_parser="llama3_json").chat(**asked).json()["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "add"
    mistral = "[TOOL_CALLS]add[ARGS]{}"
    [choice] = start(mistral, tool_call_parser="mistral").chat(**asked).json()["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "add"


def test_none_reads_nothing_whatever_the_template_says(start: Callable[..., Any]) -> None:
    hermes = "{% if tools %}<tool_call>{% endif %}" + THINKING
    live = start("<think>hm</think>yes", hermes, tool_call_parser="none", reasoning_parser="none")
    assert live.chat(tools=[TOOL]).status_code == 400
    [choice] = live.chat().json()["choices"]
    assert choice["message"]["content"] == "<think>hm</think>yes"


@pytest.mark.parametrize(
    ("name", "output", "reasoning"),
    [
        ("qwen3", "<think>hm</think>yes", "hm"),
        ("qwen3", "hm</think>yes", None),
        ("deepseek_r1", "hm</think>yes", "hm"),
        ("deepseek_r1", "<think>hm</think>yes", "hm"),
        ("mistral", "[THINK]hm[/THINK]yes", "hm"),
    ],
)
def test_reasoning_parsers(
    start: Callable[..., Any], name: str, output: str, reasoning: str | None
) -> None:
    body = start(output, reasoning_parser=name).chat().json()
    message = body["choices"][0]["message"]
    assert message.get("reasoning_content") == reasoning
    assert message["content"] == ("yes" if reasoning else output)
    told = body["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert told == len(reasoning or "")


def test_implied_reasoning_ends_where_the_prompt_ended_it(start: Callable[..., Any]) -> None:
    live = start("yes", PLAIN + "<think>\n\n</think>\n", reasoning_parser="deepseek_r1")
    assert live.chat().json()["choices"][0]["message"]["content"] == "yes"


# ---- reasoning_tokens


@pytest.mark.parametrize("has_reasoning", [True, False])
def test_usage_tells_the_tokens_of_the_reasoning(
    start: Callable[..., Any], has_reasoning: bool
) -> None:
    live = start("<think>hm</think>yes", THINKING)
    answer = live.chat(n=2, include_reasoning=has_reasoning)
    TypeAdapter(response_models.ChatCompletion).validate_json(answer.content)
    assert answer.json()["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}
    answer = live.chat(stream=True, stream_options={"include_usage": True})
    assert chunks_of(answer.content)[-1]["usage"]["completion_tokens_details"] == {
        "reasoning_tokens": 2
    }


def test_a_model_that_does_not_reason_has_no_such_count(start: Callable[..., Any]) -> None:
    assert "completion_tokens_details" not in start("yes").chat().json()["usage"]


# ---- reasoning_effort


def test_the_effort_reaches_a_template_that_knows_it(start: Callable[..., Any]) -> None:
    live = start(template="{{ reasoning_effort or 'none' }}" + PLAIN)

    def prompt(**asked: Any) -> str:
        answer = live.chat(**asked)
        assert answer.json()["octavo"]["warnings"] == []
        ids = live.client.requests[-1].prompt_token_ids
        said: str = live.text.tokenizer.decode(ids, skip_special_tokens=False)
        return said

    assert prompt().startswith("none")
    assert prompt(reasoning_effort="high").startswith("high")
    by_hand = {"reasoning_effort": "low"}
    assert prompt(reasoning_effort="high", chat_template_kwargs=by_hand).startswith("low")


@pytest.mark.parametrize(("effort", "num_warnings"), [("high", 1), ("none", 0), (None, 0)])
def test_else_it_is_warned_of(
    start: Callable[..., Any], effort: str | None, num_warnings: int
) -> None:
    warnings = start().chat(reasoning_effort=effort).json()["octavo"]["warnings"]
    assert [entry["param"] for entry in warnings] == ["reasoning_effort"] * num_warnings


# ---- /tokenize


def test_tokenize_counts_tools_as_a_chat_does(start: Callable[..., Any]) -> None:
    live = start(template="{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}" + PLAIN)
    live.chat("hello", tools=[TOOL])
    asked = {"messages": [{"role": "user", "content": "hello"}], "tools": [TOOL]}
    answer = live.post("/tokenize", **asked, return_token_strs=True).json()
    assert tuple(answer["tokens"]) == live.client.requests[-1].prompt_token_ids
    assert "".join(answer["token_strs"]).startswith('[{"type": "function"')
    assert len(live.post("/tokenize", messages=asked["messages"]).json()["tokens"]) == 5


def test_tokenize_goes_on_with_a_message(start: Callable[..., Any]) -> None:
    live = start(template=PLAIN + "{% if add_generation_prompt %}A:{% endif %}")
    asked = {"messages": USER, "continue_final_message": True}
    assert live.post("/tokenize", **asked).json()["tokens"] == [*b"1+1?"]


def test_arguments_are_typed_by_the_tools_schema(start: Callable[..., Any]) -> None:
    template = "{% if tools %}<tool_call>\n<function=example>{% endif %}" + PLAIN
    output = (
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
    )
    for kind, expected in (("integer", 1), ("string", "1")):
        schema = {"type": "object", "properties": {"a": {"type": kind}}}
        tool = {"type": "function", "function": {"name": "add", "parameters": schema}}
        [choice] = start(output, template).chat(tools=[tool]).json()["choices"]
        [call] = choice["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"a": expected}
