"""Weights out of a GGUF file: llama.cpp's names, its block formats and its order of rows.

Blocks are decoded by the `gguf` package, in large pieces (its own entry cuts them into 16 rows,
which takes five times as long). Knows nothing of layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import gguf
import torch
from torch import Tensor

from model.architectures.arch import ArchSpec
from model.gguf_file import GgufFile, GgufTensor
from model.weights.interface import WeightsError, read_bytes, row_blocks

#: Canonical name of the divisors of rope's frequencies; only some files have them.
ROPE_FACTORS = "rope_factors"

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "rope_freqs.weight": ROPE_FACTORS,
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
#: Families whose q and k llama.cpp's converter reorders, for a rope that turns neighbours.
_INTERLEAVED = {"llama", "mistral"}


class GgufWeights:
    """See `WeightSource`: a GGUF file's tensors."""

    def __init__(self, file: GgufFile, arch: ArchSpec) -> None:
        self._path = file.path
        self._tensors = {canonical_name(name): one for name, one in file.tensors.items()}
        self._shapes = {name: one.shape for name, one in self._tensors.items()}
        self._head_dim = arch.head_dim
        self._is_interleaved = arch.family in _INTERLEAVED

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See `WeightSource`."""
        return self._shapes

    def describe(self, name: str) -> str:
        """See `WeightSource`."""
        found = self._tensors.get(name)
        shown = f"{found.name} ({found.type_name})" if found else _gguf_name(name)
        return f"tensor {shown} in {found.path if found else self._path}"

    def blocks(self, name: str) -> Iterator[Tensor]:
        """See `WeightSource`."""
        tensor = self._tensors[name]
        swap = self._is_interleaved and (".q_proj." in name or ".k_proj." in name)
        row_bytes = tensor.num_bytes // tensor.shape[0]
        with tensor.path.open("rb") as file:
            for start, count in row_blocks(tensor.shape, self._head_dim if swap else 1):
                offset_bytes = tensor.offset_bytes + start * row_bytes
                raw = read_bytes(file, offset_bytes, count * row_bytes)
                rows = self._decode(name, tensor, raw).view(count, *tensor.shape[1:])
                yield _halves_from_neighbours(rows, self._head_dim) if swap else rows

    def _decode(self, name: str, tensor: GgufTensor, raw: Tensor) -> Tensor:
        if plain := _PLAIN.get(tensor.type_name):
            return raw.view(plain)
        kind = gguf.GGMLQuantizationType[tensor.type_name]
        try:
            return torch.from_numpy(gguf.dequantize(raw.numpy().reshape(1, -1), kind))
        except NotImplementedError as error:
            raise WeightsError(f"{self.describe(name)}: this type is not supported") from error


def canonical_name(name: str) -> str:
    """Translate llama.cpp's name of a tensor; one nobody knows stays as it is."""
    found = _LAYER_NAME.fullmatch(name)
    if found is None or found[2] not in _LAYER:
        return _TOP.get(name, name)
    return f"model.layers.{found[1]}.{_LAYER[found[2]]}.{found[3]}"


def _gguf_name(name: str) -> str:
    """Translate back, for messages."""
    for theirs, ours in _TOP.items():
        if name == ours:
            return theirs
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    parts = {ours: theirs for theirs, ours in _LAYER.items()}
    return f"blk.{found[1]}.{parts[found[2]]}.{found[3]}" if found else name


def _halves_from_neighbours(rows: Tensor, head_dim: int) -> Tensor:
    """Undo the converter's reordering: within a head, (i, half) becomes (half, i)."""
    rest = rows.shape[1:]
    return rows.view(-1, head_dim // 2, 2, *rest).transpose(1, 2).reshape(-1, *rest)
