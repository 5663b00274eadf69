"""The window over a text against exhaustive search."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from text_places import TOKENS, num_shared, places

from scheduler.drafters.text_index import END, TextIndex

texts = st.lists(st.sampled_from(TOKENS), max_size=40)


@given(texts, texts, st.integers(1, 3), st.integers(3, 9))
def test_an_index_finds_the_lastplaces_of_a_suffix(
    text: list[int], token_ids: list[int], least: int, most: int
) -> None:
    index = TextIndex(1024, least, most)
    index.extend(text)
    # Eight places are compared; the end of the text may be one of them.
    expected = places(text, token_ids, least, most)
    found = index.matches(token_ids)
    assert found == expected[: len(found)]
    is_full = any(match.num_tokens == most for match in found)
    assert len(found) >= min(7, len(expected)) or is_full
    assert all(match.num_tokens < most for match in found[:-1])


@given(st.lists(texts, max_size=6), texts)
def test_no_match_and_no_draft_crosses_the_end_of_a_text(
    parts: list[list[int]], token_ids: list[int]
) -> None:
    index, whole = TextIndex(1024, 3), list[int]()
    for part in parts:
        index.extend((*part, END))
        whole += [*part, END]
    for match in index.matches(token_ids):
        assert match in places(whole, token_ids, 3, 32)
        after = whole[match.position :]
        assert index.continuation(match.position, 5) == after[: min(5, after.index(END))]


@given(st.lists(st.integers(0, 5), max_size=200), st.lists(st.integers(0, 5), max_size=8))
@example([1] * 40, [1] * 32)
@settings(max_examples=50)
def test_an_index_forgets_what_left_its_window(text: list[int], token_ids: list[int]) -> None:
    index = TextIndex(16, 2)
    index.extend(text)
    assert (index.start, index.end) == (max(0, len(text) - 16), len(text))
    assert index.read(index.start, 99) == text[index.start :]
    for match in index.matches(token_ids):
        assert match.position > index.start
        num_tokens = num_shared(text, match.position, token_ids, match.position - index.start)
        assert match.num_tokens == num_tokens >= 2


def _array_bytes(index: TextIndex) -> int:
    return sum(
        len(value) * value.itemsize for value in vars(index).values() if isinstance(value, array)
    )


@pytest.mark.parametrize("num_tokens", [300, 5000, 40_000])
def test_an_index_takes_28_bytes_a_token_at_most(num_tokens: int) -> None:
    index = TextIndex(8192, 3)
    index.extend(range(num_tokens))
    assert index.end - index.start == min(num_tokens, 8192)
    # Room doubles as a text grows.
    assert _array_bytes(index) <= 28 * min(8192, max(256, 2 * num_tokens))
