"""Drafters against plain oracles: each draft is a place in a text that the sequence may read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_drafter import ScriptedDrafter
from text_places import TOKENS
from text_places import places as places_of

from cache.kv_cache import KVCache
from model.interface import PENDING_TOKEN, SamplingParams
from scheduler.drafters.choice import BestDrafter, build_drafters, num_expected_tokens
from scheduler.drafters.draft import Draft, Drafter
from scheduler.drafters.grammar import GrammarDrafter
from scheduler.drafters.lookups import MIN_MATCH_TOKENS, NgramDrafter, SuffixDrafter
from scheduler.drafters.prediction import PredictionDrafter
from scheduler.drafters.prefix import PrefixDrafter
from scheduler.drafters.text_index import END, TextIndex
from scheduler.drafters.texts import OwnTexts, PastOutputs
from scheduler.messages import GenerateRequest, Submit
from scheduler.sequence import Sequence

MakeDrive: TypeAlias = Callable[..., Any]
texts = st.lists(st.sampled_from(TOKENS), max_size=40)


def _sequence(
    prompt: list[int],
    output: tuple[int, ...] = (),
    *,
    request_id: int = 0,
    namespace: str = "",
    prediction: tuple[int, ...] = (),
) -> Sequence:
    params = SamplingParams(max_tokens=1000)
    request = GenerateRequest(
        tuple(prompt), params, namespace=namespace, prediction_token_ids=prediction
    )
    submit = Submit(request_id, request, output)
    return Sequence(submit, arrival=0, eos_token_ids=(), max_model_len=10_000)


# ---- what all drafters have in common ------------------------------------------------------------


def _past() -> SuffixDrafter:
    drafter = SuffixDrafter()
    drafter.forget(_sequence([9], (1, 2, 3, 1, 1, 2, 2, 3, 3), request_id=99))
    return drafter


DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "ngram": NgramDrafter,
    "suffix": SuffixDrafter,
    "past outputs": _past,
    "prediction": PredictionDrafter,
    "best": lambda: BestDrafter([PredictionDrafter(), SuffixDrafter(), NgramDrafter(2)]),
}


@pytest.mark.parametrize("name", DRAFTERS)
@given(st.data())
@settings(max_examples=30)
def test_a_draft_is_a_function_of_the_tokens_and_within_its_limits(
    name: str, data: st.DataObject
) -> None:
    """Where a prediction is read depends on the steps too, so its twin takes the same ones."""
    drafter, twin, prompt = DRAFTERS[name](), DRAFTERS[name](), data.draw(texts.filter(bool))
    prediction = tuple(data.draw(texts))
    sequence = _sequence(prompt, prediction=prediction)
    for step in data.draw(st.lists(st.lists(st.sampled_from(TOKENS), min_size=1, max_size=4))):
        sequence.token_ids += step
        drafter.observe(sequence, step)
        most = data.draw(st.integers(1, 9))
        draft = drafter.propose(sequence, most)
        if name not in {"prediction", "best"}:
            twin = DRAFTERS[name]()
        assert draft == twin.propose(sequence, most)
        if draft is not None:
            assert 1 <= len(draft.token_ids) <= most
            assert 0 < draft.probability <= 1
            assert draft.drafter in {"ngram", "suffix", "prediction"}
    drafter.forget(sequence)


@given(texts.filter(bool), texts, st.integers(1, 12))
def test_an_ngram_draft_follows_the_longest_repetition(
    prompt: list[int], output: list[int], most: int
) -> None:
    sequence = _sequence(prompt, tuple(output))
    text = sequence.token_ids
    draft = NgramDrafter().propose(sequence, most)
    places = places_of(text, text, MIN_MATCH_TOKENS, 32)[:7]
    assert (draft is None) == (not places)
    if draft is not None:
        best = max(places, key=lambda match: match.num_tokens)
        ahead = text[best.position :]
        # Where the text ends, it is expected to go on as it did since the match.
        while len(ahead) < most:
            ahead.append(ahead[best.position - len(text)])
        assert draft.token_ids == ahead[:most]


def test_the_bounds_of_an_ngram_are_checked() -> None:
    assert NgramDrafter(2, 2).propose(_sequence([1, 2, 3, 1, 2]), 1) == Draft([3], 0.75, "ngram")
    assert NgramDrafter(3).propose(_sequence([1, 2, 3, 1, 2]), 1) is None
    assert NgramDrafter(40).propose(_sequence([7] * 41), 1) is not None
    with pytest.raises(ValueError, match="prompt_lookup_min must be at least 1, got 0"):
        NgramDrafter(0)
    with pytest.raises(ValueError, match=r"prompt_lookup_max must be at least .* \(4\), got 3"):
        NgramDrafter(4, 3)


def test_a_suffix_draft_grows_with_its_match() -> None:
    drafter = SuffixDrafter(factor=2.0)
    text = list(range(50))
    lengths = {}
    for matched in (2, 3, 4, 10, 40):
        draft = drafter.propose(_sequence([*text, 99, *text[:matched]], request_id=matched), 30)
        lengths[matched] = 0 if draft is None else len(draft.token_ids)
    assert lengths == {2: 0, 3: 6, 4: 8, 10: 20, 40: 30}


def test_a_long_prompt_is_indexed_over_several_steps() -> None:
    prompt = [*range(5000), 0, 1, 2]
    sequence, drafter = _sequence(prompt), NgramDrafter()
    drafts = [drafter.propose(sequence, 2) for _ in range(3)]
    assert [draft and draft.token_ids for draft in drafts] == [[3, 4]] * 3
    own = OwnTexts(lambda: TextIndex(1 << 15, 3))
    assert [own.index(sequence).end for _ in range(4)] == [2048, 4096, 5003, 5003]


# ---- namespaces and bounds -----------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from("abc"), texts), max_size=8))
def test_past_outputs_stay_in_their_namespace(outputs: list[tuple[str, list[int]]]) -> None:
    """Of each namespace the tokens are different ones: a foreign one in a draft would show."""
    drafter = SuffixDrafter()
    own = {"a": 100, "b": 200, "c": 300}
    for number, (namespace, output) in enumerate(outputs):
        shifted = tuple(own[namespace] + token for token in output)
        probe = _sequence([7], shifted, request_id=number, namespace=namespace)
        drafter.propose(probe, 4)
        drafter.forget(probe)
        for other in "abc":
            # The tail of this output, known to another namespace as a prompt alone.
            asked = _sequence([7, *shifted[:5]], request_id=50, namespace=other)
            draft = drafter.propose(asked, 8)
            if other != namespace and draft is not None:
                assert set(draft.token_ids) <= set(asked.token_ids)
            drafter._own.forget(asked)


def test_a_past_output_is_drafted_in_its_namespace_alone() -> None:
    drafter = SuffixDrafter()
    drafter.forget(_sequence([1], (11, 12, 13, 14, 15), namespace="a"))
    asked = {name: _sequence([2], (11, 12, 13), namespace=name, request_id=5) for name in "ab"}
    assert drafter.propose(asked["a"], 9) == Draft([14, 15], 0.8, "suffix")
    assert drafter.propose(asked["b"], 9) is None


def test_past_outputs_are_bounded() -> None:
    past = PastOutputs(lambda: TextIndex(64, 3), max_namespaces=4)
    for number in range(1000):
        past.add(_sequence([1], tuple(range(30)), namespace=str(number)))
        assert past.index("0") is not None, "the one that is used stays"
    assert past.num_namespaces == 4
    for _ in range(10):
        past.add(_sequence([1], tuple(range(30)), namespace="0"))
    index = past.index("0")
    assert index is not None
    assert index.end - index.start == 64
    past.add(_sequence([1], namespace="none"))
    assert past.index("none") is None, "no output, no namespace"
    past.add(_sequence([1], (5, PENDING_TOKEN), namespace="cut"))
    cut = past.index("cut")
    assert cut is not None
    assert cut.read(0, 9) == [5, END]


def test_nothing_is_kept_of_sequences_that_ended() -> None:
    prediction, own = PredictionDrafter(), OwnTexts(lambda: TextIndex(64, 3))
    for number in range(50):
        sequence = _sequence([1, 2, 3], request_id=number, prediction=(4, 5, 6))
        prediction.propose(sequence, 3)
        own.index(sequence)
        assert prediction.num_sequences == own.num_sequences == 1
        prediction.forget(sequence)
        own.forget(sequence)
        own.forget(sequence)
    assert prediction.num_sequences == own.num_sequences == 0


# ---- predictions ---------------------------------------------------------------------------------


def _followed(prediction: list[int], output: list[int]) -> Iterator[list[int]]:
    """Yield the draft before each token of an output."""
    drafter, sequence = PredictionDrafter(), _sequence([0], prediction=tuple(prediction))
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
    assert drafter.propose(_sequence([1, 2]), 4) is None
    assert drafter.num_sequences == 0


# ---- the prefix tree -----------------------------------------------------------------------------


def _finish(drive: Any, request_id: int, **submit: Any) -> list[int]:
    drive.submit(request_id, [5, 6, 7], max_tokens=30, **submit)
    while request_id not in drive.finished:
        drive.step()
    outputs: list[int] = drive.outputs[request_id]
    return outputs


def test_a_retry_is_drafted_from_the_pages_of_the_first_try(make_drive: MakeDrive) -> None:
    drive = make_drive(page_size=4)
    first = _finish(drive, 1)
    drafter = PrefixDrafter(drive.cache)
    drive.submit(2, [5, 6, 7], max_tokens=30)
    waiting = drive.scheduler._table.requests[2]
    assert drafter.propose(waiting, 5) is None, "no pages yet"
    num_drafted = 0
    while 2 not in drive.finished:
        drive.step()
        sequence = drive.scheduler._table.requests.get(2)
        if sequence is not None and (draft := drafter.propose(sequence, 5)) is not None:
            num_known = len(sequence.token_ids) - 3
            assert draft.token_ids == first[num_known : num_known + len(draft.token_ids)]
            assert (draft.probability, draft.drafter) == (0.95, "prefix")
            num_drafted += 1
            drafter.observe(sequence, [1])
    # 33 tokens, of which 32 were computed: all but the last token come from the tree.
    assert num_drafted == 28
    drafter.forget(sequence or waiting)


def test_pages_of_another_namespace_are_invisible(make_drive: MakeDrive) -> None:
    drive = make_drive(page_size=4)
    _finish(drive, 1, namespace="a")
    drafter = PrefixDrafter(drive.cache)
    for name, sees in (("b", False), ("a", True)):
        drive.submit(2, [5, 6, 7], max_tokens=30, namespace=name)
        drive.step()
        sequence = drive.scheduler._table.requests[2]
        assert (drafter.propose(sequence, 5) is not None) == sees
        drive.scheduler.cancel(2)


# ---- grammars ------------------------------------------------------------------------------------


def test_a_grammar_drafts_what_it_forces_in_the_slot() -> None:
    forced = {3: [7, 8, 9], 4: list[int]()}
    drafter = GrammarDrafter(forced.__getitem__)
    free, bound = _sequence([1]), _sequence([1])
    bound.constraint = object()
    free.slot = bound.slot = 3
    assert drafter.propose(free, 5) is None
    assert drafter.propose(bound, 2) == Draft([7, 8], 0.95, "grammar")
    bound.slot = 4
    assert drafter.propose(bound, 5) is None
    drafter.observe(bound, [7])
    drafter.forget(bound)


# ---- the choice ----------------------------------------------------------------------------------


def test_the_draft_with_the_most_expected_tokens_is_taken() -> None:
    short = ScriptedDrafter(lambda *_: [1, 1], probability=1.0)
    long = ScriptedDrafter(lambda *_: [2] * 9, probability=0.9)
    unsure = ScriptedDrafter(lambda *_: [3] * 9, probability=0.5)
    silent = ScriptedDrafter(lambda *_: [])
    sequence = _sequence([1, 2])
    best = BestDrafter([silent, short, long, unsure])
    assert best.propose(sequence, 9) == Draft([2] * 9, 0.9, "scripted")
    assert best.propose(sequence, 2) == Draft([1, 1], 1.0, "scripted")
    assert BestDrafter([silent]).propose(sequence, 9) is None
    equal = BestDrafter([ScriptedDrafter(lambda *_: [4, 4]), short])
    assert equal.propose(sequence, 9) == Draft([4, 4], 1.0, "scripted")
    best.observe(sequence, [2])
    best.forget(sequence)
    for drafter in (silent, short, long, unsure):
        assert [gone.request_id for gone in drafter.forgotten] == [0]
        assert drafter.observed == {0: [2]}


def test_expected_tokens() -> None:
    assert num_expected_tokens(Draft([1, 2, 3], 1.0, "x")) == 3
    assert num_expected_tokens(Draft([1, 2, 3], 0.5, "x")) == pytest.approx(0.875)


@pytest.mark.parametrize(
    ("speculation", "names"),
    [
        ("auto", ("scripted", "prediction", "prefix", "suffix")),
        ("suffix", ("scripted", "prediction", "suffix")),
        ("ngram", ("scripted", "prediction", "ngram")),
    ],
)
def test_drafters_by_name(speculation: str, names: tuple[str, ...]) -> None:
    further = ScriptedDrafter(lambda *_: [])
    drafters = build_drafters(speculation, KVCache(4, 4), further=[further])
    assert drafters is not None
    assert drafters.names == names


def test_no_drafters() -> None:
    assert build_drafters("none", KVCache(4, 4)) is None
    with pytest.raises(
        ValueError, match="speculation must be none, auto, ngram or suffix, got 'x'"
    ):
        build_drafters("x", KVCache(4, 4))
    with pytest.raises(ValueError, match="prompt_lookup_min"):
        build_drafters("ngram", KVCache(4, 4), lookup_min_tokens=-1)
