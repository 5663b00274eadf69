from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from scheduler.client import FinishReason, TokenLogprobs, TokenOutput
from server.generation.output import OutputChunk, OutputOptions, OutputText
from server.text.load import ModelText

#: Letters that make stop strings likely, bytes of "é" and "€", a special token, and the end.
TOKENS = [97, 98, 99, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 260, 0]
STOPS = ["ab", "ba", "aab", "é", "c a", "bb"]


def run(text: ModelText, options: OutputOptions, deltas: list[TokenOutput]) -> list[OutputChunk]:
    output = OutputText(text.tokenizer, options)
    chunks = []
    for delta in deltas:
        chunks.append(output.push(delta))
        output.check()
        if chunks[-1].finish_reason is not None:
            return chunks
    message = "no delta was the last"
    raise AssertionError(message)


def deltas_of(token_ids: list[int], cuts: list[int], *, has_logprobs: bool) -> list[TokenOutput]:
    """Split tokens at `cuts`; the end comes with the last of them."""
    bounds = sorted({0, len(token_ids), *(cut % (len(token_ids) + 1) for cut in cuts)})
    parts = [token_ids[a:b] for a, b in pairwise(bounds)] or [[]]
    deltas = [
        TokenOutput(
            tuple(part),
            tuple(TokenLogprobs(token, -1.0, 1) for token in part) if has_logprobs else (),
        )
        for part in parts
    ]
    deltas[-1] = replace(deltas[-1], finish_reason=FinishReason.LENGTH)
    return deltas


@given(
    token_ids=st.lists(st.sampled_from(TOKENS), max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=6),
    stops=st.lists(st.sampled_from(STOPS), max_size=3),
    include_stop=st.booleans(),
    has_logprobs=st.booleans(),
)
def test_the_text_ends_before_the_first_stop_string(
    text: ModelText,
    token_ids: list[int],
    cuts: list[int],
    stops: list[str],
    include_stop: bool,
    has_logprobs: bool,
) -> None:
    options = OutputOptions(stops=tuple(stops), include_stop=include_stop)
    chunks = run(text, options, deltas_of(token_ids, cuts, has_logprobs=has_logprobs))
    shown = "".join(chunk.text for chunk in chunks)
    whole = text.tokenizer.decode(token_ids, skip_special_tokens=True)
    assert whole.startswith(shown)
    ends = [whole.index(stop) + len(stop) for stop in stops if stop in whole]
    if not ends:
        assert shown == whole
        assert chunks[-1].finish_reason == "length"
        assert sum(len(chunk.delta.token_ids) for chunk in chunks) == len(token_ids)
        if has_logprobs:
            told = [token.logprobs.token_id for chunk in chunks for token in chunk.tokens]
            assert told == token_ids
        return
    found = max((stop for stop in stops if whole[: min(ends)].endswith(stop)), key=len)
    end = min(ends) if include_stop else min(ends) - len(found)
    assert shown == whole[:end]
    assert chunks[-1].finish_reason == "stop"
    assert chunks[-1].stop_text == found


# A token without text, right before a stop string.
@example(token_ids=[0, 98, 97], cuts=[1], stops=["ba"])
@given(
    token_ids=st.lists(st.sampled_from(TOKENS), max_size=20),
    cuts=st.lists(st.integers(0, 20), max_size=6),
    stops=st.lists(st.sampled_from(STOPS), max_size=2),
)
def test_how_tokens_arrive_changes_nothing(
    text: ModelText, token_ids: list[int], cuts: list[int], stops: list[str]
) -> None:
    options = OutputOptions(stops=tuple(stops))
    together = run(text, options, deltas_of(token_ids, [], has_logprobs=True))
    apart = run(text, options, deltas_of(token_ids, cuts, has_logprobs=True))
    for chunks in (together, apart):
        assert chunks[-1].finish_reason == together[-1].finish_reason
    assert "".join(p.text for p in apart) == "".join(p.text for p in together)
    num_apart, num_together = (sum(len(p.delta.token_ids) for p in ps) for ps in (apart, together))
    assert num_apart == num_together
    assert [t for p in apart for t in p.tokens] == [t for p in together for t in p.tokens]
    for chunks in (together, apart):
        told = [token_id for chunk in chunks for token_id in chunk.delta.token_ids]
        assert told == token_ids[: len(told)]


def test_probabilities_do_not_tell_what_text_holds_back(text: ModelText) -> None:
    options = OutputOptions(stops=("abc",))
    output = OutputText(text.tokenizer, options)

    def push(token: int) -> OutputChunk:
        return output.push(TokenOutput((token,), (TokenLogprobs(token, -1.0, 1),)))

    def told(chunk: OutputChunk) -> list[int]:
        return [token.logprobs.token_id for token in chunk.tokens]

    assert [told(push(ord(letter))) for letter in "xab"] == [[120], [], []]
    assert told(push(ord("a"))) == [97, 98]
    assert told(push(ord("b"))) == []
    last = push(ord("c"))
    assert (last.text, told(last), last.finish_reason) == ("", [], "stop")


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (OutputOptions(end_token_ids=frozenset({97})), "b"),
        (OutputOptions(end_token_ids=frozenset({97}), include_stop=True), "ba"),
        (OutputOptions(end_token_ids=frozenset({99})), "ba"),
    ],
)
def test_the_text_of_an_end_token(text: ModelText, options: OutputOptions, shown: str) -> None:
    [chunk] = run(text, options, [TokenOutput((98, 97), finish_reason=FinishReason.STOP)])
    assert chunk.text == shown
    assert len(chunk.delta.token_ids) == 2, "it was generated all the same"
    assert chunk.finish_reason == "stop"
    assert chunk.stop_text is None


def test_an_end_token_is_text_where_the_length_ended_the_output(text: ModelText) -> None:
    options = OutputOptions(end_token_ids=frozenset({97}))
    [chunk] = run(text, options, [TokenOutput((97,), finish_reason=FinishReason.LENGTH)])
    assert chunk.text == "a"


def test_stop_strings_count_from_min_tokens_on(text: ModelText) -> None:
    options = OutputOptions(stops=("a",), min_tokens=2)
    chunks = run(text, options, [TokenOutput((97, 97, 98)), TokenOutput((97, 97))])
    assert "".join(chunk.text for chunk in chunks) == "aab"
    assert sum(len(chunk.delta.token_ids) for chunk in chunks) == 4


def test_tokens_behind_a_stop_string_are_not_counted(text: ModelText) -> None:
    options = OutputOptions(stops=("b",))
    [chunk] = run(text, options, [TokenOutput((97, 98, 99, 99))])
    assert (chunk.text, len(chunk.delta.token_ids)) == ("a", 2)


def test_a_broken_character_at_the_end_is_shown_as_such(text: ModelText) -> None:
    [chunk] = run(text, OutputOptions(), [TokenOutput((0xC3,), finish_reason=FinishReason.LENGTH)])
    assert chunk.text == "\ufffd"
