"""GGUF files with false headers: one line at once, whichever process reads them.

Time is counted in calls, and memory in Python's allocations: a length in the file must not be used
before it is compared with the file's size.
"""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.weights.open import open_weights
from model.weights.source import ModelSource
from server.text.load import load_text

HUGE = (2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**61, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1)
#: Limits for reading a file this small: far below one call for each of 10^9 layers.
MAX_CALLS, MAX_BYTES = 2_000_000, 64 * 2**20


def write(path: Path) -> Path:
    """Write a model of one layer and 256 tokens."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(32)])
    writer.add_token_types([1] * 32)
    writer.add_token_merges([])
    shapes = {
        "token_embd.weight": (32, 8),
        "output_norm.weight": (8,),
        "blk.0.attn_norm.weight": (8,),
        "blk.0.ffn_norm.weight": (8,),
        "blk.0.attn_q.weight": (8, 8),
        "blk.0.attn_k.weight": (4, 8),
        "blk.0.attn_v.weight": (4, 8),
        "blk.0.attn_output.weight": (8, 8),
        "blk.0.ffn_gate.weight": (16, 8),
        "blk.0.ffn_up.weight": (16, 8),
        "blk.0.ffn_down.weight": (8, 16),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sound") / "m.gguf")


def read_by_the_engine(path: Path) -> None:
    open_weights(ModelSource("gguf", path, "m"))


READERS: dict[str, Callable[[Path], object]] = {"engine": read_by_the_engine, "API": load_text}


class Budget:
    """Ends a reader that calls or keeps too much."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, _frame: FrameType, _event: str, _arg: object) -> None:
        self.calls += 1
        if self.calls % 1000 == 0 and (
            self.calls > MAX_CALLS or tracemalloc.get_traced_memory()[1] > MAX_BYTES
        ):
            sys.setprofile(None)
            raise AssertionError(f"{self.calls} calls, {tracemalloc.get_traced_memory()} bytes")


def outcome(read: Callable[[Path], object], path: Path) -> str:
    """Return the message of the error in reading, or nothing. Fails where the budget is spent."""
    tracemalloc.start()
    sys.setprofile(Budget())
    try:
        read(path)
    except (ValueError, OSError) as error:
        return str(error)
    else:
        return ""
    finally:
        sys.setprofile(None)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < MAX_BYTES


def damaged(sound: Path, offset: int, data: bytes) -> Path:
    whole = bytearray(sound.read_bytes())
    whole[offset : offset + len(data)] = data
    path = sound.with_name("damaged.gguf")
    path.write_bytes(whole)
    return path


def header_bytes(sound: Path) -> int:
    """Return where the directory ends."""
    return sound.read_bytes().rindex(b"blk.0.ffn_down.weight") + 60


@pytest.mark.parametrize("reader", READERS)
def test_a_sound_file_is_read_within_the_budget(sound: Path, reader: str) -> None:
    assert outcome(READERS[reader], sound) == ""


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("number", HUGE)
@pytest.mark.parametrize(
    "before", [b"GGUF\x03\0\0\0", b"GGUF\x03\0\0\0" + bytes(8), b"tokenizer.ggml.model\x08\0\0\0"]
)
def test_a_number_of_tensors_keys_or_letters_is_not_believed(
    sound: Path, reader: str, number: int, before: bytes
) -> None:
    whole = sound.read_bytes()
    offset = 16 if len(before) == 16 else whole.index(before) + len(before)
    told = outcome(READERS[reader], damaged(sound, offset, number.to_bytes(8, "little")))
    assert "damaged.gguf" in told
    assert "\n" not in told


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("number", HUGE)
def test_a_number_of_tokens_is_not_believed(sound: Path, reader: str, number: int) -> None:
    name = b"tokenizer.ggml.tokens"
    offset = sound.read_bytes().index(name) + len(name) + 8
    told = outcome(READERS[reader], damaged(sound, offset, number.to_bytes(8, "little")))
    assert "damaged.gguf is " in told
    assert "\n" not in told


@pytest.mark.parametrize(
    "key",
    [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
    ],
)
@pytest.mark.parametrize("number", [0, 10**9, 2**31 - 1, 2**32 - 1])
def test_a_size_is_not_believed(sound: Path, key: str, number: int) -> None:
    name = f"llama.{key}".encode()
    offset = sound.read_bytes().index(name) + len(name) + 4
    told = outcome(read_by_the_engine, damaged(sound, offset, number.to_bytes(4, "little")))
    assert told or key == "context_length"
    assert "\n" not in told


@pytest.mark.parametrize("reader", READERS)
@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_whatever_a_header_says_it_is_read_or_refused_in_a_line(
    sound: Path, reader: str, data: st.DataObject
) -> None:
    size = data.draw(st.sampled_from([1, 2, 4, 8]))
    number = data.draw(st.sampled_from(HUGE) | st.integers(0, 300)) % 2 ** (8 * size)
    offset = data.draw(st.integers(0, header_bytes(sound) - size))
    path = damaged(sound, offset, number.to_bytes(size, "little"))
    if data.draw(st.integers(0, 4)) == 0:
        path.write_bytes(path.read_bytes()[: data.draw(st.integers(0, header_bytes(sound)))])
    told = outcome(READERS[reader], path)
    assert "\n" not in told
    assert len(told) < 600
