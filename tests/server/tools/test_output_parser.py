from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.tools.declared import GEMMA_THOUGHT, HARMONY_ANALYSIS, KIMI_K3_THINK, THINK
from server.tools.events import (
    ArgumentsDelta,
    CallEnded,
    CallStarted,
    Content,
    CutCall,
    Event,
    Reasoning,
    joined,
)
from server.tools.harmony import HARMONY
from server.tools.notation import GEMMA, PYTHONIC
from server.tools.output_parser import OutputParser, OutputSyntax
from server.tools.spelled import DSML, GLM, KIMI_K3, QWEN_XML
from server.tools.syntaxes import DEEPSEEK, HERMES, KIMI_K2, LLAMA, MISTRAL

TOOLS = frozenset({"add", "get_time"})
SCHEMAS = {"add": {"properties": {"a": {"type": "integer"}, "s": {"type": "string"}}}}
OUTPUT_SYNTAXES = {
    "hermes": OutputSyntax(HERMES, THINK, tool_names=TOOLS),
    "prefilled": OutputSyntax(HERMES, THINK, is_thinking=True, tool_names=TOOLS),
    "llama": OutputSyntax(LLAMA, None, tool_names=TOOLS),
    "mistral": OutputSyntax(MISTRAL, None, tool_names=TOOLS),
    "thinking": OutputSyntax(None, THINK),
    "qwen": OutputSyntax(QWEN_XML, THINK, tool_names=TOOLS, schemas=SCHEMAS),
    "qwen, not offered": OutputSyntax(QWEN_XML, THINK, schemas=SCHEMAS),
    "glm": OutputSyntax(GLM, THINK, tool_names=TOOLS, schemas=SCHEMAS),
    "deepseek": OutputSyntax(DEEPSEEK, THINK, tool_names=TOOLS),
    "dsml": OutputSyntax(DSML, None, tool_names=TOOLS),
    "kimi_k2": OutputSyntax(KIMI_K2, THINK, tool_names=TOOLS),
    "kimi_k3": OutputSyntax(KIMI_K3, KIMI_K3_THINK, is_thinking=True, tool_names=TOOLS),
    "gemma": OutputSyntax(GEMMA, GEMMA_THOUGHT, tool_names=TOOLS),
    "pythonic": OutputSyntax(PYTHONIC, None, tool_names=TOOLS),
    "harmony": OutputSyntax(HARMONY, HARMONY_ANALYSIS, tool_names=TOOLS),
    "harmony, no tools": OutputSyntax(None, HARMONY_ANALYSIS),
}


@dataclass(frozen=True)
class Heard:
    content: str
    reasoning: str
    #: The complete calls: name and arguments.
    calls: tuple[tuple[str, str], ...]
    #: The text of the last call, if it is incomplete: reported or not.
    cut: str = ""
    #: The reported arguments of it; None: its tool is not known.
    begun: str | None = None


def events_of(syntax: OutputSyntax, *pieces: str) -> list[Event]:
    parser = OutputParser(syntax)
    events = []
    for piece in pieces:
        events += parser.push(piece)
        parser.check()
    events += parser.finish()
    parser.check()
    return events


def heard(syntax: OutputSyntax, *pieces: str) -> Heard:
    """Return the sum of the events; asserts that they follow each other as they should."""
    content = reasoning = cut = ""
    calls: list[tuple[str, str]] = []
    opened: tuple[str, str] | None = None
    begun = None
    for event in events_of(syntax, *pieces):
        match event:
            case Content(text):
                assert opened is None
                content += text
            case Reasoning(text):
                assert opened is None
                reasoning += text
            case CallStarted(name):
                assert opened is None
                opened = (name, "")
            case ArgumentsDelta(text):
                assert opened is not None
                opened = (opened[0], opened[1] + text)
            case CallEnded():
                assert opened is not None
                calls.append(opened)
                opened = None
            case CutCall(text):
                cut, begun, opened = text, opened[1] if opened else None, None
    assert opened is None
    return Heard(content, reasoning, tuple(calls), cut, begun)


