"""A prompt's own log-probabilities: as float32 `log_softmax` has them, in chunks as in one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from steps import step_of

from configs.schema import CacheSection, ModelSection, OctavoConfig, SchedulerSection
from model import build
from model.interface import (
    RowSpan,
    SampleSpan,
    SamplingParams,
    ScoredSpan,
    SlotStart,
    TokenLogprobs,
)
from model.runner import SCORED_TOKENS, TorchRunner

_CONFIG = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.5,
}
_PAGE_SIZE = 4
#: More than the runner scores at once, and not a multiple of it.
PROMPT = torch.randint(0, 96, (2 * SCORED_TOKENS + 9,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> TorchRunner:
    path: Path = tmp_path_factory.mktemp("tiny") / "config.json"
    path.write_text(json.dumps(_CONFIG))
    return build.make_runner(
        build.resolve_source(f"dummy:{path}"),
        OctavoConfig(
            model=ModelSection(quantization="none", threads=1),
            cache=CacheSection(kv_cache_memory="1MiB", page_size=_PAGE_SIZE),  # type: ignore[arg-type] # parsed
            scheduler=SchedulerSection(max_num_seqs=4, max_num_batched_tokens=256),
        ),
    )


@pytest.fixture(scope="module")
def score(runner: TorchRunner) -> Callable[..., list[TokenLogprobs]]:
    """Score `PROMPT` in chunks with the given ends."""

    def in_chunks(*ends: int, num_top: int = 3) -> list[TokenLogprobs]:
        prompt = PROMPT.tolist()
        params = SamplingParams(1, prompt_logprobs=num_top)
        found: list[TokenLogprobs] = []
        pages = list(range(-(-len(prompt) // _PAGE_SIZE)))
        for start, end in zip((0, *ends), (*ends, len(prompt)), strict=True):
            is_last = end == len(prompt)
            targets = prompt[start + 1 : end + 1]
            step = step_of(
                # Another sequence goes first: rows do not begin where their tokens do.
                [5, 6, *prompt[start:end]],
                [RowSpan(0, 0, 2), RowSpan(start, start, end - start)],
                [3, 0],
                [[pages[-1] + 1], pages],
                [SampleSpan(0, 1, 1), SampleSpan(1, end - start - 1, 1)][: 1 + is_last],
                started=[
                    SlotStart(3, SamplingParams(1), [5, 6]),
                    *([] if start else [SlotStart(0, params, prompt)]),
                ],
                scored=[ScoredSpan(1, 0, targets)] if targets else [],
            )
            output = runner.launch(step).wait()
            assert len(output.token_ids) == 1 + is_last
            assert len(output.prompt_logprobs) == len(step.scored)
            found += [entry for entries in output.prompt_logprobs for entry in entries]
        return found

    return in_chunks


def test_whole_and_in_chunks(score: Callable[..., list[TokenLogprobs]]) -> None:
    whole = score()
    assert [entry.token_id for entry in whole] == PROMPT[1:].tolist()
    length = len(PROMPT)
    for ends in ((1,), (length - 1,), (SCORED_TOKENS,), (7, 50, 51, 130)):
        chunked = score(*ends)
        for ours, theirs in zip(chunked, whole, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert ours.rank == theirs.rank
            assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]


def test_only_what_was_asked_for(score: Callable[..., list[TokenLogprobs]]) -> None:
    assert {len(entry.top) for entry in score(num_top=0)} == {0}
    assert {len(entry.top) for entry in score(num_top=20)} == {20}


def test_they_are_the_log_softmax_of_the_models_logits(
    runner: TorchRunner, score: Callable[..., list[TokenLogprobs]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    logits_of = runner._decoder.logits

    def noted(hidden: torch.Tensor) -> torch.Tensor:
        logits = logits_of(hidden)
        seen.append(logits.clone())
        return logits

    monkeypatch.setattr(runner._decoder, "logits", noted)
    entries = score(num_top=4)
    # The last are those of the rows that sample.
    assert [len(logits) for logits in seen] == [SCORED_TOKENS, SCORED_TOKENS, 8, 2]
    expected = torch.cat(seen[:-1]).log_softmax(-1)
    for entry, row in zip(entries, expected, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-5)
        assert entry.rank == 1 + int((row > row[entry.token_id]).sum())
        assert [value for _, value in entry.top] == pytest.approx(
            row.topk(4).values.tolist(), abs=1e-5
        )
