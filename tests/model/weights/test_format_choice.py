from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.cpu.library import CpuLibrary, load_cpu_library
from model.kv.arena import Arena
from model.weights import format_choice
from model.weights.format_choice import (
    TIMED_ROWS,
    choose_activation_bits,
    choose_format,
    time_formats,
)
from model.weights.interface import QuantizedRows
from model.weights.linear import Format, Linear, PlainLinear
from model.weights.tiles import Tiles, pack_integers

CPU = torch.device("cpu")


class Slow(PlainLinear):
    """A product that takes longer from so many rows on."""

    def __init__(self, weight: Tensor, from_rows: int, pause_s: float) -> None:
        super().__init__(weight, None)
        self._from_rows, self._pause_s = from_rows, pause_s

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) >= self._from_rows:
            time.sleep(self._pause_s)
        return super().__call__(x)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CpuLibrary:
    found = load_cpu_library()
    if isinstance(found, str):
        pytest.skip(found)
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path))
    return found


def _auto(library: CpuLibrary) -> tuple[Format, str]:
    return choose_format("auto", CPU, torch.float32, library=library, num_inputs=64)


def test_times_are_the_best_of_each_format_at_each_number_of_rows() -> None:
    packers: dict[Format, Callable[[Tensor], Linear]] = {
        "bf16": lambda weight: Slow(weight, 32, 0.01),
        "fp16": lambda weight: Slow(weight, 1, 0.003),
    }
    times = time_formats(packers, (16, 16), 0.05)
    assert [one < 0.003 for one in times["bf16"]] == [rows < 32 for rows in TIMED_ROWS]
    assert all(0.003 <= one < 0.1 for one in times["fp16"])


def test_the_fastest_is_taken_and_its_times_are_kept(
    library: CpuLibrary, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    times = {"bf16": [0.001, 0.001, 0.002, 0.02], "fp16": [0.001, 0.001, 0.004, 0.05]}
    calls = []

    def timed(*_arguments: object) -> dict[str, list[float]]:
        calls.append(1)
        return times

    monkeypatch.setattr(format_choice, "time_formats", timed)
    expected = (
        "bf16",
        "quantization bf16: the fastest of bf16 1/1/2/20, fp16 1/1/4/50 ms (1/8/32/256 rows)",
    )
    assert [_auto(library) for _ in range(2)] == [expected] * 2
    assert len(calls) == 1
    choose_format("auto", CPU, torch.float32, library=library, num_inputs=128)
    assert len(calls) == 2, "another shape"
    times["fp16"][0] = 1e-6
    for damage in (b"", b"[1]", b'{"bf16": [1.0]}', json.dumps({"bf16": [0.0] * 4}).encode()):
        for kept in (tmp_path / "timings").iterdir():
            kept.write_bytes(damage)
        calls.clear()
        assert _auto(library)[0] == "fp16"
        assert calls


def test_a_home_that_cannot_be_written_costs_a_measurement_alone(
    library: CpuLibrary, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(format_choice, "_TIMED_WEIGHTS", 2**12)
    assert _auto(library)[0] in {"bf16", "fp16"}


@pytest.mark.parametrize(("names", "bits"), [("Q4_1 and Q8_0", 4), ("Q8_0", 8), ("Q6_K", 4)])
def test_the_integers_of_a_file_take_part(
    library: CpuLibrary, monkeypatch: pytest.MonkeyPatch, names: str, bits: int
) -> None:
    monkeypatch.setattr(format_choice, "_TIMED_WEIGHTS", 2**16)
    packed: list[int] = []

    def pack(rows: QuantizedRows, bias: Tensor | None, arena: Arena) -> Tiles:
        packed.append(rows.bits)
        return pack_integers(rows, bias, arena)

    monkeypatch.setattr(format_choice, "pack_integers", pack)
    fmt, note = choose_format(
        "auto", CPU, torch.float32, library=library, num_inputs=64, own_bits=names
    )
    assert packed == [bits]
    assert "own 0." in note
    assert (f"(the file's {names})" in note) == (fmt == "own")


def test_own_bits_need_a_file_that_has_some(library: CpuLibrary) -> None:
    with pytest.raises(ValueError, match="own is for files of integers"):
        choose_format("own", CPU, torch.float32, library=library)


@pytest.mark.parametrize(("slower", "taken"), [(1.2, "own"), (1.3, "bf16")])
def test_own_bits_are_taken_if_they_are_not_much_slower(
    library: CpuLibrary, monkeypatch: pytest.MonkeyPatch, slower: float, taken: Format
) -> None:
    times = {"bf16": [1.0] * 4, "fp16": [2.0] * 4, "own": [slower] * 4}
    monkeypatch.setattr(format_choice, "time_formats", lambda *_arguments: times)
    found, _note = choose_format(
        "auto", CPU, torch.float32, library=library, num_inputs=64, own_bits="Q4_K"
    )
    assert found == taken


@pytest.mark.parametrize(
    ("asked", "fmt", "isa", "bits"),
    [
        ("auto", "int8", "avx512_bf16", 8),
        ("auto", "int4", "avx2_vnni", 8),
        ("auto", "own", "avx512_vnni", 16),
        ("8", "own", "avx512_vnni", 8),
        ("16", "int8", "avx512_vnni", 16),
        ("auto", "int8", "amx", 16),
        ("auto", "int8", "avx2", 16),
        ("auto", "int4", "neon_bf16", 16),
        ("auto", "bf16", "avx512_bf16", 16),
    ],
)
def test_activations_have_eight_bits_where_speed_is_asked_for_and_gained(
    library: CpuLibrary, asked: str, fmt: Format, isa: str, bits: int
) -> None:
    found, note = choose_activation_bits(asked, fmt, replace(library, isa=isa))
    assert found == bits
    assert (f"in {bits} bits" in note) == (fmt != "bf16")


@pytest.mark.parametrize(
    ("fmt", "isa", "reason"),
    [
        ("bf16", "avx512_bf16", "is for weights in int8, int4 or own, not in bf16"),
        ("none", None, "is for weights in int8, int4 or own, not in none"),
        ("int8", "avx2", "is not faster than 16 on this CPU"),
        ("int8", "amx", "is not faster than 16 on this CPU"),
        ("int8", "neon_bf16", "is not faster than 16 on this CPU"),
        ("int8", None, "is not faster than 16 on this CPU"),
    ],
)
def test_eight_bits_are_refused_where_they_mean_nothing(
    library: CpuLibrary, fmt: Format, isa: str | None, reason: str
) -> None:
    used = replace(library, isa=isa) if isa else None
    with pytest.raises(ValueError, match=f"activation_bits 8 {reason}"):
        choose_activation_bits("8", fmt, used)
