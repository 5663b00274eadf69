"""A draft model changes no token, and its pages hold the keys of all tokens that are cached.

As the draft of itself a model is always right, and its two pools must hold the same keys.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from cache.view import View
from configs.schema import CacheSection, ModelSection, OctavoConfig, SchedulerSection
from model import build
from model.interface import SamplingParams, SlotStart, StepInput
from model.runner import TorchRunner
from model.weights.source import ModelSource
from scheduler.drafters.choice import BestDrafter
from scheduler.engine import Engine
from scheduler.messages import GenerateRequest, Submit
from scheduler.speculation import Speculation

_PAGE_SIZE = 4
_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
#: Right by chance alone.
_OTHER = _CONFIG | {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
#: Of the model, and of `_OTHER` beside it.
_PAGE_BYTES = {"same": 2 * 2 * 2 * 2 * 16 * 2 * 4, "other": (2 * 2 * 2 + 2 * 2) * 16 * 2 * 4}

MakeSource = Callable[..., ModelSource]
MakeRunner = Callable[..., TorchRunner]


@pytest.fixture(scope="module")
def make_source(tmp_path_factory: pytest.TempPathFactory) -> MakeSource:
    """Dummies by their config."""

    def make(config: dict[str, Any]) -> ModelSource:
        path: Path = tmp_path_factory.mktemp("tiny") / "config.json"
        path.write_text(json.dumps(config))
        return build.resolve_source(f"dummy:{path}")

    return make


def _config(num_pages: int, page_bytes: int, **changes: Any) -> OctavoConfig:
    model: dict[str, Any] = {"quantization": "bf16", "threads": 1, "weights_cache": "off"} | changes
    return OctavoConfig(
        model=ModelSection(**model),
        cache=CacheSection(kv_cache_memory=num_pages * page_bytes, page_size=_PAGE_SIZE),
        scheduler=SchedulerSection(
            max_num_seqs=6, max_num_batched_tokens=64, speculation="draft:it", speculative_tokens=5
        ),
    )


@pytest.fixture(scope="module")
def make_runner(make_source: MakeSource) -> Iterator[MakeRunner]:
    """Runners on the same weights: alone, as their own draft, or with another one."""
    runners: dict[tuple[str, int], TorchRunner] = {}
    drafts = {"": None, "same": make_source(_CONFIG), "other": make_source(_OTHER)}

    def make(draft: str, num_pages: int) -> TorchRunner:
        if (draft, num_pages) not in runners:
            config = _config(num_pages, _PAGE_BYTES[draft] if draft else _PAGE_BYTES["same"] // 2)
            runner = build.make_runner(make_source(_CONFIG), config, draft_source=drafts[draft])
            assert runner.info.num_pages == num_pages
            if "cpu" not in runner.info.attention_backend:
                pytest.skip("the compiled decoder is not available here")
            runners[draft, num_pages] = runner
        return runners[draft, num_pages]

    yield make
    for runner in runners.values():
        runner.close()


class _Served:
    """An engine on a runner. Nothing is timed, so drafts are as long as there is room."""

    def __init__(self, runner: TorchRunner, budget: int) -> None:
        section = SchedulerSection(
            max_num_seqs=6,
            max_num_batched_tokens=budget,
            speculation="draft:it" if runner.info.draft_model else "none",
            speculative_tokens=5,
            debug=True,
        )
        self._runner = runner
        self.engine = Engine(runner, section, lambda: 0.0, lambda _: None)
        # Guesses alone: those texts that repeat would hide them.
        speculation: Speculation = self.engine._scheduler._speculation
        for kind in speculation._kinds[:-1]:
            kind.drafter = BestDrafter([])

    def run(self, submits: list[Submit]) -> dict[int, list[int]]:
        outputs: dict[int, list[int]] = {submit.request_id: [] for submit in submits}
        for submit in submits:
            self.engine.handle(submit)
        while self.engine.has_work:
            result = self.engine.step()
            assert not result.failed
            assert not result.rejected
            for request_id, token_id in zip(result.request_ids, result.token_ids, strict=True):
                outputs[request_id].append(token_id)
        return outputs

    @property
    def drafts(self) -> tuple[int, int]:
        """Guesses that were verified, and accepted ones."""
        found = self.engine.stats().scheduler.speculation.drafters
        assert [one.drafter for one in found] in ([], ["model"])
        return (found[0].offered_tokens_total, found[0].accepted_tokens_total) if found else (0, 0)

    def check_keys(self) -> None:
        """Assert that both pools hold the same in all cached pages."""
        free = set(self.engine.cache._pool.free_ids)
        cached = [page for page in range(self._runner.info.num_pages) if page not in free]
        assert cached, "nothing is cached"
        draft_model = self._runner._draft_model
        assert draft_model is not None
        pairs = zip(self._runner._pool._planes, draft_model._pool._planes, strict=True)
        for plane, draft_plane in pairs:
            assert torch.equal(plane[:, cached], draft_plane[:, cached])


def _submit(request_id: int, prompt: tuple[int, ...], num_tokens: int, **params: Any) -> Submit:
    given = {"temperature": 0.0, "ignore_eos": True} | params
    return Submit(request_id, GenerateRequest(prompt, SamplingParams(num_tokens, **given)))


@st.composite
def _requests(draw: Any) -> list[Submit]:
    """Return a few requests whose prompts often share their beginnings."""
    stem = draw(st.lists(st.integers(3, 255), max_size=14))
    return [
        _submit(
            request_id,
            (*stem, *draw(st.lists(st.integers(3, 255), min_size=1, max_size=6))),
            draw(st.integers(1, 14)),
            temperature=draw(st.sampled_from([0.0, 0.0, 1.0])),
            repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
            prompt_logprobs=draw(st.sampled_from([None, None, 0])),
        )
        for request_id in range(draw(st.integers(1, 5)))
    ]


@settings(max_examples=15)
@given(
    requests=_requests(),
    budget=st.integers(6, 40),
    num_pages=st.sampled_from([10, 12, 60]),
    draft=st.sampled_from(["same", "other"]),
)
def test_on_is_off(
    make_runner: MakeRunner, requests: list[Submit], budget: int, num_pages: int, draft: str
) -> None:
    """Also cold and warm, in chunks, over page borders, and with preemptions."""
    expected = _Served(make_runner("", 60), 64).run(requests)
    served = _Served(make_runner(draft, num_pages), budget)
    for state in ("cold", "warm"):
        assert served.run(requests) == expected, state
        if draft == "same" and num_pages == 60:
            served.check_keys()


def test_the_property_is_about_something(make_runner: MakeRunner) -> None:
    stem = tuple(range(40, 50))
    requests = [_submit(n, (*stem, 100 + n), 14) for n in range(6)]
    expected = _Served(make_runner("", 60), 64).run(requests)
    shares = {}
    for draft in ("same", "other"):
        served = _Served(make_runner(draft, 12), 8)
        assert served.run(requests) == expected
        stats = served.engine.stats()
        assert stats.scheduler.preemptions_total > 0
        assert stats.scheduler.prefix_hits_tokens_total > 0
        assert stats.cache.copied_pages_total > 0
        offered, accepted = served.drafts
        assert offered > 20
        shares[draft] = accepted / offered
    assert shares["same"] == 1.0
    assert shares["other"] < 0.5


def test_keys_lack_nowhere(make_runner: MakeRunner) -> None:
    """With and without drafts, behind accepted and wrong ones, and after a restart."""
    served = _Served(make_runner("same", 60), 16)
    plain = _submit(0, tuple(range(3, 14)), 30)
    requests = [
        Submit(
            0,
            GenerateRequest(
                plain.request.prompt_token_ids, plain.request.params, may_speculate=False
            ),
        ),
        # Wrong where the draw is not the likeliest token.
        _submit(1, tuple(range(60, 69)), 30, temperature=1.0, seed=5),
        _submit(2, tuple(range(90, 97)), 30),
    ]
    outputs = served.run(requests)
    served.check_keys()
    offered, accepted = served.drafts
    assert 0 < accepted < offered
    restarted = _Served(make_runner("same", 60), 16)
    resumed = [
        Submit(one.request_id, one.request, tuple(outputs[one.request_id][:11]), is_resumed=True)
        for one in requests
    ]
    rest = restarted.run(resumed)
    assert {n: [*outputs[n][:11], *tokens] for n, tokens in rest.items()} == outputs
    restarted.check_keys()


def test_what_it_tells_of_itself(make_runner: MakeRunner) -> None:
    alone, both = make_runner("", 60).info, make_runner("other", 60).info
    assert alone.draft_model == ""
    assert both.draft_model == "dummy-config"
    assert both.weights_bytes > alone.weights_bytes
    assert both.kv_bytes_per_token == _PAGE_BYTES["other"] // _PAGE_SIZE
    assert any("drafts by dummy-config" in note for note in both.notes)


@pytest.mark.parametrize(
    ("draft", "changes", "message"),
    [
        ({"vocab_size": 255}, {}, "has 255 tokens in its vocabulary, the served model 256"),
        ({"max_position_embeddings": 48}, {}, "reads 48 tokens at most.*set --max-model-len 48"),
        ({"hidden_size": 63}, {}, "the draft model dummy-config: "),
    ],
)
def test_a_draft_model_that_does_not_fit_is_refused(
    make_source: MakeSource, draft: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    config = _config(60, _PAGE_BYTES["same"], **changes)
    with pytest.raises(ValueError, match=f"^speculation: .*{message}"):
        build.make_runner(make_source(_CONFIG), config, draft_source=make_source(_CONFIG | draft))


def test_a_draft_model_sees_no_more_than_is_kept(make_source: MakeSource) -> None:
    windowed = make_source(_CONFIG | {"model_type": "mistral", "sliding_window": 16})
    config = _config(60, _PAGE_BYTES["same"])
    with pytest.raises(ValueError, match="reads more than the last 16 tokens"):
        build.make_runner(windowed, config, draft_source=make_source(_CONFIG))


def test_a_shorter_limit_lets_it_fit(make_source: MakeSource) -> None:
    short = make_source(_CONFIG | {"max_position_embeddings": 48})
    config = _config(60, _PAGE_BYTES["same"], max_model_len=48)
    runner = build.make_runner(make_source(_CONFIG), config, draft_source=short)
    assert runner.info.max_model_len == 48
    while runner.idle():
        pass
    runner.close()


def test_a_view_of_a_request_is_refused(make_runner: MakeRunner) -> None:
    """The draft model reads all keys, and pages out of view may belong to others."""
    start = SlotStart(0, SamplingParams(1), [3], view=View(window=8))
    step = StepInput([3], [0], [1], [0], [[0]], [0], started=[start])
    with pytest.raises(ValueError, match="a draft model cannot follow the view"):
        make_runner("other", 60).launch(step)
