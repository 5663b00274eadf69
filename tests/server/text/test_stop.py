from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.stop import MAX_STOP_CHARS, MAX_STOPS, StopMatcher

SMALL_TEXT = st.text(alphabet="ab", max_size=30)
SMALL_STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=6), max_size=MAX_STOPS)


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Begin of the match that completes first, the longest of those; by looking everywhere."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return end - len(longest), longest
    return None


def longest_begun(text: str, stops: list[str]) -> int:
    """Return the length of the longest end of `text` that begins a stop string."""
    lengths = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(lengths, default=0)


@given(text=SMALL_TEXT, stops=SMALL_STOPS, include=st.booleans(), data=st.data())
def test_any_split_finds_what_a_search_of_the_whole_text_finds(
    text: str, stops: list[str], include: bool, data: st.DataObject
) -> None:
    matcher = StopMatcher(stops, include=include)
    sent, matched, rest = "", None, text
    while rest:
        size = data.draw(st.integers(0, len(rest)))
        # An empty push now and then, but never for ever.
        size = size or (0 if data.draw(st.booleans()) else 1)
        piece, matched = matcher.push(rest[:size])
        sent, rest = sent + piece, rest[size:]
        matcher.check()
        if matched is None:
            known = text[: len(text) - len(rest)]
            assert sent == known[: len(known) - longest_begun(known, stops)]
    sent += matcher.finish()
    expected = first_stop(text, stops)
    if expected is None:
        assert (sent, matched) == (text, None)
    else:
        begin, stop = expected
        assert (sent, matched) == (text[:begin] + (stop if include else ""), stop)


def test_a_stop_string_is_found_across_pushes_and_ends_the_text() -> None:
    matcher = StopMatcher(["\nUser:", "END"])
    assert matcher.push("Hello\nUs") == ("Hello", None)
    assert matcher.push("ed car\nU") == ("\nUsed car", None)
    assert matcher.push("ser: more") == ("", "\nUser:")
    assert matcher.push("and more") == ("", "\nUser:")
    assert matcher.finish() == ""


def test_what_was_held_back_comes_at_the_end() -> None:
    matcher = StopMatcher(["###"])
    assert matcher.push("a ##") == ("a ", None)
    assert matcher.finish() == "##"
    matcher.check()


def test_of_two_that_complete_together_the_longer_wins() -> None:
    assert StopMatcher(["b", "ab"]).push("xab") == ("x", "ab")
    assert StopMatcher(["ab", "b"]).push("xab") == ("x", "ab")


def test_the_one_that_completes_first_wins_even_if_it_began_later() -> None:
    assert StopMatcher(["abcd", "c"]).push("abcd") == ("ab", "c")


def test_without_stop_strings_everything_goes_through() -> None:
    matcher = StopMatcher([])
    assert matcher.push("any \u0301 text") == ("any \u0301 text", None)
    assert matcher.finish() == ""


def test_the_longest_stop_strings_allowed_work() -> None:
    stops = [chr(ord("a") + i) * MAX_STOP_CHARS for i in range(MAX_STOPS)]
    matcher = StopMatcher(stops)
    text = "b" * (MAX_STOP_CHARS - 1) + "c" * MAX_STOP_CHARS
    assert matcher.push(text) == ("b" * (MAX_STOP_CHARS - 1), "c" * MAX_STOP_CHARS)


@pytest.mark.parametrize(
    ("stops", "problem"),
    [
        ([""], "must have 1 to 1024 characters"),
        (["a" * (MAX_STOP_CHARS + 1)], "must have 1 to 1024 characters, one has 1025"),
        (["x"] * (MAX_STOPS + 1), "at most 16 strings are allowed, got 17"),
    ],
)
def test_what_cannot_be_a_stop_string_is_refused_by_name(stops: list[str], problem: str) -> None:
    with pytest.raises(ValueError, match=f"^stop: .*{problem}"):
        StopMatcher(stops)
