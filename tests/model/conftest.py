from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.schema import ModelSection
from model.architectures.transformer import ServedDecoder, Transformer
from model.attention import torch_sdpa
from model.attention.groups import build_parts
from model.attention.interface import AttentionBatch
from model.attention.reference import ReferenceAttention
from model.cpu.library import CpuLibrary
from model.cuda.graphs import DecodeGraphs, GraphPlan, GraphSize
from model.implementation import build_decoder
from model.kv.format import float_format
from model.kv.pool import KVPool
from model.ops import Ops, TorchOps
from model.runner import TorchRunner
from model.weights.load import build_transformer
from model.weights.source import ModelSource

CPU = torch.device("cpu")

if not torch.cuda.is_available():
    # Our own kernels are interpreted. Read when they are first imported, which is by a test.
    os.environ["TRITON_INTERPRET"] = "1"

#: Small, and no two sizes alike, so that a swapped pair shows.
TINY = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Far from the default, so that attention and the gates have an effect.
    "initializer_range": 0.2,
}


#: Under all the names that sizes have; a family takes no notice of the others'.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "dff"), 80),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 96),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 16),
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "qk_rope_head_dim": 8,
    "hidden_size_per_layer_input": 16,
    "sliding_window": 8,
    "is_decoder": True,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {"num_key_value_heads": 4, "head_dim": 8}
_NARROW = {"head_dim": 16}
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
_IN_THREE = {"rope_parameters": {**_ROTARY, "mrope_section": [2, 3, 3]}}
_CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash"), _LATENT
    ),
    **dict.fromkeys(("minicpm3", "youtu", "kimi_k25"), _LATENT),
    **dict.fromkeys(("helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), _NARROW),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker"), _IN_THREE),
    **dict.fromkeys(("glm4v", "glm46v", "glmga", "glm_ocr"), _IN_THREE),
    "glm4v_moe": {"rope_parameters": {**_ROTARY, "mrope_section": [1, 1, 2]}},
    "gemma3n_text": {"num_kv_shared_layers": 1},
    "paligemma": {"sliding_window": None},
    "granitemoehybrid": {"layer_types": ["attention"] * 4, "mamba_n_heads": 8},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "blt": {"encoder_hash_byte_group_vocab": 96},
}


@pytest.fixture(scope="session")
def family_sizes() -> Callable[[str], dict[str, Any]]:
    """Small sizes under which a family of `transformers` can be had."""
    import transformers  # noqa: PLC0415 - takes seconds, and only some tests want it

    def sizes_of(family: str) -> dict[str, Any]:
        sizes = {**_SIZES, **_CHANGES.get(family, {})}
        parts = transformers.CONFIG_MAPPING[family].sub_configs
        return {"text_config": sizes} if "text_config" in parts else sizes

    return sizes_of


