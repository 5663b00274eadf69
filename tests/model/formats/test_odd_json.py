"""JSON beside the weights with odd content: served, or refused in one line with file and key."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from model.architectures.arch import BadValueError
from model.architectures.read_arch import from_hf_config, read_arch
from model.architectures.registry import declare_tensors
from model.formats import FormatError
from model.formats.json_file import read_json_object, shown
from model.implementation import choose_implementation
from model.weights.dummy import DummyWeights
from model.weights.open import open_weights
from model.weights.source import ModelSource
from server.text.dummy import dummy_tokenizer
from server.text.load import load_text
from server.text.token_bytes import BYTE_LEVEL_ALPHABET, TextError

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
#: Keys that the readers of config.json ask for.
KEYS = (
    *CONFIG,
    *("rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "eos_token_id", "dtype", "torch_dtype"),
    *("use_sliding_window", "sliding_window", "max_window_layers", "layer_types", "hidden_act"),
    *("architectures", "is_causal", "num_experts", "logits_scaling", "quantization_config"),
    *("original_max_position_embeddings", "is_encoder_decoder", "text_config", "no_rope_layers"),
)
ROPE_KEYS = (
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"),
    *("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"),
    *("mscale", "mscale_all_dim", "truncate", "partial_rotary_factor"),
)
DEEP: Any = []
for _ in range(40):
    DEEP = [DEEP]
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 0.5, -0.0, 1e308, -1e308, 2**31, 2**63, 10**18, 10**400),
    *(math.inf, -math.inf, math.nan, "", "0.6", "many", "\n", [], [None], [1], ["x"], [[1]], {}),
    *({"a": 1}, {"rope_type": "dynamic"}, "x" * 10_000, DEEP),
)
BRACKETS = "[" * 200_000


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model that both processes can read."""
    weights = DummyWeights(from_hf_config(CONFIG))
    tensors = {name: torch.cat(list(weights.blocks(name))) for name in weights.shapes}
    save_file(tensors, tmp_path / "model.safetensors")
    write(tmp_path / "config.json", CONFIG)
    vocabulary = {letter: i for i, letter in enumerate(BYTE_LEVEL_ALPHABET)}
    core = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
    }
    write(tmp_path / "tokenizer.json", core)
    return tmp_path


def one_line(told: BaseException) -> str:
    text = str(told)
    assert text
    assert "\n" not in text
    assert len(text) < 700
    return text


def refusal(read: Callable[[], object]) -> str:
    """Return in which line a reader refuses; nothing where it reads."""
    try:
        read()
    except ValueError as error:
        return one_line(error)
    return ""


def read_engine(folder: Path) -> None:
    source = ModelSource("safetensors", folder, "m")
    if choose_implementation(source, "auto")[0] == "octavo":
        open_weights(source)


@pytest.mark.parametrize("key", KEYS)
def test_an_odd_value_in_the_config_is_served_or_named(folder: Path, key: str) -> None:
    for value in ODD:
        write(folder / "config.json", {**CONFIG, key: value})
        told = refusal(partial(read_engine, folder))
        # Sizes that are possible show in the tensors alone.
        assert not told or key in told or "the config asks for" in told or "is missing" in told
        told = refusal(partial(load_text, folder))
        assert not told or ("config.json" in told and key in told)


@pytest.mark.parametrize("variant", ["default", "linear", "dynamic", "llama3", "yarn"])
@pytest.mark.parametrize("key", ROPE_KEYS)
def test_an_odd_value_of_rope_is_served_or_named(key: str, variant: str) -> None:
    sound = {"rope_type": variant, "rope_theta": 500.0, "factor": 2.0}
    if variant == "llama3":
        sound |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if variant == "default":
        del sound["factor"]
    for value in ODD:
        config = {**CONFIG, "rope_parameters": {**sound, key: value}}
        told = refusal(partial(from_hf_config, config))
        assert not told or key in told or "rope_parameters" in told


@pytest.mark.parametrize("key", ["eos_token_id", "temperature", "do_sample", "top_k"])
@pytest.mark.parametrize("value", ODD, ids=lambda one: shown(one)[:12])
def test_an_odd_generation_config_is_served_or_named(folder: Path, key: str, value: Any) -> None:
    path = write(folder / "generation_config.json", {key: value})
    for read in (read_engine, load_text):
        told = refusal(partial(read, folder))
        assert not told or (f"{path.name}: eos_token_id must be" in told and key == "eos_token_id")


@pytest.mark.parametrize("value", ODD, ids=lambda one: shown(one)[:12])
def test_an_odd_vocabulary_of_a_dummy_is_served_or_named(tmp_path: Path, value: Any) -> None:
    path = write(tmp_path / "dummy.json", {**CONFIG, "vocab_size": value})
    for read in (lambda: dummy_tokenizer(path), lambda: read_arch(ModelSource("dummy", path, "d"))):
        told = refusal(read)
        assert not told or ("dummy.json" in told and "vocab_size" in told)


