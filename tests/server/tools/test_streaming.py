"""Arguments of calls are reported while the model writes them, in every format."""

from __future__ import annotations

import json

import pytest

from server.tools.declared import SYNTAXES, TAGS
from server.tools.events import ArgumentsDelta, CallEnded, CallStarted, Event, joined
from server.tools.output_parser import OutputParser, OutputSyntax
from server.tools.syntaxes import HERMES

SCHEMAS = {"add": {"properties": {"a": {"type": "integer"}, "s": {"type": "string"}}}}
#: Where reasoning has other tags than <think>.
REASONING = {"openai": "openai_gptoss", "kimi_k3": "kimi_k3", "gemma4": "gemma4"}


def parser_of(name: str) -> OutputParser:
    return OutputParser(
        OutputSyntax(
            SYNTAXES[name],
            TAGS[REASONING.get(name, "qwen3")],
            is_thinking=name == "kimi_k3",
            tool_names=frozenset({"add"}),
            schemas=SCHEMAS,
        )
    )


#: By parser: an output up to the middle of a call, and the arguments reported by then.
GROWN = {
    "hermes": ('<tool_call>{"name": "add", "arguments": {"s": "x\ny', '{"s": "x\\ny'),
    "llama3_json": ('{"name": "add", "parameters": {"s": "x', '{"s": "x'),
    "mistral": ('[TOOL_CALLS]add[ARGS]{"s": "x', '{"s": "x'),
    "qwen3_coder": ('<tool_call><function=add>\n<parameter=s>\nx"y', '{"s": "x\\"y'),
    "glm45": ("<tool_call>add<arg_key>s</arg_key><arg_value>x</arg", '{"s": "x'),
    "deepseek_v31": (
        (
            "<\uff5ctool\u2581calls\u2581begin\uff5c><\uff5ctool\u2581call\u2581begin\uff5c>"
            'add<\uff5ctool\u2581sep\uff5c>{"s": "x'
        ),
        '{"s": "x',
    ),
    "deepseek_v32": (
        (
            '<\uff5cDSML\uff5ctool_calls><\uff5cDSML\uff5cinvoke name="add">'
            '<\uff5cDSML\uff5cparameter name="s" string="true">x'
        ),
        '{"s": "x',
    ),
    "kimi_k2": (
        (
            "<think></think><|tool_calls_section_begin|><|tool_call_begin|>functions.add:0"
            '<|tool_call_argument_begin|>{"s": "x'
        ),
        '{"s": "x',
    ),
    "kimi_k3": (
        (
            '<|close|>think<|sep|><|open|>tools<|sep|><|open|>call tool="add" index="1"<|sep|>'
            '<|open|>argument key="s" type="string"<|sep|>x<|close|>argument<|sep|>'
        ),
        '{"s": "x',
    ),
    "gemma4": ('<|tool_call>call:add{s:<|"|>x\\<', '{"s": "x\\\\'),
    "pythonic": ("[add(a=[1, True], s='x\\x4", '{"a": [1, true], "s": "x'),
    "openai": (
        (
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant to=functions.add"
            '<|channel|>commentary <|constrain|>json<|message|>{"s": "x'
        ),
        '{"s": "x',
    ),
}


@pytest.mark.parametrize(("name", "output", "told"), [(k, *v) for k, v in GROWN.items()], ids=GROWN)
def test_arguments_are_told_as_they_are_written(name: str, output: str, told: str) -> None:
    """All but the end that may still become another thing, in every format."""
    parser = parser_of(name)
    events = [event for char in output for event in parser.push(char)]
    assert joined(events)[-2:] == [CallStarted("add"), ArgumentsDelta(told)]


def test_text_whose_type_the_schema_decides_is_told_once_it_ends() -> None:
    parser = parser_of("qwen3_coder")
    begun = parser.push("<tool_call><function=add>\n<parameter=a>\n12")
    assert begun == [CallStarted("add")]
    assert joined(parser.push("3\n</parameter>")) == [ArgumentsDelta('{"a": 123')]


@pytest.mark.parametrize("is_offered", [True, False])
def test_a_call_of_a_tool_that_was_not_offered_is_told_once_complete(is_offered: bool) -> None:
    parser = OutputParser(OutputSyntax(HERMES, tool_names=frozenset({"add"} if is_offered else ())))
    events = parser.push('<tool_call>{"name": "add", "arguments": {"a": 1')
    begun = [CallStarted("add"), ArgumentsDelta('{"a": ')]
    assert events == (begun if is_offered else [])
    events += parser.push("}}</tool_call>") + parser.finish()
    assert joined(events) == [CallStarted("add"), ArgumentsDelta('{"a": 1}'), CallEnded()]


@pytest.mark.parametrize("name", ["llama3_json", "hermes", "qwen3_coder"])
@pytest.mark.parametrize(
    "members",
    [
        '"foo": 1, "name": "add", "parameters": {"a": 1}',
        '"name": "add", "foo": 1, "parameters": {"a": 1}',
        '"name": "add", "parameters": {"a": 1}, "foo": 1',
        '"parameters": {"a": 1}, "foo": 1, "name": "add"',
        '"parameters": {"a": 1}, "name": "add", "foo": 1',
        '"name": "add", "name": "sub", "arguments": {"a": 1}, "parameters": {"a": 2}',
        '"parameters": null, "name": "add", "arguments": {"a": 2}',
        '"parameters": [1], "name": "add"',
        '"name": "sub", "parameters": {}',
        '"name": 3, "parameters": {}',
        '"name": "a b", "parameters": {}',
        '"name": "add", "parameters": "{\\"a\\": 1}"',
    ],
)
def test_members_in_any_order_give_the_same_however_they_are_cut(name: str, members: str) -> None:
    output = ("<tool_call>" if name == "hermes" else "") + "{" + members + "}"

    def told(*pieces: str) -> list[Event]:
        parser = parser_of(name)
        return joined([e for piece in pieces for e in parser.push(piece)] + parser.finish())

    whole = told(output)
    assert told(*output) == whole
    for cut in range(len(output)):
        assert told(output[:cut], output[cut:]) == whole


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("hermes", r'<tool_call>{"name": "add", "arguments": "{\"s\": \"\ud83c\"}"}'),
        ("hermes", r'<tool_call>{"name": "add", "arguments": {"s": "\ud83c"}}'),
        ("qwen3_coder", r'<function=add><parameter=l>["\ud83c"]</parameter></function>'),
        ("pythonic", r"[add(s='\ud83c')]"),
        (
            "kimi_k3",
            (
                '<|close|>think<|sep|><|open|>call tool="add"<|sep|><|open|>argument key='
                '"&#xD83C;" type="string"<|sep|>x<|close|>argument<|sep|><|close|>call<|sep|>'
            ),
        ),
    ],
)
def test_half_a_surrogate_pair_is_escaped_for_utf8_has_no_such_character(
    name: str, output: str
) -> None:
    parser = parser_of(name)
    events = joined(parser.push(output) + parser.finish())
    [arguments] = [event.text for event in events if isinstance(event, ArgumentsDelta)]
    assert json.loads(arguments.encode())


def test_every_parser_an_operator_may_name_is_tried() -> None:
    tried = {SYNTAXES[name] for name in GROWN}
    assert tried == {*SYNTAXES.values()} - {None}
