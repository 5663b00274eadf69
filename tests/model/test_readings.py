"""One folder, read twice: whatever lies in it, our logits are those of a user of `transformers`.

Each case is a folder that can be read in two ways. Either implementation gives the logits that
`AutoModelForCausalLM.from_pretrained` of the folder gives, or refuses; one of them serves it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.schema import ModelSection
from model.implementation import build_decoder
from model.ops import TorchOps
from model.source import ModelSource
from model.transformer import ServedDecoder

#: Longer than any window here.
_TEXT = torch.arange(24) * 7 % 90 + 3
_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
_YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_ABSENT = object()
_NO_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are not worth waiting for other threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Folder:
    """A checkpoint whose files a case may change."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def configure(self, changes: dict[str, Any]) -> None:
        config = json.loads((self.path / "config.json").read_text()) | changes
        config = {key: value for key, value in config.items() if value is not _ABSENT}
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
        """What a user of `transformers` gets; an error where weights would be made up."""
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


# ---- configs -------------------------------------------------------------------------------------

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
    "another type of numbers": ("llama", {"dtype": "bfloat16", "torch_dtype": "float16"}),
}


_SERVED_BY_NOBODY = {
    "attention to what comes after",
    "attention to what comes after, by a null",
    # transformers cannot build these either.
    "a config inside",
    "a config by layer",
}


def _served(
    folder: Folder, build_by: Callable[..., ServedDecoder], session: Any
) -> dict[str, ServedDecoder]:
    """Compare each implementation with `transformers`; return those that serve."""
    try:
        expected = folder.expected()
    # What that library raises for a folder that it cannot load may be anything.
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


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_read_as_transformers_reads_it(
    name: str, make_checkpoint: Callable[..., Any], build_by: Any, session: Any
) -> None:
    family, changes = CONFIGS[name]
    folder = Folder(make_checkpoint(family, **_NO_IDS).folder)
    (folder.path / "config.4.0.0.json").write_text(
        json.dumps(json.loads((folder.path / "config.json").read_text()) | {"rms_norm_eps": 0.5})
    )
    folder.configure(changes)
    served = _served(folder, build_by, session)
    assert ("auto" in served) == (name not in _SERVED_BY_NOBODY)


def test_most_configs_are_served_by_both(
    make_checkpoint: Callable[..., Any], build_by: Any, session: Any
) -> None:
    """The above is not passed by refusing."""
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        folder = Folder(make_checkpoint(family, **_NO_IDS).folder)
        assert set(_served(folder, build_by, session)) == {"octavo", "transformers", "auto"}


def test_another_class_than_the_named_one_is_told(
    make_checkpoint: Callable[..., Any], build_by: Any
) -> None:
    folder = Folder(make_checkpoint("llama").folder)
    folder.configure({"architectures": ["MistralForCausalLM"]})
    for implementation in ("octavo", "transformers"):
        notes = build_by(folder, implementation).notes
        assert any("read as LlamaForCausalLM" in note and "Mistral" in note for note in notes)


# ---- files ---------------------------------------------------------------------------------------

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_UP, _NORM = "model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"


def _others(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: one.flip(0) for name, one in tensors.items()}


def _head_of_its_own(folder: Folder) -> None:
    tensors = folder.tensors()
    folder.save(tensors | {_HEAD: tensors[_EMBEDDING].flip(0)})


def _head_repeated(folder: Folder) -> None:
    tensors = folder.tensors()
    folder.save(tensors | {_HEAD: tensors[_EMBEDDING]})


def _head_alone(folder: Folder) -> None:
    tensors = folder.tensors()
    folder.save(tensors | {_HEAD: tensors.pop(_EMBEDDING)})


def _without_prefix(folder: Folder) -> None:
    folder.save({name.removeprefix("model."): one for name, one in folder.tensors().items()})


def _stale_index(folder: Folder) -> None:
    tensors = folder.tensors()
    folder.save(_others(tensors), "part-0.safetensors")
    folder.write_index(dict.fromkeys(tensors, "part-0.safetensors"))


def _index_of_nothing(folder: Folder) -> None:
    folder.write_index(dict.fromkeys(folder.tensors(), "gone.safetensors"))


def _two_files(folder: Folder) -> None:
    folder.save(_others(folder.tensors()), "another.safetensors")


def _in_two_shards(folder: Folder) -> None:
    tensors = folder.tensors()
    folder.split(_others(tensors), tensors)
    folder.write_index(dict.fromkeys(tensors, "part-0.safetensors") | {_UP: "part-1.safetensors"})


def _not_in_the_index(folder: Folder) -> None:
    tensors = folder.tensors()
    folder.split({_UP: tensors.pop(_UP)}, tensors)
    folder.write_index({_EMBEDDING: "part-1.safetensors", _NORM: "part-0.safetensors"})