@pytest.mark.parametrize(
    "key", ["weight_map", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"]
)
@pytest.mark.parametrize("value", [*ODD, "../x", "/etc/hostname"], ids=lambda one: shown(one)[:12])
def test_an_odd_index_is_read_or_named(folder: Path, key: str, value: Any) -> None:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    placed = dict.fromkeys(declare_tensors(from_hf_config(CONFIG)), "part.safetensors")
    index = {key: value} if key == "weight_map" else {"weight_map": {**placed, key: value}}
    write(folder / "model.safetensors.index.json", index)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json") as told:
        read_engine(folder)
    one_line(told.value)


@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
@pytest.mark.parametrize("value", ODD, ids=lambda one: shown(one)[:12])
def test_an_odd_header_of_safetensors_is_read_or_named(folder: Path, key: str, value: Any) -> None:
    name = "model.norm.weight"
    entry = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64], key: value}
    header = json.dumps({name: entry}).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(ValueError, match=r"model\.safetensors|is missing") as told:
        read_engine(folder)
    one_line(told.value)


TOKEN_KEYS = (
    *("bos_token", "eos_token", "unk_token", "pad_token", "added_tokens_decoder", "add_bos_token"),
    *("extra_special_tokens", "additional_special_tokens", "tokenizer_class", "chat_template"),
)


@pytest.mark.parametrize("key", TOKEN_KEYS)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_an_odd_value_of_a_tokenizer_is_served_or_named(folder: Path, name: str, key: str) -> None:
    for value in ODD:
        write(folder / name, {key: value})
        told = refusal(partial(load_text, folder))
        assert not told or (str(folder) in told and ("special_tokens" in told or key in told)), told


@pytest.mark.parametrize("name", ["added_tokens.json", "chat_template.json"])
def test_an_odd_value_beside_a_tokenizer_is_served_or_named(folder: Path, name: str) -> None:
    for value in ODD:
        write(folder / name, {"chat_template": value})
        told = refusal(partial(load_text, folder))
        assert not told or str(folder) in told, told


FILES = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.json"),
)
#: Not JSON, or not an object, or too large.
TEXTS = {
    "brackets": BRACKETS,
    "brackets in an object": '{"a":' + BRACKETS,
    "closed brackets": BRACKETS + "]" * 200_000,
    "objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "less than the interpreter's limit": "[" * 900 + "]" * 900,
    "half a pair": '{"a": "\\ud83d"}',
    "digits": '{"a": ' + "9" * 5000 + "}",
    "cut": '{"a": ',
    "empty": "",
    "a list": "[1]",
    "a number": "1",
    "two": "{} {}",
    "a comment": "{} // that is it",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("text", TEXTS)
def test_a_file_that_cannot_be_read_is_named(folder: Path, name: str, text: str) -> None:
    write(folder / name, TEXTS[text])
    with pytest.raises(TextError, match=name.replace(".", r"\.")) as told:
        load_text(folder)
    one_line(told.value)
    if name in ("config.json", "generation_config.json"):
        with pytest.raises(FormatError, match=name.replace(".", r"\.")) as told_too:
            read_engine(folder)
        assert one_line(told_too.value) == str(told.value)


@pytest.mark.parametrize("text", TEXTS)
def test_a_header_or_index_that_cannot_be_read_is_named(folder: Path, text: str) -> None:
    raw, path = TEXTS[text].encode(), folder / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(FormatError, match=r"model\.safetensors is ") as told:
        read_engine(folder)
    one_line(told.value)
    path.rename(folder / "part.safetensors")
    write(folder / "model.safetensors.index.json", TEXTS[text])
    with pytest.raises(FormatError, match=r"index\.json ") as told:
        read_engine(folder)
    one_line(told.value)


@pytest.mark.parametrize(
    "raw",
    [b'{"a": Infinity, "b": NaN}', b'\xef\xbb\xbf{"a": -Infinity}', b'{"a": 1e999, "b": null}'],
)
def test_what_pythons_own_reader_takes_is_read(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(raw)
    assert not math.isfinite(read_json_object(path)["a"])  # type: ignore[arg-type] # a number


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(FormatError, match=r"config\.json has 1099511627776 bytes; at most"):
        read_json_object(path)


@pytest.mark.parametrize("value", [math.inf, math.nan, "576", 2**31, [576]])
def test_a_value_that_nobody_can_mean_is_not_left_to_another_library(
    folder: Path, value: Any, make_source: Callable[[Path], ModelSource]
) -> None:
    write(folder / "config.json", {**CONFIG, "hidden_size": value})
    with pytest.raises(BadValueError, match=r"config\.json: hidden_size must be"):
        choose_implementation(make_source(folder), "auto")


@pytest.fixture
def make_source() -> Callable[[Path], ModelSource]:
    return lambda folder: ModelSource("safetensors", folder, "m")
