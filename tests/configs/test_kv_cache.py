"""The names of KV formats: ours, those of others, and layers without codes."""

from __future__ import annotations

from typing import get_args

import pytest

from configs.kv_cache import CODED_DTYPES, KVCacheDtype, our_kv_cache_dtype
from configs.load import ConfigError, load_config
from model.kv.format import CODED_FORMATS, KV_FORMATS, PAGE_FORMATS


def test_there_is_a_name_for_every_format() -> None:
    assert get_args(KVCacheDtype) == ("auto", *KV_FORMATS)
    assert tuple(one.name for one in (*CODED_FORMATS, *PAGE_FORMATS)) == CODED_DTYPES


@pytest.mark.parametrize(
    ("name", "ours"), [("auto", "auto"), ("fp8", "fp8"), ("fp8_e4m3", "fp8"), ("int4", "int4")]
)
def test_a_name_of_the_same_format_is_taken(name: str, ours: str) -> None:
    assert load_config({"kv_cache_dtype": name}, {}, None).cache.kv_cache_dtype == ours


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("fp8_e5m2", "fp8"),
        ("bf16", "bfloat16"),
        ("int8_per_token_head", "int8"),
        ("q8_0", "int8"),
        ("q4_0", "int4"),
        ("int2_per_token_head", "kivi2"),
        ("nvfp4", "int4"),
        ("turboquant_3bit_nc", "int4"),
    ],
)
def test_a_format_of_others_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"kv_cache_dtype": name}, {}, None)
    message = f"cache: kv_cache_dtype: '{name}' is not supported; the nearest is {nearest}"
    assert caught.value.problems == (message,)
    assert our_kv_cache_dtype(nearest) == nearest


def test_an_unknown_format_is_refused_with_the_list() -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_dtype .*'int5' .* one of auto, float32"):
        load_config({"kv_cache_dtype": "int5"}, {}, None)


def test_layers_are_indices_or_those_with_a_window() -> None:
    flags: dict[str, object] = {
        "kv_cache_dtype": "int8",
        "kv_cache_dtype_skip_layers": ["0", "31", "sliding_window"],
    }
    config = load_config(flags, {}, None)
    assert config.cache.kv_cache_dtype_skip_layers == ("0", "31", "sliding_window")


@pytest.mark.parametrize(
    ("dtype", "layer", "problem"),
    [
        ("int8", "-1", "kv_cache_dtype_skip_layers: '-1' is neither the index of a layer nor"),
        ("int8", "first", "'first' is neither the index of a layer nor sliding_window"),
        (
            "auto",
            "0",
            "skip_layers needs a kv_cache_dtype of int8, fp8, int4, kivi4, kivi2, got auto",
        ),
    ],
)
def test_layers_without_a_meaning_are_refused(dtype: str, layer: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"kv_cache_dtype": dtype, "kv_cache_dtype_skip_layers": [layer]}, {}, None)
    assert len(caught.value.problems) == 1
    assert problem in caught.value.problems[0]
