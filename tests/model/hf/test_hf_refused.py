"""Models that are not served, or only in part, with the messages for the operator."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from configs.schema import CacheSection, ModelSection, OctavoConfig
from model.architectures.arch import ArchError
from model.assemble import assemble
from model.hf.attention import common_spec
from model.hf.decoder import HfDecoder, load_hf_decoder
from model.implementation import choose_implementation
from model.kv.format import KV_FORMATS
from model.weights.source import ModelSource

CPU = torch.device("cpu")
_SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


@pytest.fixture
def dummy(tmp_path: Path) -> Callable[..., ModelSource]:
    def make(family: str, **changes: Any) -> ModelSource:
        path = tmp_path / "config.json"
        no_ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
        path.write_text(json.dumps({"model_type": family, **_SIZES, **no_ids, **changes}))
        return ModelSource("dummy", path, family)

    return make


def load(source: ModelSource, **settings: Any) -> HfDecoder:
    return load_hf_decoder(source, dtype=torch.float32, device=CPU, **settings)


def config_of(**model: Any) -> OctavoConfig:
    return OctavoConfig(
        model=ModelSection(threads=1, **model), cache=CacheSection(kv_cache_memory=2**20)
    )


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("t5", {}, "has an encoder"),
        ("bart", {}, "has an encoder"),
        ("clip_text_model", {}, "no causal language model"),
        ("mamba", {}, "recurrent state"),
        ("jamba", {}, "recurrent state"),
        ("rwkv", {}, "recurrent state"),
        ("qwen3_next", {}, "recurrent state"),
        ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}, "layers of kind conv"),
        ("llama4_text", {}, "layers of kind chunked_attention"),
        ("granitemoehybrid", {"mamba_n_heads": 8}, "recurrent state"),
        ("llama4", {"text_config": {}}, "layers of kind chunked_attention"),
        ("kosmos-2", {"text_config": _SIZES}, "either `pixel_values` or `image_embeds`"),
        ("bloom", {}, "does not let others compute its attention"),
        ("falcon", {"alibi": True}, "scores depend on distances (alibi)"),
        ("doge", {}, "masks of its own"),
        # Counts positions itself, from the padding token's id.
        ("roberta", {"pad_token_id": 1, "is_decoder": True}, "something else on pages"),
        # Sees what comes after.
        ("bert", {"is_decoder": False}, "neither causal nor a sliding window"),
        (
            "olmo2",
            {"quantization_config": {"quant_method": "gptq"}},
            "weights are quantized (gptq)",
        ),
        ("olmo2", {"num_attention_heads": "four"}, "num_attention_heads"),
        (
            "gemma2",
            {"num_hidden_layers": 10**9},
            "num_hidden_layers must be at most 4096",
        ),
        ("gemma3", {"text_config": {"num_hidden_layers": 10**9}}, "must be at most 4096"),
        ("olmo2", {"max_position_embeddings": 1}, "max_position_embeddings is 1"),
        ("no_such_family", {}, "does not know it"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused_in_a_line(
    dummy: Callable[..., ModelSource], family: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ArchError, match=re.escape(reason)) as caught:
        load(dummy(family, **changes))
    assert str(caught.value).startswith(f"model_type '{family}': ")
    assert "\n" not in str(caught.value)
    assert "served are decoders of text" in str(caught.value)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's
    """Keeps the size of the largest tensor that is made."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            if isinstance(one, torch.Tensor):
                self.num_bytes = max(self.num_bytes, one.nbytes)
        return made


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("family", ["gemma2", "gpt_neox", "llama", "phi3"])
def test_nothing_is_as_long_as_the_longest_text(
    dummy: Callable[..., ModelSource], family: str
) -> None:
    longest = 2**24
    with Largest() as largest:  # type: ignore[no-untyped-call] # torch's
        decoder = load(dummy(family, max_position_embeddings=longest))
    assert decoder.arch.max_positions == longest
    # Pages for the proof are the largest.
    assert 0 < largest.num_bytes < 4 * longest


