"""Reasoning is counted in tokens: those between the tags, however they come."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from server.generation.reasoning import ReasoningCounter
from server.text.load import ModelText
from server.text.token_bytes import TokenBytes
from server.tools.declared import GEMMA_THOUGHT, KIMI_K3_THINK, MISTRAL_THINK, THINK
from server.tools.events import Reasoning
from server.tools.output_parser import OutputParser, OutputSyntax, ThinkTags


def pieces_of(text: ModelText) -> TokenBytes:
    return text.tokenizer.bytes_by_id(skip_special_tokens=True)


def counted(text: ModelText, output: str, *, width: int = 1, is_thinking: bool = False) -> int:
    """Return the number of tokens: a byte is a token here."""
    counter = ReasoningCounter(pieces_of(text), THINK, is_thinking=is_thinking)
    token_ids = [*output.encode()]
    for start in range(0, len(token_ids), width):
        counter.count(token_ids[start : start + width], is_last=False)
    return counter.count((), is_last=True)


@pytest.mark.parametrize("width", [1, 3, 1000])
@pytest.mark.parametrize(
    ("output", "is_thinking", "expected"),
    [
        ("<think>hm, é</think>yes", False, 6),
        ("\n <think>\nhm\n</think>\n\nyes </think>", False, 4),
        ("hm</think>yes", True, 2),
        ("<think>hm</think>yes", True, 2),
        ("yes <think>no</think>", False, 0),
        ("hm", True, 2),
        ("<think>hm </thi", False, 8),
        ("<thi", True, 4),
        ("<thi", False, 0),
        ("</think>yes", True, 0),
        ("", True, 0),
        ("\u00a0\u3000\x0b<think>hm</think>", False, 2),
        ("\u3000hm</think>", True, 5),
    ],
)
def test_what_stands_between_the_tags_counts(
    text: ModelText, output: str, is_thinking: bool, expected: int, width: int
) -> None:
    assert counted(text, output, width=width, is_thinking=is_thinking) == expected


def test_it_grows_with_the_stream(text: ModelText) -> None:
    counter = ReasoningCounter(pieces_of(text), THINK, is_thinking=True)
    told = [counter.count((byte,), is_last=False) for byte in b"a long thought</think>yes"]
    assert told == sorted(told)
    assert told[10] > 0
    assert told[-1] == len("a long thought")


@settings(max_examples=150)
@given(
    parts=st.lists(
        st.sampled_from(
            ["<think>", "</think>", "</answer>", "<thi", "nk>", " ", "\n\u3000", "a", "bc", "é"]
        ),
        max_size=9,
    ),
    width=st.integers(1, 9),
    is_thinking=st.booleans(),
    tags=st.sampled_from([THINK, MISTRAL_THINK, GEMMA_THOUGHT, KIMI_K3_THINK]),
)
def test_it_counts_what_the_parser_tells(
    text: ModelText, parts: list[str], width: int, is_thinking: bool, tags: ThinkTags
) -> None:
    output = "".join(parts).replace("<think>", tags.opener).replace("</think>", tags.closer)
    output = output.replace("</answer>", "".join(tags.other_closers))
    counter = ReasoningCounter(pieces_of(text), tags, is_thinking=is_thinking)
    token_ids = [*output.encode()]
    for start in range(0, len(token_ids), width):
        counter.count(token_ids[start : start + width], is_last=False)
    count = counter.count((), is_last=True)
    parser = OutputParser(OutputSyntax(None, tags, is_thinking=is_thinking))
    events = parser.push(output) + parser.finish()
    told = "".join(event.text for event in events if isinstance(event, Reasoning)).encode()
    # The parser leaves out the spaces at both ends, which are the template's.
    num_spaces = sum(len(letter.encode()) for letter in output if letter.isspace())
    assert len(told) <= count <= len(told) + num_spaces
