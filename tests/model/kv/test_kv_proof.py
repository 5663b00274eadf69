"""The proof of a lossy format at the start: its figures, and the refusal of a format."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from configs.schema import CacheSection, ModelSection, OctavoConfig
from model import build
from model.architectures.transformer import ServedDecoder
from model.attention import reference
from model.implementation import build_decoder
from model.kv.format import float_format
from model.kv_proof import Divergence, PagedText
from model.ops import TorchOps
from model.runner import TorchRunner
from server.text.load import load_text
from server.text.prose import PROSE, prose_token_ids

_CONFIG = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_TEXT = [one * 7 % 90 for one in range(40)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "config.json"
    path.write_text(json.dumps(_CONFIG))
    return path


@pytest.fixture(scope="module")
def decoder(tiny: Path) -> ServedDecoder:
    return build_decoder(
        build.resolve_source(f"dummy:{tiny}"),
        ModelSection(quantization="none", threads=1),
        dtype=torch.float32,
        device=torch.device("cpu"),
        ops=TorchOps(),
        tiles=None,
    )


def _paged(decoder: ServedDecoder) -> PagedText:
    spec = decoder.attention_spec(float_format(torch.float32))
    return PagedText(decoder, spec, reference.offer(spec), len(_TEXT))


@torch.inference_mode()
def test_neither_steps_nor_dropped_tokens_change_a_text(decoder: ServedDecoder) -> None:
    whole = _paged(decoder).append(_TEXT)
    text = _paged(decoder)
    parts = [text.append(_TEXT[:3]), text.append(_TEXT[3:20])]
    text.append([5] * 20)
    text.rewind(20)
    parts.append(text.append(_TEXT[20:]))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_divergences_are_those_of_their_definitions(decoder: ServedDecoder) -> None:
    generator = torch.Generator().manual_seed(0)
    # Of several texts, one longer than the logits that are held at once.
    lengths = 100, 9
    divergence = Divergence(decoder)
    logits, ids = [], []
    for length in lengths:
        exact = torch.randn(length, 64, generator=generator)
        other = exact + 0.3 * torch.randn(length, 64, generator=generator)
        next_ids = torch.randint(96, (length,), generator=generator)
        divergence.add(exact, other, next_ids.tolist())
        logits.append([decoder.logits(hidden).double() for hidden in (exact, other)])
        ids.append(next_ids)
    exact, other = (torch.cat(one) for one in zip(*logits, strict=True))
    expected = functional.kl_div(
        other.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert divergence.num_tokens == 109
    assert divergence.kl == pytest.approx(float(expected), rel=1e-3)
    for found, of in ((divergence.expected_perplexity, exact), (divergence.perplexity, other)):
        wanted = functional.cross_entropy(of, torch.cat(ids)).exp()
        assert found == pytest.approx(float(wanted), rel=1e-4)
    assert divergence.rise == pytest.approx(
        divergence.perplexity / divergence.expected_perplexity - 1
    )
    same = (exact.argmax(-1) == other.argmax(-1)).double().mean()
    assert divergence.same_share == pytest.approx(float(same))


def _start(model: str, token_ids: tuple[int, ...], **cache: Any) -> TorchRunner:
    config = OctavoConfig(
        model=ModelSection(model=model, threads=1),
        cache=CacheSection(kv_cache_memory="16MiB", **cache),  # type: ignore[arg-type] # parsed
    )
    return build.make_runner(build.resolve_source(model), config, (), token_ids)


@pytest.fixture(scope="module")
def prose(smollm2_file: Path) -> tuple[int, ...]:
    tokenizer = load_text(smollm2_file).tokenizer
    token_ids = prose_token_ids(tokenizer)
    assert len(token_ids) == 512
    assert PROSE.startswith(tokenizer.decode(token_ids, skip_special_tokens=True))
    return token_ids


def test_a_start_measures_a_lossy_format(smollm2_file: Path, prose: tuple[int, ...]) -> None:
    runner = _start(str(smollm2_file), prose, kv_cache_dtype="int8")
    info = runner.info
    [note] = [note for note in info.notes if note.startswith("keys and values in int8")]
    assert "over 511 built-in tokens" in note
    found = re.search(r"\(([+-][\d.]+)%\); KL divergence (\S+)", note)
    assert found is not None
    assert abs(float(found[1])) < 1
    assert 0 < float(found[2]) < 1e-3
    assert info.kv_factor == pytest.approx(256 / 132, abs=1e-3)
    assert info.kv_bytes_per_token == 30 * 3 * 132


def test_a_format_beyond_the_bound_is_refused(smollm2_file: Path, prose: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"int4 costs this model too much.*--kv-quality-bound"):
        _start(str(smollm2_file), prose, kv_cache_dtype="int4", kv_quality_bound=0.0)


@pytest.mark.parametrize(
    ("kv_cache_dtype", "proves"),
    [("float16", False), ("auto", False), ("fp8", True), ("kivi4", True)],
)
def test_only_lossy_formats_are_proved(tiny: Path, kv_cache_dtype: str, proves: bool) -> None:
    # Longer than the model's context, and with tokens that the model does not have.
    token_ids = tuple(range(60, 260))
    runner = _start(f"dummy:{tiny}", token_ids, kv_cache_dtype=kv_cache_dtype)
    notes = [note for note in runner.info.notes if "perplexity" in note]
    assert ["over 63 built-in tokens" in note for note in notes] == [True] * proves