def _named_in_the_config(folder: Folder) -> None:
    folder.save(_others(folder.tensors()), "another.safetensors")
    folder.configure({"transformers_weights": "another.safetensors"})


def _beside_a_pickle(folder: Folder) -> None:
    torch.save(_others(folder.tensors()), folder.path / "pytorch_model.bin")


def _by_no_name(folder: Folder) -> None:
    (folder.path / "model.safetensors").rename(folder.path / "weights.safetensors")


def _of_many_types(folder: Folder) -> None:
    types = (torch.float16, torch.bfloat16, torch.float64, torch.float32)
    tensors = folder.tensors().items()
    folder.save({name: one.to(types[i % 4]) for i, (name, one) in enumerate(tensors)})


def _with_a_bias(folder: Folder) -> None:
    folder.save(folder.tensors() | {"model.layers.0.self_attn.q_proj.bias": torch.ones(48)})


def _with_buffers(folder: Folder) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder.save(folder.tensors() | {name: torch.ones(4)})


def _with_more_layers(folder: Folder) -> None:
    folder.save(folder.tensors() | {"model.layers.3.mlp.up_proj.weight": torch.ones(80, 48)})


def _without_a_tensor(folder: Folder) -> None:
    folder.save({name: one for name, one in folder.tensors().items() if name != _UP})


def _of_another_shape(folder: Folder) -> None:
    tensors = folder.tensors()
    folder.save(tensors | {_UP: tensors[_UP].T})


def _of_integers(folder: Folder) -> None:
    tensors = folder.tensors()
    folder.save(tensors | {_NORM: torch.ones(48, dtype=torch.int8)})


def _not_finite(folder: Folder) -> None:
    tensors = folder.tensors()
    tensors[_EMBEDDING][95, 3] = torch.nan
    tensors[_EMBEDDING][94, 3] = torch.inf
    folder.save(tensors)


_ALL = {"octavo", "transformers", "auto"}
_THEIRS = {"transformers", "auto"}
#: What is done to the files, whether the config ties the head, who serves it, what a note says.
FILES: tuple[tuple[Callable[[Folder], None], bool, set[str], str], ...] = (
    (_head_of_its_own, True, _ALL, "lm_head.weight"),
    (_head_repeated, True, _ALL, ""),
    (_head_alone, True, _THEIRS, "embed_tokens.weight in"),
    (_without_prefix, True, _THEIRS, "embed_tokens.weight in"),
    (_stale_index, False, _ALL, "model.safetensors is read, and model.safetensors.index.json is"),
    (_index_of_nothing, False, _ALL, "model.safetensors is read, and model.safetensors.index.json"),
    (_two_files, False, _ALL, "another.safetensors is not read"),
    (_in_two_shards, False, _ALL, "part-0.safetensors is also in"),
    (_not_in_the_index, False, _ALL, ""),
    (_named_in_the_config, False, _THEIRS, "transformers_weights"),
    (_beside_a_pickle, False, _ALL, "pytorch_model.bin is not read"),
    (_by_no_name, False, {"octavo", "auto"}, "all files of safetensors are read"),
    (_of_many_types, False, _ALL, ""),
    (_with_a_bias, False, _ALL, "q_proj.bias"),
    (_with_buffers, False, _ALL, ""),
    (_with_more_layers, False, _ALL, "layers.3.mlp.up_proj.weight"),
    (_without_a_tensor, False, set(), ""),
    (_of_another_shape, False, set(), ""),
    (_of_integers, False, _THEIRS, "is of type I8"),
    (_not_finite, False, _ALL, "not finite: model.embed_tokens.weight"),
)


@pytest.mark.parametrize(
    ("change", "is_tied", "who", "note"), FILES, ids=[case[0].__name__.strip("_") for case in FILES]
)
def test_files_are_read_as_transformers_reads_them(
    change: Callable[[Folder], None],
    is_tied: bool,
    who: set[str],
    note: str,
    make_checkpoint: Callable[..., Any],
    build_by: Any,
    session: Any,
) -> None:
    folder = Folder(make_checkpoint("llama", tie_word_embeddings=is_tied, **_NO_IDS).folder)
    change(folder)
    served = _served(folder, build_by, session)
    assert set(served) == who
    if not who:
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight"):
            build_by(folder, "auto")
    # By itself, that library has no reason to give for not being our code.
    for implementation in ("auto", "transformers") if who == _ALL else who & {"auto"}:
        notes = served[implementation].notes
        assert any(note in one for one in notes), notes


def test_weights_that_can_only_be_read_in_one_way_are_not_noted(
    make_checkpoint: Callable[..., Any], build_by: Any
) -> None:
    folder = Folder(make_checkpoint("llama").folder)
    assert build_by(folder, "octavo").notes == ("quantization none as asked",)
