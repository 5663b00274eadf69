"""Weights that can be read in two ways: our logits are those of a user of `transformers`.

See `test_readings.py`, which is about configs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_UP, _NORM = "model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"


def _others(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: one.flip(0) for name, one in tensors.items()}


def _head_of_its_own(folder: Any) -> None:
    tensors = folder.tensors()
    folder.save(tensors | {_HEAD: tensors[_EMBEDDING].flip(0)})


def _head_repeated(folder: Any) -> None:
    tensors = folder.tensors()
    folder.save(tensors | {_HEAD: tensors[_EMBEDDING]})


def _head_alone(folder: Any) -> None:
    tensors = folder.tensors()
    folder.save(tensors | {_HEAD: tensors.pop(_EMBEDDING)})


def _without_prefix(folder: Any) -> None:
    folder.save({name.removeprefix("model."): one for name, one in folder.tensors().items()})


def _stale_index(folder: Any) -> None:
    tensors = folder.tensors()
    folder.save(_others(tensors), "part-0.safetensors")
    folder.write_index(dict.fromkeys(tensors, "part-0.safetensors"))


def _index_of_nothing(folder: Any) -> None:
    folder.write_index(dict.fromkeys(folder.tensors(), "gone.safetensors"))


def _two_files(folder: Any) -> None:
    folder.save(_others(folder.tensors()), "another.safetensors")


def _in_two_shards(folder: Any) -> None:
    tensors = folder.tensors()
    folder.split(_others(tensors), tensors)
    folder.write_index(dict.fromkeys(tensors, "part-0.safetensors") | {_UP: "part-1.safetensors"})


def _not_in_the_index(folder: Any) -> None:
    tensors = folder.tensors()
    folder.split({_UP: tensors.pop(_UP)}, tensors)
    folder.write_index({_EMBEDDING: "part-1.safetensors", _NORM: "part-0.safetensors"})


def _named_in_the_config(folder: Any) -> None:
    folder.save(_others(folder.tensors()), "another.safetensors")
    folder.configure({"transformers_weights": "another.safetensors"})


def _beside_a_pickle(folder: Any) -> None:
    torch.save(_others(folder.tensors()), folder.path / "pytorch_model.bin")


def _by_no_name(folder: Any) -> None:
    (folder.path / "model.safetensors").rename(folder.path / "weights.safetensors")


def _of_many_types(folder: Any) -> None:
    types = (torch.float16, torch.bfloat16, torch.float64, torch.float32)
    tensors = folder.tensors().items()
    folder.save({name: one.to(types[i % 4]) for i, (name, one) in enumerate(tensors)})


def _with_a_bias(folder: Any) -> None:
    folder.save(folder.tensors() | {"model.layers.0.self_attn.q_proj.bias": torch.ones(48)})


def _with_buffers(folder: Any) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder.save(folder.tensors() | {name: torch.ones(4)})


#: The file that macOS writes beside each file that it copies to a disk of another system.
_FORK = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(64)


def _with_a_fork(folder: Any) -> None:
    (folder.path / "._model.safetensors").write_bytes(_FORK)


def _shards_with_forks(folder: Any) -> None:
    tensors = folder.tensors()
    folder.split({_UP: tensors.pop(_UP)}, tensors)
    for name in ("._part-0.safetensors", "._part-1.safetensors", "._config.json"):
        (folder.path / name).write_bytes(_FORK)


def _by_no_name_with_a_fork(folder: Any) -> None:
    _by_no_name(folder)
    (folder.path / "._weights.safetensors").write_bytes(_FORK)


def _in_another_format_too(folder: Any) -> None:
    tensors = folder.tensors()
    folder.save({"layers.0.attention.wq.weight": torch.ones(48, 48)}, "consolidated.safetensors")
    folder.split({_UP: tensors.pop(_UP)}, tensors)


def _with_an_adapter(folder: Any) -> None:
    folder.save({"base_model.model.lora_A.weight": torch.ones(2, 48)}, "adapter_model.safetensors")


def _without_index_with_others(folder: Any) -> None:
    _by_no_name(folder)
    _with_an_adapter(folder)
    folder.save({_EMBEDDING: torch.zeros(96, 48)}, "consolidated.00.safetensors")


def _with_a_value_head(folder: Any) -> None:
    head = {"v_head.summary.weight": torch.ones(1, 48), "v_head.summary.bias": torch.ones(1)}
    folder.save(folder.tensors() | head)


def _with_scales_of_keys(folder: Any) -> None:
    names = (f"model.layers.0.self_attn.{one}_scale" for one in "kv")
    folder.save(folder.tensors() | {name: torch.tensor(0.5) for name in names})


def _with_more_layers(folder: Any) -> None:
    folder.save(folder.tensors() | {"model.layers.3.mlp.up_proj.weight": torch.ones(80, 48)})


def _without_a_tensor(folder: Any) -> None:
    folder.save({name: one for name, one in folder.tensors().items() if name != _UP})


def _of_another_shape(folder: Any) -> None:
    tensors = folder.tensors()
    folder.save(tensors | {_UP: tensors[_UP].T})


def _of_integers(folder: Any) -> None:
    tensors = folder.tensors()
    folder.save(tensors | {_NORM: torch.ones(48, dtype=torch.int8)})


def _not_finite(folder: Any) -> None:
    tensors = folder.tensors()
    tensors[_EMBEDDING][95, 3] = torch.nan
    tensors[_EMBEDDING][94, 3] = torch.inf
    folder.save(tensors)


_ALL = {"octavo", "transformers", "auto"}
_THEIRS = {"transformers", "auto"}
#: The change to the files, whether the config ties the head, the implementations, part of a note.
FILES: tuple[tuple[Callable[[Any], None], bool, set[str], str], ...] = (
    (_head_of_its_own, True, _ALL, "lm_head.weight"),
    (_head_repeated, True, _ALL, ""),
    (_head_alone, True, _ALL, ""),
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
    (_with_a_fork, False, _ALL, "._model.safetensors is not read"),
    (_shards_with_forks, False, _ALL, "._part-1.safetensors is not read"),
    (_by_no_name_with_a_fork, False, {"octavo", "auto"}, "._weights.safetensors is not read"),
    (_in_another_format_too, False, _ALL, "consolidated.safetensors is not read"),
    (_with_an_adapter, False, _ALL, "adapter_model.safetensors is not read"),
    (_without_index_with_others, False, {"octavo", "auto"}, "adapter_model.safetensors is not"),
    (_with_a_value_head, False, _ALL, "v_head.summary"),
    (_with_scales_of_keys, False, _ALL, "_scale"),
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
    change: Callable[[Any], None],
    is_tied: bool,
    who: set[str],
    note: str,
    folder_of: Callable[..., Any],
    build_by: Any,
    served_by: Any,
) -> None:
    folder = folder_of("llama", tie_word_embeddings=is_tied)
    change(folder)
    served = served_by(folder)
    assert set(served) == who
    if not who:
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight"):
            build_by(folder, "auto")
    # By itself, that library has no reason to give for not being our code.
    for implementation in ("auto", "transformers") if who == _ALL else who & {"auto"}:
        notes = served[implementation].notes
        assert any(note in one for one in notes), notes


def test_weights_that_can_only_be_read_in_one_way_are_not_noted(
    folder_of: Callable[..., Any], build_by: Any
) -> None:
    folder = folder_of("llama")
    assert build_by(folder, "octavo").notes == ("quantization none as asked",)


def test_a_head_that_stands_for_its_pair_is_told(
    folder_of: Callable[..., Any], build_by: Any
) -> None:
    folder = folder_of("llama", tie_word_embeddings=True)
    _head_alone(folder)
    told = [note for note in build_by(folder, "octavo").notes if _HEAD in note]
    assert told == [f"{_EMBEDDING} is not there, and tied to {_HEAD}: that is taken"]