FRAGMENTS = (
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
    "<|python_tag|>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[CALL_ID]",
    "add",
    "123456789",
    '{"name": "add", "arguments": {"a": [1, 2.5e-3]}}',
    '{"name": "get_time"}',
    '{"name": "add", "parameters": {"t": "a\\"}<tool_call>\\u00e9\\n"}}',
    '{"a": null}',
    "{",
    "}",
    "[",
    "]",
    '"',
    ":",
    ",",
    ";",
    "\\",
    "tru",
    "true",
    "-1",
    "\n",
    "  ",
    "é🌸",
    "text",
    '{"name": "add", "arguments": "{\\"a\\": 1}"}',
    '{"name": "add", "arguments": 3}',
    '{"name": "add", "arguments": {"s": "raw\nline"}}',
    "<tool",
    "[TOOL",
    '{"name": "add", "par',
    "<function=add>",
    "<parameter=a>",
    "</parameter>",
    "</function>",
    "add<arg_key>a</arg_key><arg_value>",
    "1</arg_value>",
    "<\uff5ctool\u2581calls\u2581begin\uff5c><\uff5ctool\u2581call\u2581begin\uff5c>",
    "add<\uff5ctool\u2581sep\uff5c>{}",
    "<\uff5ctool\u2581call\u2581end\uff5c>",
    '<\uff5cDSML\uff5ctool_calls><\uff5cDSML\uff5cinvoke name="add">',
    '<\uff5cDSML\uff5cparameter name="a" string="false">',
    "</\uff5cDSML\uff5cparameter></\uff5cDSML\uff5cinvoke>",
    "<parameter=s>\n",
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0",
    '<|tool_call_argument_begin|>{"a": 1}',
    "<|tool_call_end|>",
    "<|tool_calls_section_end|>",
    "<|close|>think<|sep|><|open|>response<|sep|>",
    "<|close|>response<|sep|>",
    '<|open|>call tool="add" index="1"<|sep|>',
    '<|open|>argument key="a" type="number"<|sep|>',
    '<|open|>argument key="s" type="string"<|sep|>',
    "<|close|>argument<|sep|>",
    "<|close|>call<|sep|>",
    "<|tool_call>call:add{",
    'a:<|"|>',
    '<|"|>',
    "}<tool_call|>",
    "<|channel>thought",
    "<channel|>",
    "[add(",
    "a='x\\u00e9\\'",
    "')",
    "<|start|>assistant to=functions.add",
    "<|channel|>commentary",
    "<|channel|>analysis",
    " to=python",
    "<|message|>",
    "<|end|>",
)  # fmt: skip - one a line would hide how few they are


@st.composite
def cut_outputs(draw: st.DrawFn) -> tuple[str, ...]:
    text = "".join(draw(st.lists(st.sampled_from(FRAGMENTS), max_size=12)))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=20)))
    return tuple(text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True))


@pytest.mark.parametrize("syntax", OUTPUT_SYNTAXES.values(), ids=OUTPUT_SYNTAXES)
@given(pieces=cut_outputs())
def test_every_way_to_cut_an_output_gives_the_same(
    syntax: OutputSyntax, pieces: tuple[str, ...]
) -> None:
    whole = "".join(pieces)
    expected = heard(syntax, whole)
    assert heard(syntax, *pieces) == expected
    assert heard(syntax, *whole) == expected
    assert joined(events_of(syntax, *pieces)) == joined(events_of(syntax, whole))
    for _, arguments in expected.calls:
        assert isinstance(json.loads(arguments), dict)


@pytest.mark.parametrize("syntax", OUTPUT_SYNTAXES.values(), ids=OUTPUT_SYNTAXES)
@given(pieces=cut_outputs())
def test_no_word_is_lost(syntax: OutputSyntax, pieces: tuple[str, ...]) -> None:
    """Where there is neither call nor reasoning, the content is the output, to the letter."""
    whole = "".join(pieces)
    told = heard(syntax, whole)
    is_calling = told.calls or told.cut or told.begun is not None
    tags = syntax.tags
    marks: tuple[str, ...] = ()
    if tags is not None:
        marks = (tags.opener, tags.closer, *tags.other_closers, *tags.frame)
        marks += ("<|",) if tags.has_messages else ()
    if not is_calling and not any(mark in whole for mark in marks):
        expected = whole.strip() if syntax.is_thinking else whole
        assert told.content + told.reasoning == expected


@pytest.mark.parametrize("count", [1, 2, 5])
def test_calls_with_text_before_between_and_after(count: int) -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    told = heard(OUTPUT_SYNTAXES["hermes"], "First.\n" + f"{call}\nNext.\n" * count)
    assert told.calls == (("add", '{"a": 1}'),) * count
    assert told.content == "First." + "\nNext." * count


def test_what_cannot_be_a_call_is_let_out_at_once() -> None:
    parser = OutputParser(OUTPUT_SYNTAXES["hermes"])
    assert parser.push("a <tool") == [Content("a")]
    assert parser.push("box>") == [Content(" <toolbox>")]
    assert parser.push(' <tool_call>{"name"') == []
    assert parser.push(" 3") == [Content(" <tool_call>"), Content('{"name" 3')]


def test_a_json_answer_is_held_back_to_its_first_key_only() -> None:
    parser = OutputParser(OUTPUT_SYNTAXES["llama"])
    assert parser.push('{"capital') == []
    assert parser.push('": ') == [Content("{"), Content('"capital":')]


