"""One folder, read twice: for any files in it, our logits are those of a user of `transformers`.

Each case is a folder that can be read in two ways. Either implementation gives the logits that
`AutoModelForCausalLM.from_pretrained` of the folder gives, or refuses; one of them serves it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("one_thread")

_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
_YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0}
_DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 500.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
#: The key is to go.
_ABSENT = "ABSENT"

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral with windows in some layers": (
        "mistral",
        {"sliding_window": 4, "layer_types": _WINDOWS},
    ),
    "mistral with windows and types that are null": (
        "mistral",
        {"sliding_window": 4, "layer_types": None},
    ),
    "mistral with full attention and a window": (
        "mistral",
        {"sliding_window": 4, "layer_types": ["full_attention"] * 3},
    ),
    "mistral with a window": ("mistral", {"sliding_window": 4}),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "mistral with a bias that is none": ("mistral", {"attention_bias": True, "mlp_bias": True}),
    "llama with a window that is none": (
        "llama",
        {"sliding_window": 4, "use_sliding_window": True, "layer_types": _WINDOWS},
    ),
    "qwen2 with a window not in use": ("qwen2", {"sliding_window": 4, "max_window_layers": 0}),
    "qwen2 with a window from a layer on": (
        "qwen2",
        {
            "sliding_window": 4,
            "use_sliding_window": True,
            "max_window_layers": 2,
            "layer_types": _ABSENT,
        },
    ),
    "qwen3 with types against its window layers": (
        "qwen3",
        {
            "sliding_window": 4,
            "use_sliding_window": True,
            "max_window_layers": 0,
            "layer_types": _WINDOWS,
        },
    ),
    "part of a head": ("llama", {"partial_rotary_factor": 0.5}),
    "part of a head, in the object": (
        "qwen2",
        {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    ),
    "rope spelled the old way": (
        "llama",
        {"rope_parameters": _ABSENT, "rope_theta": 77.0, "rope_scaling": None},
    ),
    "rope scaled the old way": (
        "mistral",
        {
            "rope_parameters": _ABSENT,
            "rope_theta": 77.0,
            "rope_scaling": {"type": "linear", "factor": 3.0},
        },
    ),
    "rope spelled both ways": (
        "llama",
        {
            "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
            "rope_scaling": {"rope_type": "linear", "factor": 3.0},
        },
    ),
    "rope's type named twice": (
        "llama",
        {"rope_parameters": {**_LLAMA3, "type": "linear"}},
    ),
    "theta twice": ("llama", {"rope_theta": 77.0, "rope_parameters": {"rope_theta": 500.0}}),
    "theta outside": ("llama", {"rope_theta": 77.0, "rope_parameters": {"rope_type": "default"}}),
    "yarn": ("llama", {"rope_parameters": _YARN}),
    "yarn with its length outside": (
        "llama",
        {
            "rope_parameters": {**_YARN, "original_max_position_embeddings": 8},
            "original_max_position_embeddings": 32,
        },
    ),
    "yarn with zeros": ("qwen3", {"rope_parameters": {**_YARN, "beta_fast": 0, "beta_slow": 0}}),
    "yarn with nulls": (
        "qwen2",
        {"rope_parameters": {**_YARN, "truncate": None, "mscale": None, "attention_factor": None}},
    ),
    "yarn with an mscale": (
        "llama",
        {"rope_parameters": {**_YARN, "mscale": 2.0, "mscale_all_dim": 0.5, "truncate": False}},
    ),
    "dynamic": ("llama", {"rope_parameters": _DYNAMIC}),
    "dynamic the old way, with another length": (
        "mistral",
        {
            "rope_parameters": _ABSENT,
            "rope_theta": 77.0,
            "rope_scaling": {"type": "dynamic", "factor": 3.0},
            "original_max_position_embeddings": 16,
        },
    ),
    "llama3": ("llama", {"rope_parameters": _LLAMA3}),
    "llama3 with its length outside": (
        "llama",
        {"rope_parameters": _LLAMA3, "original_max_position_embeddings": 64},
    ),
    "another class named": ("llama", {"architectures": ["MistralForCausalLM"]}),
    "another activation": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "the same activation by its other name": ("qwen2", {"hidden_act": "swish"}),
    "a config inside": ("llama", {"text_config": {"rms_norm_eps": 0.5}}),
    "a config by layer": ("llama", {"per_layer_config": {"1": {"rms_norm_eps": 0.5}}}),
    "a config by version": ("llama", {"configuration_files": ["config.4.0.0.json"]}),
    "multipliers that are another family's": (
        "llama",
        {"embedding_multiplier": 2.0, "logits_scaling": 3.0, "attention_multiplier": 0.5},
    ),
    "attention to what comes after": ("llama", {"is_causal": False}),
    "attention to what comes after, by a null": ("mistral", {"is_causal": None}),
    "attention to what came before, said": ("qwen2", {"is_causal": True}),
    "another epsilon": ("llama", {"rms_norm_eps": 0.5}),
    "no epsilon": ("qwen3", {"rms_norm_eps": _ABSENT}),
    "whatever type the weights have": ("llama", {"dtype": _ABSENT, "torch_dtype": "auto"}),
    "numbers that JSON does not have": (
        "llama",
        {"initializer_range": math.nan, "router_aux_loss": math.inf, "other": -math.inf},
    ),
    "another type of numbers": ("llama", {"dtype": "bfloat16", "torch_dtype": "float16"}),
}


_SERVED_BY_NOBODY = {
    "attention to what comes after",
    "attention to what comes after, by a null",
    # transformers cannot build these either.
    "a config inside",
    "a config by layer",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_read_as_transformers_reads_it(
    name: str, folder_of: Callable[..., Any], served_by: Any
) -> None:
    family, changes = CONFIGS[name]
    folder = folder_of(family)
    (folder.path / "config.4.0.0.json").write_text(
        json.dumps(json.loads((folder.path / "config.json").read_text()) | {"rms_norm_eps": 0.5})
    )
    folder.configure(changes)
    served = served_by(folder)
    assert ("auto" in served) == (name not in _SERVED_BY_NOBODY)


def test_most_configs_are_served_by_both(folder_of: Callable[..., Any], served_by: Any) -> None:
    """The above is not passed by refusing."""
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        folder = folder_of(family)
        assert set(served_by(folder)) == {"octavo", "transformers", "auto"}


def test_another_class_than_the_named_one_is_told(
    folder_of: Callable[..., Any], build_by: Any
) -> None:
    folder = folder_of("llama")
    folder.configure({"architectures": ["MistralForCausalLM"]})
    for implementation in ("octavo", "transformers"):
        notes = build_by(folder, implementation).notes
        assert any("read as LlamaForCausalLM" in note and "Mistral" in note for note in notes)
