"""Drafters against plain oracles: each draft is a place in a text that the sequence may read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known_sequences import sequence_of
from scripted_drafter import ScriptedDrafter
from text_places import TOKENS
from text_places import places as places_of

from cache.kv_cache import KVCache
from model.interface import PENDING_TOKEN
from scheduler.drafters.choice import BestDrafter, build_drafters, num_expected_tokens
from scheduler.drafters.draft import Draft, Drafter
from scheduler.drafters.grammar import GrammarDrafter
from scheduler.drafters.lookups import MIN_MATCH_TOKENS, NgramDrafter, SuffixDrafter
from scheduler.drafters.prediction import PredictionDrafter
from scheduler.drafters.prefix import PrefixDrafter
from scheduler.drafters.text_index import END, TextIndex
from scheduler.drafters.texts import OwnTexts, PastOutputs

MakeDrive: TypeAlias = Callable[..., Any]
texts = st.lists(st.sampled_from(TOKENS), max_size=40)


# ---- what all drafters have in common ------------------------------------------------------------


def _past() -> SuffixDrafter:
    drafter = SuffixDrafter()
    drafter.forget(sequence_of([9], (1, 2, 3, 1, 1, 2, 2, 3, 3), request_id=99))
    return drafter


DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "ngram": NgramDrafter,
    "suffix": SuffixDrafter,
    "past outputs": _past,
    "prediction": PredictionDrafter,
    "best": lambda: BestDrafter([PredictionDrafter(), SuffixDrafter(), NgramDrafter(2)]),
}


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_forgotten_sequence_leaves_no_trace_of_its_own_text(name: str) -> None:
    """A sequence with its id, but another text, is drafted as by a new drafter."""
    drafter, fresh = DRAFTERS[name](), DRAFTERS[name]()
    drafter.propose(sequence_of([1, 2, 3, 4, 1, 2, 3]), 4)
    drafter.forget(sequence_of([1, 2, 3, 4, 1, 2, 3]))
    after = [5, 6, 7, 8, 5, 6, 7]
    assert drafter.propose(sequence_of(after), 4) == fresh.propose(sequence_of(after), 4)


@pytest.mark.parametrize("name", DRAFTERS)
@given(st.data())
@settings(max_examples=30)
def test_a_draft_is_a_function_of_the_tokens_and_within_its_limits(
    name: str, data: st.DataObject
) -> None:
    """Where a prediction is read depends on the steps too, so its twin takes the same ones."""
    drafter, twin, prompt = DRAFTERS[name](), DRAFTERS[name](), data.draw(texts.filter(bool))
    prediction = tuple(data.draw(texts))
    sequence = sequence_of(prompt, prediction=prediction)
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


class _ReadInParts(list[int]):
    """Tokens that are read one by one or in short slices: a walk over all would grow with them."""

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("all tokens of a sequence are read")

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        assert not isinstance(found, list) or len(found) <= 8, "too many tokens are read at once"
        return found


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_proposal_reads_new_tokens_alone(name: str) -> None:
    drafter, sequence = DRAFTERS[name](), sequence_of([1, 2, 3] * 40, prediction=(1, 2, 3) * 40)
    drafter.propose(sequence, 4)
    for token_id in (1, 2, 9, 1, 2, 3):
        sequence.token_ids = _ReadInParts([*list.__iter__(sequence.token_ids), token_id])
        drafter.propose(sequence, 4)


@given(texts.filter(bool), texts, st.integers(1, 12))
def test_an_ngram_draft_follows_the_longest_repetition(
    prompt: list[int], output: list[int], most: int
) -> None:
    sequence = sequence_of(prompt, tuple(output))
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


def test_the_longest_match_decides_and_then_the_latest() -> None:
    text = [1, 2, 3, 4, 50, 9, 2, 3, 4, 60]
    for last, expected in (([1, 2, 3, 4], 50), ([9, 2, 3, 4], 60), ([2, 3, 4], 60)):
        draft = NgramDrafter().propose(sequence_of([*text, 0, *last]), 1)
        assert draft is not None
        assert draft.token_ids == [expected]


def test_the_bounds_of_an_ngram_are_checked() -> None:
    assert NgramDrafter(2, 2).propose(sequence_of([1, 2, 3, 1, 2]), 1) == Draft([3], 0.75, "ngram")
    assert NgramDrafter(3).propose(sequence_of([1, 2, 3, 1, 2]), 1) is None
    assert NgramDrafter(40).propose(sequence_of([7] * 41), 1) is not None
    with pytest.raises(ValueError, match="prompt_lookup_min must be at least 1, got 0"):
        NgramDrafter(0)
    with pytest.raises(ValueError, match=r"prompt_lookup_max must be at least .* \(4\), got 3"):
        NgramDrafter(4, 3)


def test_a_suffix_draft_grows_with_its_match() -> None:
    drafter = SuffixDrafter(factor=2.0)
    text = list(range(50))
    lengths = {}
    for matched in (2, 3, 4, 10, 40):
        draft = drafter.propose(sequence_of([*text, 99, *text[:matched]], request_id=matched), 30)
        lengths[matched] = 0 if draft is None else len(draft.token_ids)
    assert lengths == {2: 0, 3: 6, 4: 8, 10: 20, 40: 30}


def test_a_long_prompt_is_indexed_over_several_steps() -> None:
    prompt = [*range(5000), 0, 1, 2]
    sequence, drafter = sequence_of(prompt), NgramDrafter()
    drafts = [drafter.propose(sequence, 2) for _ in range(3)]
    assert [draft and draft.token_ids for draft in drafts] == [[3, 4]] * 3
    own = OwnTexts(lambda: TextIndex(1 << 15, 3))
    assert [own.index(sequence).end for _ in range(4)] == [2048, 4096, 5003, 5003]


# ---- namespaces and bounds -----------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from("abc"), texts), max_size=8), texts.filter(bool))
def test_past_outputs_stay_in_their_namespace(
    outputs: list[tuple[str, list[int]]], prompt: list[int]
) -> None:
    """A namespace gets the drafts that it would get alone on the server."""
    drafter, alone = SuffixDrafter(), {name: SuffixDrafter() for name in "abc"}
    for number, (namespace, output) in enumerate(outputs):
        for one in (drafter, alone[namespace]):
            one.forget(sequence_of([7], tuple(output), request_id=number, namespace=namespace))
    for name in "abc":
        asked = sequence_of(prompt, namespace=name, request_id=len(outputs))
        assert drafter.propose(asked, 8) == alone[name].propose(asked, 8)
        drafter.forget(asked)


def test_a_past_output_is_drafted_in_its_namespace_alone() -> None:
    drafter = SuffixDrafter()
    drafter.forget(sequence_of([1], (11, 12, 13, 14, 15), namespace="a"))
    asked = {name: sequence_of([2], (11, 12, 13), namespace=name, request_id=5) for name in "ab"}
    assert drafter.propose(asked["a"], 9) == Draft([14, 15], 0.8, "suffix")
    assert drafter.propose(asked["b"], 9) is None


def test_an_output_that_is_not_to_be_stored_is_never_drafted() -> None:
    past = PastOutputs(lambda: TextIndex(64, 3))
    past.add(sequence_of([1], tuple(range(30)), namespace="private", store_up_to=0))
    assert past.index("private") is None


def test_past_outputs_are_bounded() -> None:
    past = PastOutputs(lambda: TextIndex(64, 3), max_namespaces=4)
    for number in range(1000):
        past.add(sequence_of([1], tuple(range(30)), namespace=str(number)))
        assert past.index("0") is not None, "the one that is used stays"
    assert past.num_namespaces == 4
    for _ in range(10):
        past.add(sequence_of([1], tuple(range(30)), namespace="0"))
    index = past.index("0")
    assert index is not None
    assert index.end - index.start == 64
    past.add(sequence_of([1], namespace="none"))
    assert past.index("none") is None, "no output, no namespace"
    past.add(sequence_of([1], (5, PENDING_TOKEN), namespace="cut"))
    cut = past.index("cut")
    assert cut is not None
    assert cut.read(0, 9) == [5, END]


def test_nothing_is_kept_of_sequences_that_ended() -> None:
    prediction, own = PredictionDrafter(), OwnTexts(lambda: TextIndex(64, 3))
    for number in range(50):
        sequence = sequence_of([1, 2, 3], request_id=number, prediction=(4, 5, 6))
        prediction.propose(sequence, 3)
        own.index(sequence)
        assert prediction.num_sequences == own.num_sequences == 1
        prediction.forget(sequence)
        own.forget(sequence)
        own.forget(sequence)
    assert prediction.num_sequences == own.num_sequences == 0


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
    drafter.forget(waiting)


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
    free, bound = sequence_of([1]), sequence_of([1])
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
    sequence = sequence_of([1, 2])
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
        ("draft:org/small", ("scripted", "prediction", "prefix", "suffix")),
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
        ValueError, match="speculation must be none, auto, ngram, suffix or draft:MODEL, got 'x'"
    ):
        build_drafters("x", KVCache(4, 4))
    with pytest.raises(ValueError, match="prompt_lookup_min"):
        build_drafters("ngram", KVCache(4, 4), lookup_min_tokens=-1)
