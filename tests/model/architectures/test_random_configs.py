"""Random configs of all families: the logits of a user of `transformers`, or a refusal.

A config is drawn over the fields that its class knows, saved with random weights, and spelled anew:
in the old way, or without the defaults. Then it is loaded as a user of that library does and
by each of our implementations, on pages and in chunks.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from model.architectures.arch import ArchError
from model.architectures.registry import FAMILIES
from model.architectures.transformer import ServedDecoder
from model.hf.decoder import load_hf_decoder
from model.ops import TorchOps
from model.weights.load import build_transformer
from model.weights.source import ModelSource

_CPU = torch.device("cpu")
#: Longer than the windows that are drawn, but for the widest.
_TEXT = torch.arange(24) * 7 % 90 + 3
_TOLERANCE = 1e-4

_KINDS = ("sliding_attention", "full_attention")
_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "swish")
_CAPS = (None, 2.0, 30.0)
#: The values drawn for a field, by its name.
_CHOICES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function"), _ACTIVATIONS),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), _CAPS),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_eps"), (1e-6, 1e-5, 1e-2)),
    "sliding_window": (None, 4, 8, 100),
    "max_window_layers": (0, 2, 4),
    "num_key_value_heads": (None, 1, 2, 4),
    "head_dim": (8, 16, 32),
    "query_pre_attn_scalar": (8, 16, 40),
    "num_experts_per_tok": (1, 2),
    "first_k_dense_replace": (0, 1),
    "decoder_sparse_step": (1, 2),
    "n_shared_experts": (1, 2),
    "clip_qkv": (None, 1.0, 8.0),
    "scoring_func": ("softmax", "sigmoid"),
    "no_rope_layers": ([1, 1, 1, 1], [1, 0, 1, 0]),
    "pad_token_id": (None, 0, 95),
}
#: Switches that are not options of a decoder, or that only select the outputs.
_FIXED = ("use_cache", "is_", "return_", "output_", "add_cross", "tie_last", "tie_encoder")
#: Numbers that are for training alone.
_TRAINING = ("drop", "initializer", "aux", "jitter", "z_loss", "std", "layerdrop", "coef")
_ROPES: tuple[dict[str, Any], ...] = (
    {},
    {"partial_rotary_factor": 0.5},
    {"rope_type": "linear", "factor": 3.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 2.0, "beta_fast": 8, "mscale": 2.0, "mscale_all_dim": 0.5},
    {"rope_type": "yarn", "factor": 8.0, "truncate": False, "attention_factor": 0.7},
)


#: Keys of some family or an old version, with their possible values; null is often not absent.
_STRANGE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attention_bias", "mlp_bias", "qkv_bias", "use_sliding_window"), (True, None)),
    **dict.fromkeys(("is_causal", "tie_word_embeddings", "is_decoder"), (True, False, None)),
    **dict.fromkeys(("embedding_multiplier", "logits_scaling", "attention_multiplier"), (2.0,)),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), (0.5, 1.0, None)),
    "sliding_window": (4, 0, None),
    "layer_types": ([*_KINDS, *_KINDS], ["full_attention"] * 4, None),
    "max_window_layers": (0, 2, None),
    "num_key_value_heads": (1, 4, None),
    "head_dim": (8, 32, 0, None),
    "hidden_act": ("silu", "swish", None),
    "rms_norm_eps": (1e-2, None),
    "rope_theta": (50.0, None),
    "original_max_position_embeddings": (8, None),
    "rope_scaling": ({}, {"type": "linear", "factor": 2.0}, {"rope_theta": 77.0}, _ROPES[4], None),
    "rope_parameters": ({}, {"rope_theta": 33.0}, {"rope_theta": None}, _ROPES[3], None),
    "max_position_embeddings": (32, None),
    "pad_token_id": (95, 200, -1, None),
    "architectures": (["Another"], None),
    "torch_dtype": ("float16", None),
    "attention_chunk_size": (4, None),
    "no_rope_layers": ([0, 1, 0, 1], None),
}


def _drawn(chance: random.Random, base: dict[str, Any]) -> dict[str, Any]:
    """Draw another value for about every third field."""
    changes: dict[str, Any] = {}
    for key, value in base.items():
        if chance.random() > 0.35:
            continue
        if key in _CHOICES:
            changes[key] = chance.choice(_CHOICES[key])
        elif key == "layer_types" and value and set(value) <= set(_KINDS):
            changes[key] = [chance.choice(_KINDS) for _ in value]
        elif key == "rope_parameters" and isinstance(value, dict) and "rope_theta" in value:
            theta = {"rope_theta": chance.choice((100.0, 10000.0)), "rope_type": "default"}
            changes[key] = theta | chance.choice(_ROPES)
        elif isinstance(value, bool) and not key.startswith(_FIXED):
            changes[key] = not value
        elif isinstance(value, float) and not any(one in key for one in _TRAINING):
            changes[key] = value * chance.choice((0.5, 2.0))
    return changes


def _spelled(chance: random.Random, config: dict[str, Any], default: dict[str, Any]) -> Any:
    """Write the same config in another form: as before transformers 5, or without the defaults."""
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope and chance.random() < 0.5:
        rope = dict(config.pop("rope_parameters"))
        config["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        kind = rope.pop("rope_type", "default")
        scaled = {chance.choice(("type", "rope_type")): kind, **rope}
        config["rope_scaling"] = None if kind == "default" else scaled
    for key in [key for key in config if key in default and key != "model_type"]:
        if config[key] == default[key] and chance.random() < 0.5:
            del config[key]
    return config


def _save(
    folder: Path, family: str, sizes: dict[str, Any], chance: random.Random, num_strange: int
) -> None:
    """Save a random model of a random config, then add keys that may be none of its family's.

    Raises the errors of that library.
    """
    default = transformers.AutoConfig.for_model(family)
    known = {*default.to_dict(), *default.attribute_map}
    sizes = {key: value for key, value in sizes.items() if key in known}
    base = transformers.AutoConfig.for_model(family, **sizes)
    changes = _drawn(chance, base.to_dict())
    config = transformers.AutoConfig.for_model(family, **{**sizes, **changes})
    torch.manual_seed(chance.randrange(1000))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, value in model.named_parameters():
        if value.dim() == 1:
            # As made, scales are ones and biases zeros: a forgotten one would not show.
            is_scale = name.endswith("weight") and "norm" in name
            torch.nn.init.uniform_(value, *((0.5, 1.5) if is_scale else (-0.3, 0.3)))
    model.save_pretrained(folder)
    path = folder / "config.json"
    defaults = json.loads(json.dumps(default.to_dict(), default=str))
    found = _spelled(chance, json.loads(path.read_text()), defaults)
    for key in chance.sample(sorted(_STRANGE), num_strange):
        found[key] = chance.choice(_STRANGE[key])
    path.write_text(json.dumps(found))


def _expected(folder: Path) -> Tensor | None:
    """Compute the logits that a user of `transformers` gets.

    None where there are none, or rounding outweighs the model: some random models are so steep
    that the last bits of their weights move the logits.
    """
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        return None
    with torch.inference_mode():
        logits: Tensor = model(_TEXT.unsqueeze(0), use_cache=False).logits[0].float()
        for one in model.parameters():
            one.mul_(1 + 1e-7 * torch.randn_like(one))
        moved: Tensor = model(_TEXT.unsqueeze(0), use_cache=False).logits[0].float()
    # Not "error > tolerance": NaN must not pass.
    return logits if _error(moved, logits) <= _TOLERANCE / 4 else None


def _error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, as a share of the largest logit where that is above one."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def _ours(source: ModelSource) -> ServedDecoder:
    return build_transformer(
        source,
        quantization="none",
        dtype=torch.float32,
        device=_CPU,
        ops=TorchOps(),
        progress=False,
    )


def _theirs(source: ModelSource) -> ServedDecoder:
    return load_hf_decoder(source, dtype=torch.float32, device=_CPU)


@dataclass
class Tally:
    """The outcomes of a family's configs."""

    #: By implementation.
    served: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    #: The largest.
    error: float = 0.0
    #: Draws that `transformers` itself cannot load or run, or whose logits are not settled.
    void: int = 0


