"""The requirements of attention layers, and the pages made for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.architectures.arch import ArchError
from model.hf.attention import (
    AttentionCall,
    LayerRequirements,
    Probe,
    common_spec,
    window_of,
)

PLACE = torch.float32, torch.device("cpu")


def layer(**changes: Any) -> LayerRequirements:
    plain: dict[str, Any] = {
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 8,
        "v_head_dim": 8,
        "scale": 0.5,
        "softcap": None,
        "sinks": None,
        "window": None,
    }
    return LayerRequirements(**{**plain, **changes})


def causal(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key <= query


def test_windows_are_found_by_trying_the_rule() -> None:
    def window(size: int) -> Any:
        return lambda b, h, q, k: causal(b, h, q, k) & (k > q - size)

    assert window_of(causal, 100) is None
    assert window_of(window(1), 100) == 1
    assert window_of(window(7), 100) == 7
    assert window_of(window(99), 100) == 99
    assert window_of(window(100), 100) is None


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(lambda _b, _h, _q, k: k >= 0, id="all see all"),
        pytest.param(lambda _b, _h, q, k: (k <= q) & (k // 30 == q // 30), id="chunks"),
        pytest.param(lambda _b, _h, q, k: (k <= q) | (k < 10), id="a prefix sees itself"),
        pytest.param(lambda _b, _h, q, k: (k <= q) & ((k > q - 9) | (k < 4)), id="kept beginning"),
        pytest.param(lambda _b, _h, q, k: k < q, id="not itself"),
    ],
)
def test_what_is_no_window_is_refused(rule: Any) -> None:
    with pytest.raises(ArchError, match="neither causal nor a sliding window"):
        window_of(rule, 100)


def test_pages_are_alike_in_all_layers() -> None:
    layers = [
        layer(window=5),
        layer(num_kv_heads=6, head_dim=16, v_head_dim=4, scale=0.25),
        layer(v_head_dim=24, sinks=torch.ones(6)),
    ]
    spec = common_spec(layers, 3, *PLACE)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (6, 6, 24)
    assert spec.scale == 0.5
    assert spec.sinks is not None
    assert spec.sinks[2].tolist() == [1.0] * 6
    # No share of the softmax.
    assert spec.sinks[0].tolist() == [-torch.inf] * 6
    assert common_spec(layers[:1], 1, *PLACE).sinks is None


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([layer(), layer(num_heads=4)], "differ in num_heads"),
        ([layer(), layer(softcap=3.0)], "differ in softcap"),
        ([layer(), layer(num_kv_heads=3)], "not by a whole factor"),
        ([layer()], "attends 1 times in 2 layers"),
    ],
)
def test_layers_too_unlike_for_one_pool_are_refused(
    layers: list[LayerRequirements], message: str
) -> None:
    with pytest.raises(ArchError, match=message):
        common_spec(layers, 2, *PLACE)


def test_an_unknown_argument_is_refused() -> None:
    heads = torch.zeros(1, 2, 8)
    call = AttentionCall(heads, heads, heads, None, 1.0, None, None, {"position_bias": heads})
    with pytest.raises(ArchError, match="wants 'position_bias'"):
        Probe(8).attend(call)


def test_a_mask_that_was_made_otherwise_is_refused() -> None:
    heads = torch.zeros(1, 2, 8)
    call = AttentionCall(heads, heads, heads, torch.ones(1, 1, 1, 1), 1.0, None, None, {})
    with pytest.raises(ArchError, match="masks of its own"):
        Probe(8).attend(call)
