from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.attention import flash, registry, triton_attention
from model.attention.interface import AttentionSpec
from model.attention.registry import BACKENDS, choose_backend
from model.cpu.library import load_cpu_library
from model.kv.format import CODED_FORMATS, KV_FORMATS, PAGE_FORMATS, KVFormat
from model.kv.pool import KVPool

SPEC = AttentionSpec(
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    scale=0.125,
    windows=(None, 8),
    dtype=torch.float32,
    kv_format=KV_FORMATS["float32"],
    device=torch.device("cpu"),
)


@pytest.fixture
def _no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("OCTAVO_CPU_OPS", raising=False)


def test_auto_takes_the_compiled_operations() -> None:
    if isinstance(reason := load_cpu_library(), str):
        pytest.skip(reason)
    offer = choose_backend("auto", SPEC)
    assert offer.name == "cpu"
    assert offer.notes == ()


@pytest.mark.usefixtures("_no_compiler")
def test_without_a_compiler_torch_serves_and_says_why() -> None:
    offer = choose_backend("auto", SPEC)
    assert offer.name == "torch"
    note = "cpu not available: no C++ compiler found; using torch, several times slower"
    assert offer.notes == (f"attention backend {note}",)


@pytest.mark.usefixtures("_no_compiler")
def test_a_backend_asked_for_by_name_is_not_replaced() -> None:
    with pytest.raises(ValueError, match=r"attention_backend cpu .* no C\+\+ compiler found"):
        choose_backend("cpu", SPEC)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="attention_backend must be auto or one of cpu, flash"):
        choose_backend("xformers", SPEC)


def test_a_cuda_model_without_flash_attention_falls_back() -> None:
    offer = choose_backend("auto", replace(SPEC, device=torch.device("cuda")))
    assert offer.name == "torch"
    assert "attention backend flash not available: dtype must be" in offer.notes[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"softcap": 30.0}, "the model caps its attention scores"),
        ({"sinks": (torch.zeros(4),) * 2}, "the model has attention sinks"),
    ],
)
def test_what_is_beyond_a_softmax_is_for_torch(changes: dict[str, Any], reason: str) -> None:
    spec = replace(SPEC, **changes)
    offer = choose_backend("auto", spec)
    assert offer.name == "torch"
    assert reason in offer.notes[0]
    with pytest.raises(ValueError, match=f"attention_backend cpu is not available: {reason}"):
        choose_backend("cpu", spec)


@pytest.mark.parametrize("name", ["reference", "torch", "triton", "auto"])
def test_an_offer_builds_what_it_is_named_for(name: str) -> None:
    offer = choose_backend(name, SPEC)
    pool = KVPool(SPEC.layout(offer.page_size(None)), 4, SPEC.device)
    assert offer.build(SPEC, pool).name == offer.name
    assert offer.name in BACKENDS


@pytest.mark.parametrize(
    ("name", "device", "reads_views"),
    [
        ("reference", "cpu", True),
        ("torch", "cpu", True),
        ("torch", "cuda", False),
        ("triton", "cpu", True),
    ],
)
def test_an_offer_states_whether_rows_may_have_views(
    name: str, device: str, reads_views: bool
) -> None:
    spec = replace(SPEC, device=torch.device(device))
    assert choose_backend(name, spec).reads_views is reads_views


def test_a_page_size_is_a_multiple_of_what_the_backend_asks_for() -> None:
    offer = replace(choose_backend("reference", SPEC), page_multiple=16, default_page_size=64)
    assert offer.page_size(None) == 64
    assert offer.page_size(32) == 32
    with pytest.raises(ValueError, match=r"page_size must be a multiple of 16 .*, got 24"):
        offer.page_size(24)


def test_a_backend_serves_the_formats_of_its_offer() -> None:
    offer = choose_backend("reference", SPEC)
    assert not offer.why_not(SPEC)
    half = replace(offer, formats=[KV_FORMATS["float16"], KV_FORMATS["bfloat16"]])
    assert half.why_not(SPEC) == "pages must be in float16 or bfloat16, got float32"


@pytest.mark.parametrize("kv_format", CODED_FORMATS, ids=lambda one: one.name)
def test_pages_of_codes_are_for_backends_that_read_them(kv_format: KVFormat) -> None:
    spec = replace(SPEC, kv_format=kv_format)
    mixed = replace(spec, other_formats={0: KV_FORMATS["float32"]})
    for name in ("reference", "torch", "triton"):
        assert choose_backend(name, spec).name == choose_backend(name, mixed).name == name
    # By themselves they are never chosen over a backend of kernels, nor refused for want of one.
    assert choose_backend("auto", replace(spec, softcap=30.0)).name == "torch"


