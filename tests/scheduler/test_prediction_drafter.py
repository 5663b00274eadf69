"""A prediction is followed along the output: replaced tokens, insertions, ambiguous places."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st
from known_sequences import sequence_of

from scheduler.drafters.lookups import MIN_MATCH_TOKENS
from scheduler.drafters.prediction import PredictionDrafter


def _followed(prediction: list[int], output: list[int]) -> Iterator[list[int]]:
    """Yield the draft before each token of an output."""
    drafter, sequence = PredictionDrafter(), sequence_of([0], prediction=tuple(prediction))
    for token_id in output:
        draft = drafter.propose(sequence, 4)
        yield [] if draft is None else draft.token_ids
        sequence.token_ids.append(token_id)
        drafter.observe(sequence, [token_id])


@given(st.lists(st.integers(1, 6), min_size=1, max_size=60), st.data())
def test_a_prediction_is_followed_to_its_end(prediction: list[int], data: st.DataObject) -> None:
    num_tokens = data.draw(st.integers(1, len(prediction)))
    drafts = list(_followed(prediction, prediction[:num_tokens]))
    assert drafts == [prediction[at : at + 4] for at in range(num_tokens)]


@given(st.integers(0, 59))
def test_a_replaced_token_costs_one_step(place: int) -> None:
    prediction = list(range(100, 160))
    output = [*prediction[:place], 7, *prediction[place + 1 :]]
    drafts = list(_followed(prediction, output))
    wrong = [at for at, draft in enumerate(drafts) if draft[:1] != output[at : at + 1]]
    assert wrong == [place]


def test_a_prediction_is_trusted_as_far_as_it_held() -> None:
    drafter, sequence = PredictionDrafter(), sequence_of([0], prediction=tuple(range(100, 160)))
    trusted = []
    for token_id in (100, 101, 102, 7, 8, 105):
        draft = drafter.propose(sequence, 4)
        trusted.append(draft and round(draft.probability, 2))
        sequence.token_ids.append(token_id)
    assert trusted == [0.5, 0.67, 0.75, 0.8, 0.33, 0.25]


def test_an_insertion_costs_its_tokens_and_a_match() -> None:
    prediction = list(range(100, 160))
    output = [*prediction[:20], *range(10), *prediction[20:]]
    drafts = list(_followed(prediction, output))
    hits = [draft[:1] == output[at : at + 1] for at, draft in enumerate(drafts)]
    assert hits == [True] * 20 + [False] * (10 + MIN_MATCH_TOKENS) + [True] * (
        40 - MIN_MATCH_TOKENS
    )
    # After a few wrong tokens nothing is proposed until a match is found.
    assert drafts[24:32] == [[]] * 8


def test_an_ambiguous_place_is_the_nearest() -> None:
    line = [1, 2, 3, 4]
    prediction = [*line, 10, *line, 11, *line, 12, *line, 13]
    output = [*line, 10, 77, 78, 79, *line, 11]
    assert list(_followed(prediction, output))[-1][:1] == [11]


def test_without_a_prediction_nothing_is_proposed() -> None:
    drafter = PredictionDrafter()
    assert drafter.propose(sequence_of([1, 2]), 4) is None
    assert drafter.num_sequences == 0