class Checkpoint:
    """A random model of `transformers`, and the folder it was saved to."""

    def __init__(self, folder: Path, model: Any) -> None:
        self.folder = folder
        self.source = ModelSource("safetensors", folder, folder.name)
        self._model = model

    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return found

    def state(self) -> dict[str, Tensor]:
        return {name: one.detach().clone() for name, one in self._model.state_dict().items()}

    def load_state(self, changed: dict[str, Tensor]) -> None:
        """Change some of the model's tensors, but not its folder."""
        self._model.load_state_dict(changed, strict=False)

    def logits(self, token_ids: Tensor) -> Tensor:
        with torch.inference_mode():
            found: Tensor = self._model(token_ids.unsqueeze(0)).logits[0]
        return found

    def generate(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Return the tokens that `transformers` generates greedily."""
        whole = self._model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=num_tokens
        )
        found: list[int] = whole[0, len(prompt) :].tolist()
        return found


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Checkpoint]:
    def make(family: str, *, shard_size: str = "1GB", **changes: Any) -> Checkpoint:
        # Takes seconds, and only some tests want it.
        import transformers  # noqa: PLC0415 - see above

        if "text_config" in changes:
            changes["text_config"] = {**TINY, **changes["text_config"]}
            auto_class, sizes = transformers.AutoModelForMultimodalLM, changes
        else:
            auto_class, sizes = transformers.AutoModelForCausalLM, {**TINY, **changes}
        config = transformers.AutoConfig.for_model(family, **sizes)
        config._attn_implementation = "eager"
        torch.manual_seed(1)
        model = auto_class.from_config(config).eval()
        for name, value in model.named_parameters():
            # As made, norms are all ones and biases all zeros: forgotten ones would not show.
            if value.dim() == 1:
                is_scale = name.endswith("weight") and ("norm" in name or ".ln_" in name)
                # Biases add up from layer to layer: large ones would hide the tokens.
                low, high = (0.5, 1.5) if is_scale else (-0.3, 0.3)
                torch.nn.init.uniform_(value, low, high)
        for name, value in model.named_buffers():
            # As made, zeros, by which no expert is chosen.
            if name.endswith("e_score_correction_bias"):
                torch.nn.init.uniform_(value, -0.3, 0.3)
        folder = tmp_path / family
        model.save_pretrained(folder, max_shard_size=shard_size)
        return Checkpoint(folder, model)

    return make


@pytest.fixture
def build() -> Callable[..., Transformer]:
    def build_on_cpu(
        source: ModelSource,
        quantization: str = "none",
        ops: Ops | None = None,
        tiles: CpuLibrary | None = None,
    ) -> Transformer:
        return build_transformer(
            source,
            quantization=quantization,
            dtype=torch.float32,
            device=CPU,
            ops=ops or TorchOps(),
            progress=False,
            tiles=tiles,
        )

    return build_on_cpu


class Session:
    """One sequence on a transformer: pages, positions and attention looked after."""

    def __init__(self, transformer: ServedDecoder, num_pages: int = 16, page_size: int = 4) -> None:
        self._transformer = transformer
        spec = transformer.attention_spec(float_format(transformer.attention_dtype))
        pool = KVPool(spec.layout(page_size), num_pages, CPU)
        self._attention = ReferenceAttention(spec, pool)
        self._table = torch.arange(num_pages, dtype=torch.int32).unsqueeze(0)
        self._length = 0

    def feed(self, token_ids: Tensor) -> Tensor:
        """Compute the tokens that come next; returns the logits of each."""
        count, start = len(token_ids), self._length
        self._length += count
        positions = torch.arange(start, self._length)
        batch = AttentionBatch(
            query_starts=torch.tensor([0, count], dtype=torch.int32),
            seq_lens=torch.tensor([self._length], dtype=torch.int32),
            block_table=self._table,
            positions=positions,
            # The table is the identity, so a slot is a position.
            kv_slots=positions.clone(),
            max_query_len=count,
            max_seq_len=self._length,
        )
        with torch.inference_mode():
            self._attention.plan(batch)
            hidden = self._transformer.forward(token_ids, positions, self._attention)
            return self._transformer.logits(hidden)


def _overlapped(runner: TorchRunner, max_num_seqs: int) -> TorchRunner:
    """Return a runner with two steps in flight, and decodes padded and replayed, as on CUDA."""
    info, layout = runner.info, runner._pool.layout
    scratch_pages = [info.num_pages, *([info.windowed.num_pages] if info.windowed else [])]
    decoder = runner._decoder
    assert isinstance(decoder, Transformer)
    spec, page_size = decoder.attention_spec(layout.format), layout.page_size
    num_windowed = info.windowed.num_pages + 1 if info.windowed else None
    attention, pool, windowed_pool = build_parts(
        torch_sdpa.offer(spec), spec, page_size, info.num_pages + 1, num_windowed, CPU
    )
    decodes = (1, 3, 4, 32)[: 3 + (max_num_seqs > 6)]
    # Some steps with drafts and ends of prompts have more tokens or rows.
    sizes = sorted((*((rows, rows) for rows in decodes), (5, 1), (9, 3), (16, 4)))
    plan = GraphPlan(
        tuple(GraphSize(*size) for size in sizes),
        info.max_model_len,
        layout.page_size,
        scratch_pages=tuple(scratch_pages),
    )
    return TorchRunner(
        info=info,
        decoder=decoder,
        attention=attention,
        pool=pool,
        windowed_pool=windowed_pool,
        sampler=runner._sampler,
        max_num_seqs=max_num_seqs,
        graphs=DecodeGraphs(decoder, attention, plan, CPU, lambda compute: compute),
        max_steps_in_flight=2,
        viewed=decoder,
    )


@pytest.fixture(scope="session")
def overlapped() -> Callable[[TorchRunner, int], TorchRunner]:
    return _overlapped


@pytest.fixture
def session() -> type[Session]:
    """For tests to make: nothing under tests/ can be imported."""
    return Session


# ---- one folder, read twice ----------------------------------------------------------------------

#: Longer than any window here.
_TEXT = torch.arange(24) * 7 % 90 + 3


#: In a change of a config: the key is to go.
ABSENT = "ABSENT"


class Folder:
    """A checkpoint whose files a case may change."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def configure(self, changes: dict[str, Any]) -> None:
        config = json.loads((self.path / "config.json").read_text()) | changes
        config = {key: value for key, value in config.items() if value != ABSENT}
        (self.path / "config.json").write_text(json.dumps(config))

    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.path / "model.safetensors")

    def save(self, tensors: dict[str, Tensor], name: str = "model.safetensors") -> None:
        whole = {key: one.contiguous().clone() for key, one in tensors.items()}
        save_file(whole, self.path / name, metadata={"format": "pt"})

    def split(self, *shards: dict[str, Tensor]) -> None:
        (self.path / "model.safetensors").unlink()
        placed: dict[str, str] = {}
        for index, tensors in enumerate(shards):
            self.save(tensors, f"part-{index}.safetensors")
            placed |= dict.fromkeys(tensors, f"part-{index}.safetensors")
        self.write_index(placed)

    def write_index(self, placed: dict[str, str]) -> None:
        index = {"metadata": {"total_size": 0}, "weight_map": placed}
        (self.path / "model.safetensors.index.json").write_text(json.dumps(index))

    def expected(self) -> Tensor:
        """Return the logits by `transformers`; raise where it would make up weights."""
        import transformers  # noqa: PLC0415 - takes seconds, and only some tests want it

        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            self.path,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
        )
        if info["missing_keys"]:
            raise KeyError(info["missing_keys"])
        with torch.inference_mode():
            logits: Tensor = model(_TEXT.unsqueeze(0)).logits[0]
        return logits