def _try_family(
    family: str,
    count: int,
    sizes: dict[str, Any],
    tmp_path: Path,
    session: Any,
    num_strange: int = 0,
) -> Tally:
    """Compare `count` random configs of a family that `transformers` can load."""
    tally, chance = Tally(), random.Random(family)
    implementations = {"transformers": _theirs, **({"octavo": _ours} if family in FAMILIES else {})}
    for draw in range(5 * count):
        if tally.served["transformers"] + tally.refused["transformers"] == count:
            break
        folder = tmp_path / f"{family}-{draw}"
        try:
            _save(folder, family, sizes, chance, num_strange)
            expected = _expected(folder)
        # Hundreds of authors' code: a config that it cannot work with may raise any error.
        except Exception:  # noqa: BLE001 - see above
            expected = None
        if expected is None:
            tally.void += 1
            continue
        for name, load in implementations.items():
            try:
                decoder = load(ModelSource("safetensors", folder, family))
            except ValueError as reason:
                tally.refused[name] += 1
                tally.reasons[str(reason).partition("; served are")[0]] += 1
                continue
            tally.served[name] += 1
            one = session(decoder)
            found = torch.cat([one.feed(_TEXT[:11]), one.feed(_TEXT[11:])])
            error = _error(found, expected)
            tally.error = max(tally.error, error)
            assert error <= _TOLERANCE, (name, error, (folder / "config.json").read_text())
    return tally


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are not worth waiting for other threads."""
    before, log = torch.get_num_threads(), transformers.logging
    level = log.get_verbosity()
    torch.set_num_threads(1)
    log.set_verbosity_error()
    yield
    log.set_verbosity(level)
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("family", "count"),
    [*((family, 6) for family in FAMILIES), ("phi3", 2), ("mixtral", 2)],
)
@pytest.mark.filterwarnings("ignore")  # Of that library, about the configs that are drawn.
def test_random_configs_are_read_as_transformers_reads_them(
    family: str, count: int, family_sizes: Callable[[str], Any], tmp_path: Path, session: Any
) -> None:
    num_strange = 1 if family in FAMILIES else 0
    tally = _try_family(family, count, family_sizes(family), tmp_path, session, num_strange)
    assert tally.served["transformers"], tally
    if family in FAMILIES:
        assert tally.served["octavo"], tally


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # As above.
def test_random_configs_of_all_families(
    family_sizes: Callable[[str], Any], tmp_path: Path, session: Any
) -> None:
    tallies: dict[str, Tally] = {}
    failures = []
    path = tmp_path / "config.json"
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        path.write_text(json.dumps({"model_type": family, **family_sizes(family)}))
        try:
            _theirs(ModelSource("dummy", path, family))
        except ArchError:
            continue
        try:
            tallies[family] = _try_family(family, 16, family_sizes(family), tmp_path, session)
        except AssertionError as failure:
            failures.append(f"{family}: {failure}")
        else:
            print(family, tallies[family])  # noqa: T201 - the result of the run
    assert not failures, "\n".join(failures)
    served = sum(tally.served["transformers"] for tally in tallies.values())
    refused = sum(tally.refused["transformers"] for tally in tallies.values())
    ours = sum(tally.served["octavo"] for tally in tallies.values())
    print(f"{len(tallies)} families: {served} served, {refused} refused; {ours} by our own code")  # noqa: T201 - likewise
    assert len(tallies) >= 80
    assert served >= 0.8 * (served + refused)
    assert ours >= 0.4 * 16 * len(FAMILIES)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # As above.
@pytest.mark.parametrize("num_strange", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_random_keys_are_read_as_transformers_reads_them(
    family: str,
    num_strange: int,
    family_sizes: Callable[[str], Any],
    tmp_path: Path,
    session: Any,
) -> None:
    tally = _try_family(family, 32, family_sizes(family), tmp_path, session, num_strange)
    print(family, tally)  # noqa: T201 - the result of the run
    # Each such key is likely to be one that we refuse.
    assert tally.served["octavo"] >= 4, tally