@pytest.mark.parametrize("kv_format", CODED_FORMATS, ids=lambda one: one.name)
def test_on_cuda_pages_of_codes_and_views_go_from_flash_to_triton_with_a_note(
    kv_format: KVFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With both offering themselves, as on a GPU."""
    spec = replace(SPEC, dtype=torch.bfloat16, kv_format=KV_FORMATS["bfloat16"])
    flash_offer = flash._offer(spec, "FlashAttention-3", 16, 64, lambda call: call.q)
    triton_offer = triton_attention.offer(spec)
    assert not isinstance(triton_offer, str)
    offers = {"flash": lambda _: flash_offer, "triton": lambda _: triton_offer}
    monkeypatch.setattr(registry, "BACKENDS", offers)
    cuda = torch.device("cuda")
    assert choose_backend("auto", replace(spec, device=cuda)).name == "flash"
    coded = replace(spec, device=cuda, kv_format=kv_format)
    offer = choose_backend("auto", coded)
    assert offer.name == "triton"
    reason = f"pages must be in bfloat16, got {kv_format.name}"
    assert offer.notes == (f"attention backend flash not available: {reason}",)
    with pytest.raises(ValueError, match=f"attention_backend flash is not available: {reason}"):
        choose_backend("flash", coded)
    # Nor does flash read views of rows, which are the default with another kv_policy.
    floats = replace(spec, device=cuda)
    offer = choose_backend("auto", floats, needs_views=True)
    assert offer.name == "triton"
    reason = "it reads all keys, and kv_policy hides some"
    assert offer.notes == (f"attention backend flash not available: {reason}",)
    with pytest.raises(ValueError, match=f"attention_backend flash is not available: {reason}"):
        choose_backend("flash", floats, needs_views=True)
    # Pages that are encoded as a whole are for neither.
    assert triton_offer.why_not(replace(spec, kv_format=PAGE_FORMATS[0])).endswith("got kivi4")


@pytest.mark.parametrize("kv_format", PAGE_FORMATS, ids=lambda one: one.name)
def test_pages_that_are_encoded_as_a_whole_are_read_by_kernels(kv_format: KVFormat) -> None:
    spec = replace(SPEC, kv_format=kv_format)
    offer = choose_backend("auto", spec)
    assert (offer.name, offer.page_size(None)) == ("cpu", 64)
    # Where no kernel serves the model, torch does not read them either.
    offer = choose_backend("auto", replace(spec, softcap=30.0))
    assert (offer.name, offer.page_size(None)) == ("reference", 64)
    assert offer.notes[-1].endswith("using reference, a hundred times slower")
    with pytest.raises(ValueError, match=rf"attention_backend torch .*, got {kv_format.name}"):
        choose_backend("torch", replace(SPEC, kv_format=kv_format))


@pytest.mark.parametrize("name", ["triton", "cpu", "reference"])
def test_pages_in_a_format_that_no_kernel_reads_are_refused(name: str) -> None:
    if isinstance(reason := BACKENDS[name](SPEC), str):
        pytest.skip(reason)
    unknown = KVFormat("int3", torch.uint8)
    for changes in ({"kv_format": unknown}, {"other_formats": {1: unknown}}):
        with pytest.raises(ValueError, match=rf"attention_backend {name} .*bfloat16.*, got int3"):
            choose_backend(name, replace(SPEC, **changes))


def test_a_backend_of_one_format_refuses_mixed_layers() -> None:
    offer = replace(choose_backend("reference", SPEC), reads_mixed_layers=False)
    mixed = replace(SPEC, other_formats={0: KV_FORMATS["float16"]})
    assert offer.why_not(mixed) == "the pages of all layers must be in one format"


def test_without_triton_the_backend_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"triton is not installed: pip install 'octavo\[cuda\]'"):
        choose_backend("triton", SPEC)


def test_splits_fill_the_gpu_and_no_more_than_there_is_to_read() -> None:
    # One row of 8 KV heads leaves most of 132 multiprocessors idle; 64 rows leave none.
    assert triton_attention.num_splits(8, 132, 8192) == 64
    assert triton_attention.num_splits(512, 132, 8192) == 1
    assert triton_attention.num_splits(64, 132, 8192) == 8
    assert triton_attention.num_splits(8, 132, 200) == 4
    assert triton_attention.num_splits(8, 132, 1) == 1