def test_a_json_answer_that_names_no_offered_tool_is_content() -> None:
    answer = '{"name": "Ada", "parameters": {}}'
    assert heard(OUTPUT_SYNTAXES["llama"], answer) == Heard(answer, "", ())


@pytest.mark.parametrize(
    ("name", "output"),
    [
        (
            "llama",
            '{"name": "add", "parameters": {"a": 1}}; {"name": "get_time", "parameters": {}}',
        ),
        (
            "llama",
            '<|python_tag|>{"name":"add","parameters":{"a": 1}}<|python_tag|>{"name":"get_time"}',
        ),
        ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "get_time"}]'),
        ("mistral", '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]get_time[CALL_ID]abcdefghi[ARGS]{}'),
        ("mistral", '[TOOL_CALLS]add{"a": 1}[TOOL_CALLS]get_time{}'),
        (
            "hermes",
            '<tool_call>{"arguments": {"a": 1}, "name": "add"}<tool_call>{"name":"get_time"}',
        ),
    ],
)
def test_two_calls(name: str, output: str) -> None:
    assert heard(OUTPUT_SYNTAXES[name], output).calls == (("add", '{"a": 1}'), ("get_time", "{}"))


@pytest.mark.parametrize("arguments", ["[1]", '"3"', "3", '"{\\"a\\": 1"', "[" * 200 + "]" * 200])
def test_a_call_without_an_object_of_arguments_is_given_back(arguments: str) -> None:
    output = f'<tool_call>{{"name": "add", "arguments": {arguments}}}</tool_call>'
    assert heard(OUTPUT_SYNTAXES["hermes"], output) == Heard(output, "", ())


@pytest.mark.parametrize(
    ("arguments", "begun"),
    [
        ("{'a': 1}", "{"),
        ('{"a": 01}', '{"a": '),
        ('{"a": True}', '{"a": '),
        ('{"a": NaN}', '{"a": '),
        ('{"a": "\\x"}', '{"a": "'),
        ("{,}", "{"),
        ('{"a": 1,}', '{"a": 1,'),
        ('{"a": [}]', '{"a": ['),
        ('{"a": ' + "[" * 200 + "]" * 200, '{"a": ' + "[" * 98),
    ],
)
def test_a_call_whose_arguments_go_astray_is_cut_there(arguments: str, begun: str) -> None:
    """Reported events stay, the rest is content, and the call is known to be incomplete."""
    output = f'<tool_call>{{"name": "add", "arguments": {arguments}}}</tool_call>'
    told = heard(OUTPUT_SYNTAXES["hermes"], output)
    rest = output[output.index(arguments) + len(begun) :]
    assert told == Heard(rest, "", (), "", begun)


def test_a_good_call_behind_a_malformed_one_is_found() -> None:
    told = heard(
        OUTPUT_SYNTAXES["hermes"], '<tool_call>{add}<tool_call>{"name": "add"}</tool_call>'
    )
    assert told == Heard("<tool_call>{add}", "", (("add", "{}"),))


def test_newlines_in_strings_become_strict_json() -> None:
    told = heard(
        OUTPUT_SYNTAXES["hermes"], '<tool_call>{"name": "add", "arguments": {"a": "x\ny"}}'
    )
    assert json.loads(told.calls[0][1]) == {"a": "x\ny"}


@pytest.mark.parametrize(
    ("end", "begun", "cut"),
    [
        ("", None, "<tool_call>"),
        ('{"name": "add", "argu', None, '<tool_call>{"name": "add", "argu'),
        ('{"name": "add", "arguments": {"a": "', '{"a": "', ""),
        ('{"name": "add", "arguments": {"a": "x\\u00', '{"a": "x', "\\u00"),
        ('{"name": "add", "arguments": {"a": 12', '{"a": ', "12"),
        ('{"name": "add", "arguments": {"a": 12}', '{"a": 12}', ""),
    ],
)
def test_a_call_that_the_end_cuts_is_told_as_far_as_it_came(
    end: str, begun: str | None, cut: str
) -> None:
    told = heard(OUTPUT_SYNTAXES["hermes"], "Well.\n<tool_call>" + end)
    assert told == Heard("Well.", "", (), cut, begun)


def test_calls_within_reasoning_are_reasoning() -> None:
    told = heard(
        OUTPUT_SYNTAXES["prefilled"], 'so <tool_call>{"name": "add"}</tool_call>\n</think>\n\nYes'
    )
    assert told == Heard("Yes", 'so <tool_call>{"name": "add"}</tool_call>', ())


def test_reasoning_the_model_opens_itself_though_the_prompt_did() -> None:
    assert heard(OUTPUT_SYNTAXES["prefilled"], "<think>\nhm</think>ok") == Heard("ok", "hm", ())
