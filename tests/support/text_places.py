"""The places of a text behind the last tokens of another one, by exhaustive search."""

from __future__ import annotations

from scheduler.drafters.text_index import END, Match

#: No two of their triples have one hash in a small table, ends included, so the places found in an
#: index can be foretold.
TOKENS = (1, 2, 3)


def num_shared(text: list[int], position: int, token_ids: list[int], most: int) -> int:
    count = 0
    while (
        count < min(most, position, len(token_ids))
        and text[position - 1 - count] == token_ids[-1 - count]
    ):
        count += 1
    return count


def places(text: list[int], token_ids: list[int], least: int, most: int) -> list[Match]:
    """Return all places behind the last tokens, latest first, by exhaustive search."""
    found = [
        Match(position, num_shared(text, position, token_ids, most))
        for position in reversed(range(len(text)))
        if text[position] != END
    ]
    return [match for match in found if match.num_tokens >= least]
