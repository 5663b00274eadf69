"""A fault of one row in the real runner ends that row's request and changes no other's tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.schema import CacheSection, ModelSection, OctavoConfig, SchedulerSection
from model import build
from model.architectures.transformer import Decoder
from model.attention.interface import AttentionBackend
from model.interface import SamplingParams
from model.runner import TorchRunner
from model.sampling.sampled_tokens import Span
from model.sampling.sampler import Sampler
from scheduler.engine import Engine
from scheduler.messages import FinishReason, GenerateRequest, Submit

_CONFIG = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "initializer_range": 0.5,
}
_PAGE_SIZE = 4
_BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4
_NUM_PAGES = 512
#: The token that makes a request fail. Others are kept from it.
_POISON = 200
_NUM_TOKENS = 10


class FaultyDecoder:
    """Fails, in one of several ways, for a row that holds `_POISON`."""

    def __init__(self, decoder: Decoder, way: str) -> None:
        self._decoder, self._way = decoder, way

    def forward(self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend) -> Tensor:
        hidden = self._decoder.forward(token_ids, positions, attention)
        is_poison = token_ids == _POISON
        if self._way == "raises" and bool(is_poison.any()):
            raise RuntimeError("poison")
        return torch.where(is_poison.unsqueeze(-1), torch.nan, hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._decoder.logits(hidden)


@pytest.fixture(scope="module")
def runners(
    tmp_path_factory: pytest.TempPathFactory,
    overlapped: Callable[[TorchRunner, int], TorchRunner],
) -> Iterator[dict[str, TorchRunner]]:
    path = tmp_path_factory.mktemp("tiny") / "config.json"
    path.write_text(json.dumps(_CONFIG))
    config = OctavoConfig(
        model=ModelSection(quantization="none", attention_backend="torch", threads=1),
        cache=CacheSection(
            kv_cache_memory=_NUM_PAGES * _PAGE_SIZE * _BYTES_PER_TOKEN, page_size=_PAGE_SIZE
        ),
        scheduler=SchedulerSection(max_num_seqs=32, max_num_batched_tokens=64),
    )
    runner = build.make_runner(build.resolve_source(f"dummy:{path}"), config)
    # Its decodes are not replayed from graphs: these call the decoder they were made with.
    found = {"one step": runner, "two steps": overlapped(runner, 32)}
    found["two steps"]._graphs = None
    yield found
    runner.close()


def _serve(runner: TorchRunner, num_rows: int, **params: Any) -> tuple[Any, Any]:
    """Return every request's tokens, and the failures. The middle request, if any, is poison."""
    ticks = count()
    config = SchedulerSection(max_num_seqs=32, max_num_batched_tokens=64, debug=True)
    engine = Engine(runner, config, lambda: float(next(ticks)), lambda _: None)
    tokens: dict[int, list[int]] = {}
    failed: dict[int, str] = {}
    for request_id in range(num_rows):
        prompt = (*range(3, 8 + request_id % 7), 100 + request_id)
        is_poison = request_id == num_rows // 2
        sampling = SamplingParams(
            max_tokens=_NUM_TOKENS,
            ignore_eos=True,
            seed=request_id,
            # Its first token is the poison, which the step after computes.
            allowed_token_ids=(_POISON,) if is_poison and params.get("is_faulty") else None,
            logit_bias=((_POISON, 0.0 if is_poison else -100.0),),
            temperature=params["temperature"],
        )
        tokens[request_id] = []
        engine.handle(Submit(request_id, GenerateRequest(prompt, sampling)))
    for _ in range(400):
        if not engine.has_work:
            break
        result = engine.step()
        engine.check()
        for request_id, token_id in zip(result.request_ids, result.token_ids, strict=True):
            tokens[request_id].append(token_id)
        failed |= dict(result.failed)
    assert not engine.has_work
    assert engine.stats().cache.pages_private == engine.stats().cache.pages_leased == 0
    return tokens, failed


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("num_rows", [1, 8, 32])
@pytest.mark.parametrize("way", ["raises", "is not finite"])
@pytest.mark.parametrize("which", ["one step", "two steps"])
def test_only_the_one_at_fault_ends(
    runners: dict[str, TorchRunner], which: str, way: str, num_rows: int, temperature: float
) -> None:
    runner, guilty = runners[which], num_rows // 2
    undisturbed, failed = _serve(runner, num_rows, temperature=temperature)
    assert failed == {}
    sound = runner._decoder
    runner._decoder = FaultyDecoder(sound, way)
    try:
        tokens, failed = _serve(runner, num_rows, temperature=temperature, is_faulty=True)
    finally:
        runner._decoder = sound
    message = "RuntimeError" if way == "raises" else "no token has a finite logit"
    assert failed.keys() == {guilty}
    assert message in failed[guilty]
    assert tokens.pop(guilty) == [_POISON]
    del undisturbed[guilty]
    assert tokens == undisturbed
    assert all(len(found) == _NUM_TOKENS for found in tokens.values())
    # Nothing of it stays behind.
    assert _serve(runner, num_rows, temperature=temperature)[1] == {}


def test_a_step_whose_tokens_cannot_be_read_harms_no_later_step(
    runners: dict[str, TorchRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error while the tokens of a step are settled would recur in each launch after it."""
    runner = runners["two steps"]
    follow = Sampler._follow

    def raise_for_poison(self: Sampler, plan: Any, spans: list[Span]) -> None:
        if any(_POISON in span.token_ids for span in spans):
            raise RuntimeError("poison")
        follow(self, plan, spans)

    monkeypatch.setattr(Sampler, "_follow", raise_for_poison)
    ticks = count()
    config = SchedulerSection(max_num_seqs=32, max_num_batched_tokens=64, debug=True)
    engine = Engine(runner, config, lambda: float(next(ticks)), lambda _: None)
    letters = (5, 6, 7, 8)
    for request_id, (allowed, num_tokens) in enumerate(
        [(letters, 6), ((_POISON,), 6), (letters, 6), (letters, 1)]
    ):
        params = SamplingParams(
            max_tokens=num_tokens, ignore_eos=True, allowed_token_ids=allowed, bad_words=((9, 9),)
        )
        engine.handle(Submit(request_id, GenerateRequest((3, 4, 10 + request_id), params)))
    ends: dict[int, FinishReason] = {}
    failed: list[int] = []
    while engine.has_work:
        result = engine.step()
        ends |= dict(result.finished)
        failed += [request_id for request_id, _ in result.failed]
    assert failed == [1]
    assert ends == dict.fromkeys((0, 2, 3), FinishReason.LENGTH)
