"""The meaning of a step, for both runners; and the steps that the one with torch refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from steps import step_of

from cache.moves import PageMove, PageRef, Tier
from cache.view import FULL_VIEW, View
from configs.schema import CacheSection, ModelSection, OctavoConfig, SchedulerSection
from model import build
from model.fake import FakeRunner, fake_output
from model.interface import (
    ModelRunner,
    RowSpan,
    SampleSpan,
    SamplingParams,
    SlotStart,
    StepOutput,
)

_CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
}
PAGE_SIZE = 4
PARAMS = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.0)
PROMPT = [9, 3, 7, 7, 1, 2]
PAGES = [5, 2, 7, 1, 6]


@pytest.fixture(scope="module")
def torch_runner(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    path = tmp_path_factory.mktemp("tiny") / "config.json"
    path.write_text(json.dumps(_CONFIG))
    return build.make_runner(
        build.resolve_source(f"dummy:{path}"),
        OctavoConfig(
            model=ModelSection(quantization="none", threads=1),
            cache=CacheSection(kv_cache_memory="1MiB", page_size=PAGE_SIZE),  # type: ignore[arg-type] # parsed
            scheduler=SchedulerSection(max_num_seqs=4, max_num_batched_tokens=64),
        ),
    )


@pytest.fixture(params=["fake", "torch"])
def runner(request: pytest.FixtureRequest) -> ModelRunner:
    if request.param == "fake":
        return FakeRunner()
    made: ModelRunner = request.getfixturevalue("torch_runner")
    return made


def start(view: View = FULL_VIEW, tokens: list[int] = PROMPT) -> SlotStart:
    return SlotStart(0, PARAMS, tokens, view=view)


def step(
    runner: ModelRunner,
    token_ids: list[int],
    row: RowSpan,
    sample: SampleSpan | None = None,
    pages: list[int] = PAGES,
    **others: Any,
) -> StepOutput:
    samples = [sample or SampleSpan(0, row.count - 1, 1)]
    return runner.launch(step_of(token_ids, [row], [0], [pages], samples, **others)).wait()


def plain(runner: ModelRunner, num_tokens: int, view: View = FULL_VIEW) -> list[int]:
    """Return the tokens without drafts, moves or dropped keys."""
    output = step(runner, PROMPT, RowSpan(0, 0, len(PROMPT)), started=[start(view)])
    tokens = list(output.token_ids[0])
    while len(tokens) < num_tokens:
        position = len(PROMPT) + len(tokens) - 1
        tokens += step(runner, tokens[-1:], RowSpan(position, position, 1)).token_ids[0]
    return tokens


# ---- both ----------------------------------------------------------------------------------------


def test_each_span_gives_one_token_without_drafts(runner: ModelRunner) -> None:
    rows = [RowSpan(0, 0, 6), RowSpan(0, 0, 3)]
    started = [start(), SlotStart(1, PARAMS, PROMPT[:3])]
    samples = [SampleSpan(0, 5, 1), SampleSpan(1, 2, 1)]
    pages = [[5, 2], [3]]
    given = step_of([*PROMPT, *PROMPT[:3]], rows, [0, 1], pages, samples, [], started)
    together = runner.launch(given).wait().token_ids
    assert [len(tokens) for tokens in together] == [1, 1]
    alone = step_of(PROMPT[:3], rows[1:], [1], [[3]], [SampleSpan(0, 2, 1)], [], started[1:])
    assert runner.launch(alone).wait().token_ids == together[1:]


def test_a_span_may_stand_before_the_rows_end(runner: ModelRunner) -> None:
    output = step(runner, PROMPT, RowSpan(0, 0, 6), SampleSpan(0, 3, 1), started=[start()])
    short = step(runner, PROMPT[:4], RowSpan(0, 0, 4), started=[start(tokens=PROMPT[:4])])
    assert output.token_ids == short.token_ids


def test_moves_run_in_order_and_before_the_rows(runner: ModelRunner) -> None:
    expected = plain(runner, 3)
    # The last page is rotated with another, by way of a third.
    device = [PageRef(Tier.DEVICE, page_id) for page_id in (2, 3, 4)]
    moves = [PageMove(device[0], device[2], 2), PageMove(device[2], device[1], 2)]
    step(runner, PROMPT, RowSpan(0, 0, 6), started=[start()])
    token = expected[:1]
    found = step(runner, token, RowSpan(6, 6, 1), pages=[5, 3], moves=moves, started=[start()])
    assert found.token_ids == [expected[1:2]]


@pytest.mark.parametrize("num_right", [0, 1, 3])
def test_drafts_are_accepted_up_to_the_first_that_is_wrong(
    runner: ModelRunner, num_right: int
) -> None:
    expected = plain(runner, 6)
    [token] = step(runner, PROMPT, RowSpan(0, 0, 6), started=[start()]).token_ids[0]
    sampled_tokens = expected[1:4]
    sampled_tokens[num_right:] = [63] * (3 - num_right)
    output = step(runner, [token, *sampled_tokens], RowSpan(6, 6, 4), SampleSpan(0, 0, 4))
    assert output.token_ids == [expected[1 : num_right + 2]]
    # The keys of drafts that were not accepted are written over.
    position = 6 + num_right + 1
    newest = output.token_ids[0][-1:]
    following = step(runner, newest, RowSpan(position, position, 1))
    assert following.token_ids == [[expected[num_right + 2]]]


# ---- the one that can be computed by hand --------------------------------------------------------


def test_a_span_has_the_probabilities_of_its_own_tokens() -> None:
    runner, params = FakeRunner(), SamplingParams(20, ignore_eos=True, logprobs=0)
    started = [SlotStart(0, params, PROMPT)]
    expected = fake_output(PROMPT, 2)
    given = [*PROMPT, expected[0], 63]
    output = step(runner, given, RowSpan(0, 0, 8), SampleSpan(0, 5, 3), started=started)
    assert output.token_ids == [expected]
    assert [entry.token_id for entry in output.logprobs[0]] == expected


@pytest.mark.parametrize("view", [View(window=4), View(2, 3), View(1, 1), View(window=1)])
def test_a_view_hides_the_rest(view: View) -> None:
    expected = fake_output(PROMPT, 6, view=view)
    assert plain(FakeRunner(), 6, view) == expected
    assert plain(FakeRunner(view=view), 6) == expected, "a model's own is the same"
    assert expected != fake_output(PROMPT, 6)


def test_a_page_out_of_view_is_not_read() -> None:
    view = View(window=3)
    runner = FakeRunner()
    [token] = step(runner, PROMPT, RowSpan(0, 0, 6), started=[start(view)]).token_ids[0]
    runner.pages.forget(PAGES[:1])
    assert (
        step(runner, [token], RowSpan(6, 6, 1)).token_ids[0]
        == fake_output(PROMPT, 2, view=view)[1:]
    )


def test_a_page_in_view_is_missed() -> None:
    runner = FakeRunner()
    [token] = step(runner, PROMPT, RowSpan(0, 0, 6), started=[start(View(window=4))]).token_ids[0]
    runner.pages.forget(PAGES[:1])
    with pytest.raises(AssertionError, match="not stored any more"):
        step(runner, [token], RowSpan(6, 6, 1))


@pytest.mark.parametrize("view", [View(window=4), View(2, 3)])
def test_keys_that_a_sequence_dropped_take_no_place(view: View) -> None:
    """With all keys in view kept, the tokens are those of the view; into other pages, too."""
    expected = fake_output(PROMPT, 5, view=view)
    runner = FakeRunner()
    [token] = step(runner, PROMPT, RowSpan(0, 0, 6), started=[start(view)]).token_ids[0]
    for number, (stored, pages) in enumerate(((5, [5, 2]), (6, [5, 2]), (5, [3, 4]))):
        position = 6 + number
        found = step(runner, [token], RowSpan(position, stored, 1), pages=pages)
        [token] = found.token_ids[0]
        assert token == expected[number + 1]


def test_keys_dropped_out_of_the_view_change_the_tokens() -> None:
    runner = FakeRunner()
    [token] = step(runner, PROMPT, RowSpan(0, 0, 6), started=[start()]).token_ids[0]
    assert step(runner, [token], RowSpan(6, 4, 1)).token_ids[0] != fake_output(PROMPT, 2)[1:]


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK])
def test_pages_come_back_from_other_tiers(tier: Tier) -> None:
    runner, away, back = FakeRunner(), PageRef(tier, 0), PageRef(Tier.DEVICE, 8)
    [token] = step(runner, PROMPT, RowSpan(0, 0, 6), started=[start()]).token_ids[0]
    moves = [PageMove(PageRef(Tier.DEVICE, PAGES[0]), away, 4), PageMove(away, back, 4)]
    found = step(runner, [token], RowSpan(6, 6, 1), pages=[8, *PAGES[1:]], moves=moves)
    assert found.token_ids[0] == fake_output(PROMPT, 2)[1:]


# ---- what the one with torch refuses -------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"row": RowSpan(1, 0, 6), "sample": None}, "dropped keys"),
        (
            {
                "row": RowSpan(0, 0, 6),
                "moves": [PageMove(PageRef(Tier.HOST, 0), PageRef(Tier.DEVICE, 1), 4)],
            },
            "only pages on the device",
        ),
    ],
)
def test_what_torch_refuses(torch_runner: ModelRunner, given: dict[str, Any], message: str) -> None:
    run: Callable[..., StepOutput] = step
    with pytest.raises(ValueError, match=message):
        run(torch_runner, PROMPT, **({"started": [start()]} | given))