def test_without_the_package_it_is_named(
    dummy: Callable[..., ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = dummy("gpt2")
    for name in [name for name in sys.modules if name.startswith("model.hf.decoder")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"the package transformers .* cannot be imported") as told:
        assemble(source, config_of())
    assert "pip install transformers" in str(told.value)
    assert "\n" not in str(told.value)


def test_the_proof_finds_what_was_lost_on_the_way(
    dummy: Callable[..., ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = dummy("gemma2", head_dim=16, attn_logit_softcapping=0.5)
    assert load(source).attention_spec(KV_FORMATS["float32"]).softcap == 0.5
    monkeypatch.setattr(
        "model.hf.decoder.common_spec",
        lambda *args: replace(common_spec(*args), softcap=None),
    )
    with pytest.raises(ArchError, match="something else on pages than alone"):
        load(source)


def test_a_tensor_that_is_missing_is_not_made_up(make_checkpoint: Callable[..., Any]) -> None:
    folder = make_checkpoint("olmo2").folder
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ArchError, match=r"missing keys: model\.layers\.1\.mlp\.up_proj\.weight"):
        load(ModelSource("safetensors", folder, "x"))


def test_code_beside_a_model_is_not_run(make_checkpoint: Callable[..., Any]) -> None:
    folder = make_checkpoint("olmo2").folder
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('run')")
    with pytest.raises(ArchError, match="code that comes with a model is never run"):
        load(ModelSource("safetensors", folder, "x"))


def test_a_dummy_has_the_same_weights_each_time(dummy: Callable[..., ModelSource]) -> None:
    source = dummy("olmo2")
    hidden = torch.randn(3, 64)
    first = load(source).logits(hidden)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    torch.testing.assert_close(load(source).logits(hidden), first)
    assert torch.equal(torch.random.get_rng_state(), state)


# ---- whose code ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "asked", "chosen"),
    [
        ("llama", {}, "auto", "octavo"),
        ("llama", {}, "transformers", "transformers"),
        ("llama", {"hidden_act": "gelu"}, "auto", "transformers"),
        ("phi3", {}, "auto", "transformers"),
        ("phi3", {}, "octavo", "octavo"),
        ("gemma2", {}, "auto", "octavo"),
        ("gemma2", {}, "transformers", "transformers"),
    ],
)
def test_ours_where_it_knows_the_architecture(
    dummy: Callable[..., ModelSource], family: str, changes: Any, asked: str, chosen: str
) -> None:
    assert choose_implementation(dummy(family, **changes), asked)[0] == chosen


def test_the_choice_is_said(dummy: Callable[..., ModelSource]) -> None:
    source = dummy("llama", hidden_act="gelu", eos_token_id=[7, 9])
    info = assemble(source, config_of()).info
    assert info.notes[0].startswith(
        "not Octavo's own code: config.json: hidden_act: 'gelu' is not supported"
    )
    assert "LlamaForCausalLM" in info.notes[1]
    assert (info.eos_token_ids, info.vocab_size, info.quantization) == ((7, 9), 96, "none")
    assert info.kv_bytes_per_token == 2 * 4 * 2 * 16 * 4
    assert info.attention_backend in {"cpu", "torch"}
    # 16 bits halve weights and pages.
    half = assemble(source, config_of(dtype="bfloat16")).info
    assert half.kv_bytes_per_token == info.kv_bytes_per_token // 2
    assert half.weights_bytes < info.weights_bytes * 0.51
    assert half.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("family", "model", "message"),
    [
        ("phi3", {"quantization": "int8"}, "quantization int8 is for what Octavo computes"),
        ("phi3", {"model_impl": "octavo"}, "'phi3' is not supported, only llama"),
        (
            "mamba",
            {},
            "recurrent state.*Octavo's own code: config.json: model_type 'mamba' is not supported",
        ),
        ("gemma2", {"attention_backend": "cpu"}, "the model caps its attention scores"),
    ],
)
def test_what_cannot_be_is_said_at_the_start(
    dummy: Callable[..., ModelSource], family: str, model: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        assemble(dummy(family), config_of(**model))


def test_gguf_is_for_our_own_code(tmp_path: Path) -> None:
    source = ModelSource("gguf", tmp_path / "x.gguf", "x")
    assert choose_implementation(source, "auto") == ("octavo", "")
    with pytest.raises(ValueError, match="model_impl transformers"):
        choose_implementation(source, "transformers")


# ---- angles that depend on the length ------------------------------------------------------------

_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 3.0, 5.0, 9.0],
    "original_max_position_embeddings": 16,
}


def test_longrope_is_short_for_all_or_long_for_all(
    make_checkpoint: Callable[..., Any], session: Any
) -> None:
    checkpoint = make_checkpoint(
        "phi3", rope_parameters=_LONGROPE, original_max_position_embeddings=16, pad_token_id=0
    )
    short = load(checkpoint.source)
    assert short.arch.max_positions == 16
    assert "--max-model-len up to 64" in short.notes[1]
    tokens = torch.arange(3, 33)
    torch.testing.assert_close(
        session(short).feed(tokens[:16]), checkpoint.logits(tokens[:16]), rtol=1e-4, atol=1e-4
    )

    long = load(checkpoint.source, max_positions=32)
    assert long.arch.max_positions == 64
    assert "in short requests too" in long.notes[1]
    one = session(long)
    found = torch.cat([one.feed(tokens[:9]), one.feed(tokens[9:])])
    torch.testing.assert_close(found, checkpoint.logits(tokens), rtol=1e-4, atol=1e-4)
