"""Models of `transformers` through the whole engine, compared with that library alone.

Tiny and random, one for each thing that sets architectures apart. Pages of four tokens, prompts in
chunks, shared beginnings, several side by side, too few pages: the tokens stay the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.schema import CacheSection, ModelSection, OctavoConfig, SchedulerSection
from configs.sizes import format_size
from model.assemble import assemble
from model.hf.decoder import load_hf_decoder
from model.interface import SamplingParams
from model.kv.format import KV_FORMATS
from model.runner import TorchRunner
from model.weights.source import ModelSource
from scheduler.caches import build_cache
from scheduler.messages import GenerateRequest, Submit
from scheduler.scheduler import Scheduler
from scheduler.stats import SchedulerStats

_PAGE_SIZE = 4
_NUM_NEW_TOKENS = 10
#: Longer than any window here; two of them share all but their ends.
_STEM = tuple(range(20, 41))
_PROMPTS = ((*_STEM, 50, 51), (*_STEM, 60), (7, 8, 9), tuple(range(90, 60, -1)), (5,) * 12)

_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    # Caps on scores and on logits, norms around everything, a scale of its own, windows.
    "gemma2": {
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": _MIXED,
        "query_pre_attn_scalar": 40,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    # Two kinds of rope.
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "layer_types": _MIXED},
    # Heads of two widths: the full layers' are wider.
    "gemma4_text": {
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 96,
        "num_kv_shared_layers": 1,
    },
    "phi3": {"sliding_window": 8},
    # No RMS norms, part of a head rotated, attention and MLP side by side.
    "gpt_neox": {"num_key_value_heads": 6},
    # Positions that were learned.
    "gpt2": {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64},
    "olmo2": {},
    "starcoder2": {"sliding_window": 8},
    "qwen3_moe": {**_MOE, "moe_intermediate_size": 32, "head_dim": 16},
    "mixtral": _MOE,
    # Sinks, experts, windows.
    "gpt_oss": {
        **_MOE,
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": _MIXED,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    # Values narrower than keys.
    "deepseek_v3": {
        "num_key_value_heads": 6,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "head_dim": 8,
    },
    # Two kinds of layers, none of them with a state of its own.
    "granitemoehybrid": {
        "layer_types": ["attention"] * 3,
        "num_local_experts": 0,
        "shared_intermediate_size": 80,
        "position_embedding_type": "rope",
        "mamba_n_heads": 6,
    },
    # Layers that do not pass their arguments on to their attention; a norm for each head.
    "stablelm": {"qk_layernorm": True, "use_parallel_residual": True},
    # An attention older than the interface: one key for all heads, or for groups of them.
    "falcon": {"multi_query": True, "parallel_attn": True, "alibi": False},
    "falcon groups": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
}

_NO_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
_EYES = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_EYES_BY_DEPTH = {"depth": 1, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "patch_size": 14}
#: Models that see, with the decoder of another family or one of their own.
_SEEING: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": FAMILIES["gemma3_text"],
        "vision_config": {"model_type": "siglip_vision_model", **_EYES},
        "mm_tokens_per_image": 4,
        "image_token_index": 90,
    },
    "llava": {
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model", **_EYES},
        "image_token_index": 95,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", "head_dim": 8, "sliding_window": None},
        "vision_config": {"model_type": "pixtral", "head_dim": 16, **_EYES},
        "image_token_index": 95,
    },
    "paligemma": {
        "text_config": {"model_type": "gemma2", **FAMILIES["gemma2"]},
        "vision_config": {"model_type": "siglip_vision_model", **_EYES},
        "image_token_index": 95,
    },
    # Positions of three kinds, which are one in text.
    "qwen2_vl": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            }
        },
        "vision_config": _EYES_BY_DEPTH,
        **dict.fromkeys(("image_token_id", "video_token_id", "vision_start_token_id"), 95),
    },
    "smolvlm": {
        "text_config": {"model_type": "llama"},
        "vision_config": _EYES,
        "image_token_id": 95,
    },
}


@pytest.fixture(params=[*FAMILIES, *_SEEING])
def checkpoint(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Any]) -> Any:
    family = request.param
    if family in FAMILIES:
        return make_checkpoint(family.split()[0], **{**_NO_IDS, **FAMILIES[family]})
    changes = _SEEING[family]
    return make_checkpoint(family, **changes | {"text_config": _NO_IDS | changes["text_config"]})


def make_runner(source: ModelSource, num_pages: int, **model: Any) -> TorchRunner:
    """Return a runner with just so many pages."""
    decoder_config = ModelSection(threads=1, **model)
    decoder = load_hf_decoder(source, dtype=torch.float32, device=torch.device("cpu"))
    layout = decoder.attention_spec(KV_FORMATS["float32"]).layout(_PAGE_SIZE)
    memory = num_pages * layout.bytes_per_page
    return assemble(
        source,
        OctavoConfig(
            model=decoder_config,
            cache=CacheSection(kv_cache_memory=memory, page_size=_PAGE_SIZE),
            scheduler=SchedulerSection(max_num_seqs=6, max_num_batched_tokens=64),
        ),
    )


class Engine:
    """Scheduler, cache and runner, step by step."""

    def __init__(self, runner: TorchRunner) -> None:
        self.runner = runner
        config = SchedulerSection(max_num_seqs=6, max_num_batched_tokens=7)
        self.cache = build_cache(runner.info, config)
        self.scheduler = Scheduler(self.cache, config, runner.info)

    def run(self, prompts: tuple[tuple[int, ...], ...]) -> list[list[int]]:
        params = SamplingParams(max_tokens=_NUM_NEW_TOKENS, temperature=0.0, ignore_eos=True)
        outputs: list[list[int]] = [[] for _ in prompts]
        for index, prompt in enumerate(prompts):
            assert self.scheduler.submit(Submit(index, GenerateRequest(prompt, params))) == []
        while self.scheduler.has_work:
            plan = self.scheduler.plan()
            if plan is None:
                continue
            outcome = self.scheduler.apply(plan, self.runner.launch(plan.step).wait())
            for index, token_id in zip(outcome.request_ids, outcome.token_ids, strict=True):
                outputs[index].append(token_id)
            self.scheduler.check()
            self.cache.check()
        return outputs

    def stats(self) -> SchedulerStats:
        return self.scheduler.stats()


def test_tokens_and_logits_are_those_of_transformers(checkpoint: Any, session: Any) -> None:
    expected = [checkpoint.generate(prompt, _NUM_NEW_TOKENS) for prompt in _PROMPTS]
    assert len(set(map(tuple, expected))) == len(_PROMPTS), "random enough to tell them apart"

    theirs = {"model_impl": "transformers"}
    roomy = Engine(make_runner(checkpoint.source, 80, **theirs))
    assert any("computed by transformers" in note for note in roomy.runner.info.notes)
    assert roomy.runner.info.why_no_views == "the model is computed by transformers"
    assert roomy.run(_PROMPTS) == expected, "cold, in chunks of seven, side by side"
    assert roomy.run(_PROMPTS) == expected, "warm"
    assert roomy.stats().prefix_hits_tokens_total > len(_STEM)

    # Pages behind a window of the whole model are freed, so a sequence takes fewer.
    num_pages = 12 if roomy.runner.info.view.window is None else 7
    tight = Engine(make_runner(checkpoint.source, num_pages, **theirs))
    assert tight.run(_PROMPTS) == expected, "preempted"
    assert tight.stats().preemptions_total > 0

    decoder = load_hf_decoder(
        checkpoint.source, dtype=torch.float32, device=torch.device("cpu"), max_positions=64
    )
    tokens = torch.tensor(_PROMPTS[3])
    one = session(decoder)
    found = torch.cat([one.feed(tokens[:5]), one.feed(tokens[5:6]), one.feed(tokens[6:])])
    torch.testing.assert_close(found, checkpoint.logits(tokens), rtol=1e-4, atol=1e-4)


#: The values of four bits (OCP Microscaling Formats, E2M1); a scale is a power of two, bias 127.
_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def test_mxfp4_is_expanded(make_checkpoint: Callable[..., Any], session: Any) -> None:
    """As gpt-oss is published: experts in blocks of 32 values with a scale each."""
    sizes = FAMILIES["gpt_oss"] | {"hidden_size": 64, "intermediate_size": 64, "pad_token_id": 0}
    plain = make_checkpoint("gpt_oss", **sizes)
    folder = plain.folder
    tensors = load_file(folder / "model.safetensors")
    expanded = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        num_experts, num_in, num_out = tensors.pop(name).shape
        blocks = torch.randint(256, (num_experts, num_out, num_in // 32, 16), dtype=torch.uint8)
        scales = torch.randint(122, 126, (num_experts, num_out, num_in // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(3).int()
        values = _FP4[codes % 8] * torch.where(codes < 8, 1.0, -1.0)
        values *= 2.0 ** (scales.float() - 127).unsqueeze(-1)
        expanded[name] = values.flatten(2).mT
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = plain.config() | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config))

    decoder = load_hf_decoder(plain.source, dtype=torch.float32, device=torch.device("cpu"))
    assert "weights in mxfp4 are expanded" in decoder.notes
    plain.load_state(expanded)
    tokens = torch.tensor(_PROMPTS[0])
    found = session(decoder).feed(tokens)
    torch.testing.assert_close(found, plain.logits(tokens), rtol=1e-4, atol=1e-4)


def test_what_is_not_for_text_is_neither_loaded_nor_missed(
    make_checkpoint: Callable[..., Any],
) -> None:
    whole = make_checkpoint("gemma3", **_SEEING["gemma3"])
    file = whole.folder / "model.safetensors"
    tensors = load_file(file)
    eyes = {name for name in tensors if "vision_tower" in name or "multi_modal" in name}
    eyes_bytes = sum(tensors[name].nbytes for name in eyes)
    text_bytes = sum(one.nbytes for one in tensors.values()) - eyes_bytes

    served = load_hf_decoder(whole.source, dtype=torch.float32, device=torch.device("cpu"))
    # Angles are computed, not loaded.
    assert 0 <= served.weights_bytes - text_bytes < 1000
    told = [note for note in served.notes if "text alone" in note]
    parts = "model.vision_tower, model.multi_modal_projector"
    assert told == [f"text alone is served; not loaded: {parts} ({format_size(eyes_bytes)})"]
    assert not any("no place in this model" in note for note in served.notes)

    blind = {name: one for name, one in tensors.items() if name not in eyes}
    save_file(blind, file, metadata={"format": "pt"})
    again = load_hf_decoder(whole.source, dtype=torch.float32, device=torch.device("cpu"))
    assert again.notes == served.notes