@pytest.fixture
def build_by() -> Callable[..., ServedDecoder]:
    def build(folder: Folder, implementation: Any) -> ServedDecoder:
        return build_decoder(
            ModelSource("safetensors", folder.path, "m"),
            ModelSection(quantization="none", model_impl=implementation, threads=1),
            dtype=torch.float32,
            device=torch.device("cpu"),
            ops=TorchOps(),
            tiles=None,
        )

    return build


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models this small are not worth waiting for other threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder_of(make_checkpoint: Callable[..., Checkpoint]) -> Callable[..., Folder]:
    """Make a folder of a random model whose files a test may change."""
    no_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return lambda family, **changes: Folder(make_checkpoint(family, **no_ids, **changes).folder)


@pytest.fixture
def served_by(
    build_by: Callable[..., ServedDecoder], session: type[Session]
) -> Callable[[Folder], dict[str, ServedDecoder]]:
    """Compare each implementation with `transformers`; return the ones that serve."""

    def serve(folder: Folder) -> dict[str, ServedDecoder]:
        try:
            expected = folder.expected()
        # That library raises any exception for a folder that it cannot load.
        except Exception:  # noqa: BLE001 - see above
            expected = None
        served = {}
        for implementation in ("octavo", "transformers", "auto"):
            try:
                decoder = build_by(folder, implementation)
            except ValueError:
                continue
            served[implementation] = decoder
            if expected is None:
                continue
            one = session(decoder)
            found = torch.cat([one.feed(_TEXT[:11]), one.feed(_TEXT[11:])])
            torch.testing.assert_close(
                found, expected, rtol=1e-4, atol=1e-4, equal_nan=True, msg=f"by {implementation}"
            )
        return served

    return serve
