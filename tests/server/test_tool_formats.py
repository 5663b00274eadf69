"""Outputs of models of several families, as clients of the HTTP side see them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from event_streams import chunks_of

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "1+1?"}
MESSAGES = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"

#: By family: the marks of its template around calls and at the prompt's end, and an answer with
#: reasoning, text and a call.
FAMILIES = {
    "hermes": (
        "<tool_call></think>",
        (
            "<think>Hm.</think>Wait.\n"
            '<tool_call>{"name": "add", "arguments": {"s": "é", "n": [1, null]}}</tool_call>'
        ),
    ),
    "gpt-oss": (
        "<|channel|><|start|>assistant",
        (
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>"
            "Wait.<|end|><|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json"
            '<|message|>{"s": "é", "n": [1, null]}'
        ),
    ),
    "kimi-k2": (
        "<|tool_calls_section_begin|></think><think>",
        (
            "Hm.</think>Wait.<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0"
            '<|tool_call_argument_begin|>{"s": "é", "n": [1, null]}<|tool_call_end|>'
            "<|tool_calls_section_end|>"
        ),
    ),
    "kimi-k3": (
        "<|open|>think<|sep|>",
        (
            "Hm.<|close|>think<|sep|><|open|>response<|sep|>Wait.<|close|>response<|sep|>"
            '<|open|>tools<|sep|><|open|>call tool="add" index="1"<|sep|>'
            '<|open|>argument key="s" type="string"<|sep|>é<|close|>argument<|sep|>'
            '<|open|>argument key="n" type="array"<|sep|>[1, null]<|close|>argument<|sep|>'
            "<|close|>call<|sep|><|close|>tools<|sep|><|close|>message<|sep|>"
        ),
    ),
    "gemma-4": (
        "<|tool_call>call:<|channel>thought<channel|>",
        (
            "<|channel>thought\nHm.\n<channel|>Wait."
            '<|tool_call>call:add{s:<|"|>é<|"|>,n:[1,null]}<tool_call|>'
        ),
    ),
    "qwen-coder": (
        "<function=</think>",
        (
            "<think>Hm.</think>Wait.\n<tool_call>\n<function=add>\n<parameter=s>\né\n</parameter>\n"
            "<parameter=n>\n[1, null]\n</parameter>\n</function>\n</tool_call>"
        ),
    ),
    "llama-4": ("<|python_start|>", "[add(s='é', n=[1, None])]"),
}


@pytest.fixture
def family(speaking: Callable[..., Any]) -> Callable[[str], Any]:
    def start(name: str) -> Any:
        end, output = FAMILIES[name]
        template = "{% if tools %}{{ tools | tojson }}{% endif %}" + MESSAGES + end
        return speaking(output, template=template)

    return start


@pytest.mark.parametrize("name", FAMILIES)
def test_a_call_in_a_chat_whole_and_streamed(family: Callable[[str], Any], name: str) -> None:
    live = family(name)
    asked = {"messages": [USER], "tools": [TOOL]}
    [whole] = live.post("/v1/chat/completions", **asked).json()["choices"]
    message = whole["message"]
    if name != "llama-4":
        assert (message["reasoning_content"], message["content"]) == ("Hm.", "Wait.")
    [call] = message["tool_calls"]
    assert call["function"]["name"] == "add"
    assert json.loads(call["function"]["arguments"]) == {"s": "é", "n": [1, None]}
    assert whole["finish_reason"] == "tool_calls"
    chunks = chunks_of(live.post("/v1/chat/completions", **asked, stream=True).content)
    told = {"content": "", "reasoning_content": "", "arguments": ""}
    num_deltas = 0
    for chunk in chunks:
        for choice in chunk["choices"]:
            for added in choice["delta"].get("tool_calls", []):
                told["arguments"] += added["function"]["arguments"]
                num_deltas += 1
            for part in ("content", "reasoning_content"):
                told[part] += choice["delta"].get(part) or ""
    assert told == {
        "content": message["content"] or "",
        "reasoning_content": message.get("reasoning_content", ""),
        "arguments": call["function"]["arguments"],
    }
    assert num_deltas > 5


@pytest.mark.parametrize("name", ["gpt-oss", "kimi-k3", "gemma-4"])
def test_without_tools_the_frame_around_content_is_not_shown(
    speaking: Callable[..., Any], name: str
) -> None:
    outputs = {
        "gpt-oss": "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final"
        "<|message|>Two.",
        "kimi-k3": "Hm.<|close|>think<|sep|><|open|>response<|sep|>Two.<|close|>response<|sep|>"
        "<|close|>message<|sep|>",
        "gemma-4": "<|channel>thought\nHm.\n<channel|>Two.",
    }
    live = speaking(outputs[name], template=MESSAGES + FAMILIES[name][0])
    [choice] = live.post("/v1/chat/completions", messages=[USER]).json()["choices"]
    assert choice["message"]["content"] == "Two."
    assert choice["message"]["reasoning_content"] == "Hm."
    body = live.post("/v1/messages", max_tokens=99, messages=[USER]).json()
    assert [block["type"] for block in body["content"]] == ["thinking", "text"]
    assert body["octavo"]["reasoning_tokens"] >= len("Hm.")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_forced_call_is_streamed_too(speaking: Callable[..., Any], choice: Any) -> None:
    """In plain JSON, for the model is not shown the tools."""
    call = '{"name": "add", "arguments": {"n": [1, 2]}}'
    live = speaking(call, template=MESSAGES, model={"tools_in_prompt": "off"})
    asked = {"messages": [USER], "tools": [TOOL], "tool_choice": choice}
    chunks = chunks_of(live.post("/v1/chat/completions", **asked, stream=True).content)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    assert calls[0]["function"] == {"name": "add", "arguments": ""}
    written = [call["function"]["arguments"] for call in calls[1:]]
    assert written == ["{", '"', "n", '"', ":", " ", "[", "1,", " ", "2]", "}"]
    assert choices[-1]["finish_reason"] == ("tool_calls" if choice == "required" else "stop")
