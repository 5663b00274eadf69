"""Tools and reasoning through the HTTP side, with the official client."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
from pydantic import TypeAdapter

from event_streams import chunks_of
from scheduler.client import FinishReason
from server.openai import response_models

HERMES = """\
{%- if tools %}{{ tools | tojson }} <tool_call>{% endif %}
{%- for m in messages %}[{{ m.role }}]{{ m.content }}
{%- for call in m.tool_calls or [] %}{{ call.function.arguments.a }}{% endfor %}
{{- m.tool_call_id }}{% endfor %}"""
THINKING = HERMES + "{# </think> #}<think>\n"
MISTRAL = HERMES.replace("<tool_call>", "[TOOL_CALLS]")

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "1+1?"}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TWO_CALLS = f"Let me see.\n{CALL}\n{CALL}"

Chatting = Callable[..., Any]


@pytest.fixture
def chatting(speaking: Chatting) -> Chatting:
    """Start a server whose model writes `output`."""

    def start(output: str, template: str = HERMES, **more: Any) -> Any:
        return speaking(output, template=template, **more)

    return start


@contextmanager
def api_of(live: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as api:
        yield api


def prompt_of(live: Any) -> str:
    text: str = live.text.tokenizer.decode(
        live.client.requests[0].prompt_token_ids, skip_special_tokens=False
    )
    return text


def test_calls_reach_the_client(chatting: Chatting) -> None:
    live = chatting(TWO_CALLS)
    with api_of(live) as api:
        raw = api.chat.completions.with_raw_response.create(
            model="fake", messages=[USER], tools=[TOOL]
        )
    TypeAdapter(response_models.ChatCompletion).validate_json(raw.content)
    [choice] = raw.parse().choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    first, second = choice.message.tool_calls
    assert first.id != second.id
    assert first.function.name == second.function.name == "add"
    assert json.loads(second.function.arguments) == {"a": 1}
    assert '"name": "add"' in prompt_of(live)


@pytest.mark.parametrize("width", [1, 7, 1000])
def test_a_stream_of_calls_adds_up(chatting: Chatting, width: int) -> None:
    live = chatting(TWO_CALLS, width=width)
    content = ""
    calls: list[Any] = []
    reasons: list[str | None] = []
    with api_of(live) as api:
        for chunk in api.chat.completions.create(
            model="fake", messages=[USER], tools=[TOOL], stream=True
        ):
            TypeAdapter(response_models.ChatChunk).validate_json(
                chunk.model_dump_json(exclude_unset=True)
            )
            [choice] = chunk.choices
            content += choice.delta.content or ""
            calls += choice.delta.tool_calls or []
            reasons.append(choice.finish_reason)
    assert content == "Let me see."
    begun = [call for call in calls if call.id]
    assert [call.index for call in begun] == [0, 1]
    assert [(call.type, call.function.name) for call in begun] == [("function", "add")] * 2
    for index in (0, 1):
        [first, *more] = [call for call in calls if call.index == index]
        assert first.function.arguments == ""
        assert not any(call.id or call.type or call.function.name for call in more)
        assert "".join(call.function.arguments for call in more) == '{"a": 1}'
        assert len(more) > 3 or width > 1
    assert reasons == [*[None] * (len(reasons) - 1), "tool_calls"]


def test_the_openai_clients_own_stream_helper_reads_it(chatting: Chatting) -> None:
    live = chatting(TWO_CALLS, width=3)
    with (
        api_of(live) as api,
        api.chat.completions.stream(model="fake", messages=[USER], tools=[TOOL]) as stream,
    ):
        message = stream.get_final_completion().choices[0].message
    assert [call.function.arguments for call in message.tool_calls] == ['{"a": 1}'] * 2


def test_a_message_that_only_calls_has_no_content(chatting: Chatting) -> None:
    body = chatting(CALL).post("/v1/chat/completions", messages=[USER], tools=[TOOL]).json()
    assert body["choices"][0]["message"]["content"] is None


@pytest.mark.parametrize("is_stream", [False, True])
def test_each_of_several_choices_is_read_on_its_own(chatting: Chatting, is_stream: bool) -> None:
    live = chatting(CALL, width=5)
    asked = {"messages": [USER], "tools": [TOOL], "n": 2, "stream": is_stream}
    answer = live.post("/v1/chat/completions", **asked)
    bodies = [answer.json()] if not is_stream else chunks_of(answer.content)
    choices = [choice for body in bodies for choice in body["choices"]]
    parts = [choice.get("message") or choice.get("delta") for choice in choices]
    told = {0: "", 1: ""}
    for choice, part in zip(choices, parts, strict=True):
        for call in part.get("tool_calls", []):
            told[choice["index"]] += call["function"]["arguments"]
    assert told == {0: '{"a": 1}', 1: '{"a": 1}'}


def test_tool_choice_none_hides_the_tools(chatting: Chatting) -> None:
    live = chatting(CALL)
    asked = {"messages": [USER], "tools": [TOOL], "tool_choice": "none"}
    [choice] = live.post("/v1/chat/completions", **asked).json()["choices"]
    assert choice["message"]["content"] == CALL
    assert choice["finish_reason"] == "stop"
    assert "add" not in prompt_of(live)


def test_without_parallel_calls_the_first_is_told(chatting: Chatting) -> None:
    live = chatting(TWO_CALLS)
    asked = {"messages": [USER], "tools": [TOOL], "parallel_tool_calls": False}
    [choice] = live.post("/v1/chat/completions", **asked).json()["choices"]
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["octavo"] == {"left_out": {"num_tool_calls": 1}}


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_call_cut_by_the_limit_is_told_apart(chatting: Chatting, is_stream: bool) -> None:
    live = chatting("Hm.\n" + CALL[:20], reason=FinishReason.LENGTH)
    asked = {"messages": [USER], "tools": [TOOL], "stream": is_stream}
    answer = live.post("/v1/chat/completions", **asked)
    [choice] = (chunks_of(answer.content)[-1] if is_stream else answer.json())["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["octavo"] == {"left_out": {"cut_tool_call": CALL[:20]}}


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_call_cut_within_its_arguments_is_shown_as_far_as_it_came(
    chatting: Chatting, is_stream: bool
) -> None:
    live = chatting(CALL + CALL[:-18], reason=FinishReason.LENGTH)
    asked = {"messages": [USER], "tools": [TOOL], "stream": is_stream}
    answer = live.post("/v1/chat/completions", **asked)
    bodies = chunks_of(answer.content) if is_stream else [answer.json()]
    choices = [choice for body in bodies for choice in body["choices"]]
    told: list[str] = []
    for choice in choices:
        for call in (choice.get("message") or choice["delta"]).get("tool_calls", []):
            told += [""] if "id" in call else []
            told[-1] += call["function"]["arguments"]
    assert told == ['{"a": 1}', '{"a"']
    assert choices[-1]["finish_reason"] == "length"
    assert choices[-1]["octavo"] == {"left_out": {"cut_tool_call": ""}}


def test_mistral_calls_have_ids_its_template_accepts(chatting: Chatting) -> None:
    live = chatting('[TOOL_CALLS]add[ARGS]{"a": 1}', MISTRAL)
    [choice] = live.post("/v1/chat/completions", messages=[USER], tools=[TOOL]).json()["choices"]
    [call] = choice["message"]["tool_calls"]
    assert len(call["id"]) == 9
    assert call["id"].isalnum()


def test_history_of_calls_reaches_the_template(chatting: Chatting) -> None:
    live = chatting("2")
    called = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 7}'}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]
    with api_of(live) as api:
        answer = api.chat.completions.create(model="fake", messages=messages, tools=[TOOL])
    assert answer.choices[0].message.content == "2"
    assert prompt_of(live).endswith("[user]1+1?[assistant]7[tool]2c1")


@pytest.mark.parametrize("is_stream", [False, True])
def test_reasoning_stands_apart(chatting: Chatting, is_stream: bool) -> None:
    live = chatting("One and one.\n</think>\n\nTwo.", THINKING)
    answer = live.post("/v1/chat/completions", messages=[USER], stream=is_stream)
    bodies = chunks_of(answer.content) if is_stream else [answer.json()]
    parts = [
        choice.get("delta") or choice.get("message") or {}
        for body in bodies
        for choice in body["choices"]
    ]
    assert "".join(part.get("reasoning_content") or "" for part in parts) == "One and one."
    assert "".join(part.get("content") or "" for part in parts) == "Two."


def test_reasoning_may_be_left_out(chatting: Chatting) -> None:
    live = chatting("One.</think>Two.", THINKING)
    asked = {"messages": [USER], "include_reasoning": False}
    message = live.post("/v1/chat/completions", **asked).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "Two.", "refusal": None}


def test_each_token_of_a_call_tells_its_probability_once(chatting: Chatting) -> None:
    live = chatting(CALL, width=4)
    asked = {"messages": [USER], "tools": [TOOL], "logprobs": True, "stream": True}
    events = chunks_of(live.post("/v1/chat/completions", **asked).content)
    listed = [choice["logprobs"] for event in events for choice in event["choices"]]
    tokens = [entry["token"] for one in listed if one for entry in one["content"]]
    assert "".join(tokens) == CALL


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [TOOL, {"type": "web_search"}]}, "tools.1.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [TOOL, TOOL]}, "tools.1.function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {
                "tools": [TOOL],
                "tool_choice": {"type": "function", "function": {"name": "subtract"}},
            },
            "tool_choice",
        ),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "perhaps"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools.0.custom.name"),
        ({"messages": [USER, {"role": "tool", "content": "2"}]}, "messages.1"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "x"}]}]},
            "messages.1.tool_calls.0.type",
        ),
    ],
)
def test_what_is_wrong_with_tools_is_named(
    chatting: Chatting, asked: dict[str, Any], param: str
) -> None:
    answer = chatting("").post("/v1/chat/completions", **({"messages": [USER]} | asked))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


CUSTOM = {"type": "custom", "custom": {"name": "sh", "description": "Runs it."}}
CUSTOM_CALL = '<tool_call>\n{"name": "sh", "arguments": {"input": "echo \\"a\\"\\n"}}\n</tool_call>'


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_custom_tool_gets_a_text(chatting: Chatting, is_stream: bool) -> None:
    # The whole of the tools is longer than the context.
    shown = "{{ tools[1].function.parameters | tojson }}<tool_call>{{ messages[0].content }}"
    live = chatting(f"{CALL}\n{CUSTOM_CALL}", template=shown, width=3)
    asked = {"messages": [USER], "tools": [TOOL, CUSTOM], "stream": is_stream}
    answer = live.post("/v1/chat/completions", **asked)
    if is_stream:
        deltas = [event["choices"][0]["delta"] for event in chunks_of(answer.content)]
        calls = [call for delta in deltas for call in delta.get("tool_calls", ()) if call["index"]]
        assert (calls[0]["type"], calls[0]["custom"]["name"]) == ("custom", "sh")
        assert "".join(call["custom"]["input"] for call in calls) == 'echo "a"\n'
    else:
        TypeAdapter(response_models.ChatCompletion).validate_python(answer.json())
        function, custom = answer.json()["choices"][0]["message"]["tool_calls"]
        assert function["function"]["arguments"] == '{"a": 1}'
        assert custom["custom"] == {"name": "sh", "input": 'echo "a"\n'}
    assert '"input"' in prompt_of(live)


def test_what_a_custom_tool_was_called_with_is_shown_again(chatting: Chatting) -> None:
    call = {"id": "c", "type": "custom", "custom": {"name": "sh", "input": "ls"}}
    said = [USER, {"role": "assistant", "tool_calls": [call]}]
    result = {"role": "tool", "tool_call_id": "c", "content": "a"}
    source = HERMES.replace("arguments.a", "arguments.input")
    live = chatting("", template=source)
    answer = live.post("/v1/chat/completions", messages=[*said, result], tools=[CUSTOM])
    assert answer.status_code == 200, answer.text
    assert "[assistant]ls[tool]ac" in prompt_of(live)


def test_allowed_tools_are_shown_alone(chatting: Chatting) -> None:
    live = chatting("no")
    allowed = {"mode": "auto", "tools": [{"type": "custom", "custom": {"name": "sh"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    asked = {"messages": [USER], "tools": [TOOL, CUSTOM], "tool_choice": choice}
    assert live.post("/v1/chat/completions", **asked).status_code == 200
    assert '"sh"' in prompt_of(live)
    assert '"add"' not in prompt_of(live)


@pytest.mark.parametrize(
    ("template", "section"),
    [
        ("{{ messages }}", {"tools_in_prompt": "off"}),
        (HERMES.replace("<tool_call>", "<minimax:call>"), {}),
        (HERMES, {"tool_call_parser": "none"}),
    ],
    ids=["no place", "a format that is not read", "nothing to be read"],
)
def test_a_model_whose_calls_are_not_read_refuses_tools(
    chatting: Chatting, template: str, section: dict[str, Any]
) -> None:
    live = chatting("x", template, model=section)
    error = live.chat(tools=[TOOL]).json()["error"]
    assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")
    assert "template" in error["message"]


def test_what_of_a_tool_has_no_effect_is_told(chatting: Chatting) -> None:
    tool = {"type": "function", "x": 1, "function": {"name": "add", "strict": True, "y": 2}}
    body = chatting("2").post("/v1/chat/completions", messages=[USER], tools=[tool]).json()
    told = {warning["param"] for warning in body["octavo"]["warnings"]}
    assert told == {"tools.0.x", "tools.0.function.y", "tools.0.function.strict"}
