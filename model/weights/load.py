"""Builds a decoder from files: reads, packs and drops tensor after tensor, the largest first.

Peak memory is the kept weights plus, for each worker, one product in the dtype of its packing. The
largest products are packed first, while little other memory is in use.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from model.architectures.arch import ArchSpec, TensorSpec, lengthened
from model.architectures.registry import declare_tensors
from model.architectures.transformer import (
    DecoderLayer,
    GatedMlp,
    Transformer,
    TransformerWeights,
)
from model.cpu.library import CpuLibrary
from model.kv.arena import Arena
from model.ops import Ops
from model.weights.checkpoints.coded_matrix import CodedMatrix
from model.weights.format_choice import choose_format
from model.weights.gguf import ROPE_FACTORS
from model.weights.interface import QuantizedRows, WeightSource, read_into
from model.weights.linear import (
    Format,
    Linear,
    PlainLinear,
    head_format,
    pack,
    staging_dtype,
)
from model.weights.open import open_weights
from model.weights.quantized_rows import is_finite, join
from model.weights.round_integers import to_int4, to_int8
from model.weights.safetensors import SafetensorsWeights
from model.weights.source import ModelSource
from model.weights.tiled_linear import TILED_FORMATS, TiledLinear
from model.weights.tiles import Tiles, pack_floats, pack_integers

#: Packs the matrices of a product, with a bias; None where it cannot.
CodedPacker: TypeAlias = Callable[[Sequence[CodedMatrix], Tensor | None], Linear | None]


def build_transformer(  # noqa: PLR0913 - the parts of a device, by keyword
    source: ModelSource,
    *,
    quantization: str,
    dtype: torch.dtype,
    device: torch.device,
    ops: Ops,
    progress: bool,
    max_positions: int | None = None,
    tiles: CpuLibrary | None = None,
    coded: CodedPacker | None = None,
) -> Transformer:
    """Load a model onto `device`.

    `tiles`: pack weights of any of `TILED_FORMATS` for this library's products.
    `coded`: packs the codes of quantized checkpoints, where `quantization` is auto.
    `dtype` is that of the activations, on a CPU float32; `max_positions`: the length of the longest
    request, where that is known. With `progress`, a bar on stderr where that is a terminal.
    Raises `ValueError` (`WeightsError`, `ArchError`, `FormatError` are ones) or `OSError`.
    """
    arch, weights = open_weights(source)
    arch = lengthened(arch, max_positions)
    fmt, note = choose_format(
        quantization,
        device,
        dtype,
        library=tiles,
        num_inputs=arch.hidden_size,
        own_bits=weights.own_bits,
    )
    packs_tiles = fmt in TILED_FORMATS
    loader = _Loader(arch, weights, device, fmt, dtype, tiles if packs_tiles else None)
    loader.coded = coded if quantization == "auto" else None
    bar = tqdm(
        total=arch.num_layers + 1,
        desc=f"loading {source.name}",
        unit="layer",
        # None: only where stderr is a terminal.
        disable=None if progress else True,
    )
    with _without_holes(), closing(bar):
        loaded = _load(loader, bar)
    notes = [note, *arch.notes]
    if num_coded := len(loader.coded_bytes):
        notes.append(f"{num_coded} products are computed from the codes of the checkpoint")
    if loader.not_finite:
        notes.append(f"weights that are not finite: {', '.join(sorted(loader.not_finite))}")
    if loader.not_integers:
        first, count = min(loader.not_integers), len(loader.not_integers)
        notes.append(f"{count} tensors are widened to bf16, among them {weights.describe(first)}")
    return Transformer(arch, loaded, ops, fmt, tuple(notes))


def _load(loader: _Loader, bar: tqdm) -> TransformerWeights:
    """Load the vocabulary and the layers side by side.

    Decoding and packing release the interpreter's lock, and each is single-threaded or too short
    to split, so one thread a layer makes loading fast.
    """
    num_layers = loader.arch.num_layers
    num_workers = min(torch.get_num_threads(), _MAX_WORKERS)
    with ThreadPoolExecutor(num_workers, "load", torch.set_num_threads, (1,)) as pool:
        vocabulary = pool.submit(loader.vocabulary)
        layers = [pool.submit(loader.layer, index) for index in range(num_layers)]
        vocabulary.add_done_callback(lambda _done: bar.update())
        for layer in layers:
            layer.add_done_callback(lambda _done: bar.update())
        try:
            embedding, lm_head = vocabulary.result()
            decoder_layers = tuple(layer.result() for layer in layers)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return TransformerWeights(
        embedding=embedding,
        layers=decoder_layers,
        final_norm=loader.norm("final_norm"),
        lm_head=lm_head,
        rope_factors=loader.rope_factors(),
        num_bytes=sum(loader.sizes_bytes),
    )


#: Inputs of eight bits that share a scale. A layer multiplies whole prompts, where each scale costs
#: time; the logits, of few rows, lose most by rounding (docs/performance.md).
_LAYER_GROUP_INPUTS, _HEAD_GROUP_INPUTS = 128, 64
#: Of four bits.
_FOUR_BIT_GROUP_INPUTS = 32
#: Each holds one layer's product, so more of them would raise peak memory.
_MAX_WORKERS = 4
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@contextmanager
def _without_holes() -> Iterator[None]:
    """Make malloc take large blocks from the system one by one, and return them one by one.

    Otherwise kept weights reuse the memory of freed temporaries, and the next temporary needs new
    memory: half as much again as the weights, measured. Afterwards malloc has the limits that it
    adapts to by itself. Another malloc than glibc's is left alone.
    """
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, 2**17)
    try:
        yield
    finally:
        libc.malloc_trim(0)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)


def _to_int4(weight: Tensor, _group_inputs: int) -> QuantizedRows:
    return to_int4(weight, _FOUR_BIT_GROUP_INPUTS)


#: Formats whose integers are made from floating weights.
_ROUNDERS: dict[Format, Callable[[Tensor, int], QuantizedRows]] = {
    "int8": to_int8,
    "int4": _to_int4,
}


def _look_up(table: Tensor, token_ids: Tensor) -> Tensor:
    return functional.embedding(token_ids, table).float()


@dataclass(slots=True)
class _Loader:
    """Reads and packs parts of a model; its methods may run side by side."""

    arch: ArchSpec
    weights: WeightSource
    device: torch.device
    fmt: Format
    dtype: torch.dtype
    #: None: the weights are not packed in tiles.
    tiles: CpuLibrary | None
    #: None: quantized matrices are widened.
    coded: CodedPacker | None = None
    #: Memory of each product in codes.
    coded_bytes: list[int] = field(default_factory=list)
    arena: Arena = field(default_factory=Arena)
    #: Memory of each part that was loaded.
    sizes_bytes: list[int] = field(default_factory=list)
    #: Names of tensors with NaN or infinities in them.
    not_finite: set[str] = field(default_factory=set)
    #: Names of tensors whose product has no integers of its file, where these are kept.
    not_integers: set[str] = field(default_factory=set)
    #: By target.
    tensors: dict[str, list[TensorSpec]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        for tensor in declare_tensors(self.arch).values():
            self.tensors[tensor.target].append(tensor)

    def vocabulary(self) -> tuple[Callable[[Tensor], Tensor], Linear]:
        """Load the embedding and the product that gives the logits, as one tensor if possible.

        The product comes first, since its packing needs the most memory.
        """
        is_tied = self.arch.is_tied
        if is_tied and self.fmt == "none":
            table = self.kept("embedding", self.dtype)
            return partial(_look_up, table), PlainLinear(table, None)
        head = "embedding" if is_tied else "lm_head"
        lm_head = self._linear(head, head_format(self.fmt), group_inputs=_HEAD_GROUP_INPUTS)
        if is_tied and isinstance(lm_head, TiledLinear):
            return lm_head.tiles.rows, lm_head
        if self.fmt == "own" and (integers := self._integers(self.tensors["embedding"])):
            tiles = pack_integers(integers, None, self.arena)
            self.sizes_bytes.append(tiles.num_bytes)
            return tiles.rows, lm_head
        # 16 bits hold any embedding closely enough.
        kept_dtype = self.dtype if self.fmt == "none" else torch.float16
        return partial(_look_up, self.kept("embedding", kept_dtype)), lm_head

    def layer(self, index: int) -> DecoderLayer:
        """Load a layer, its largest product first."""
        spec, fmt = self.arch.layers[index], self.fmt
        gate_up = self._linear(f"{index}.gate_up", fmt)
        down = self._linear(f"{index}.down", fmt)
        return DecoderLayer(
            spec=spec,
            mlp=GatedMlp(gate_up, down, spec.mlp.activation),
            qkv=self._linear(f"{index}.qkv", fmt),
            o=self._linear(f"{index}.o", fmt),
            norms={place: self.norm(f"{index}.{place}") for place in spec.norms},
            q_norm=self.norm(f"{index}.q_norm") if spec.qk_norm else None,
            k_norm=self.norm(f"{index}.k_norm") if spec.qk_norm else None,
        )

    def norm(self, target: str) -> Tensor:
        """Read a norm's weights, in float32 since they are small."""
        return self.kept(target, torch.float32).add_(self.arch.norm_offset)

    def kept(self, target: str, dtype: torch.dtype) -> Tensor:
        """Read a tensor that is not packed."""
        kept = self._stacked(self.tensors[target], dtype)
        self.sizes_bytes.append(kept.nbytes)
        return kept

    def rope_factors(self) -> Tensor | None:
        """Read the divisors of rope's frequencies, if the file has any."""
        if ROPE_FACTORS not in self.weights.shapes:
            return None
        factors = torch.empty(self.weights.shapes[ROPE_FACTORS])
        read_into(self.weights, ROPE_FACTORS, factors)
        return factors

    def _linear(
        self, target: str, fmt: Format, *, group_inputs: int = _LAYER_GROUP_INPUTS
    ) -> Linear:
        """Pack products that share their input as one, their rows one after another."""
        staging = staging_dtype(fmt, self.dtype)
        tensors = self.tensors[target]
        biases = [one for one in tensors if len(one.shape) == 1]
        bias = self._stacked(biases, staging) if biases else None
        matrices = [one for one in tensors if len(one.shape) > 1]
        if linear := self._coded_linear(matrices, bias):
            return linear
        if self.tiles is None:
            linear = pack(self._stacked(matrices, staging), bias, fmt)
        else:
            tiles = self._packed_tiles(matrices, bias, fmt, group_inputs)
            linear = TiledLinear(tiles, self.tiles)
        self.sizes_bytes.append(linear.weight_bytes)
        return linear

    def _packed_tiles(
        self, matrices: Sequence[TensorSpec], bias: Tensor | None, fmt: Format, group_inputs: int
    ) -> Tiles:
        if fmt == "own" and (integers := self._integers(matrices)):
            return pack_integers(integers, bias, self.arena)
        weight = self._stacked(matrices, staging_dtype(fmt, self.dtype))
        if fmt not in _ROUNDERS:
            return pack_floats(weight, bias, self.arena)
        integers = _ROUNDERS[fmt](weight, group_inputs)
        return pack_integers(integers, bias, self.arena, num_inputs=weight.shape[1])

    def _integers(self, matrices: Sequence[TensorSpec]) -> QuantizedRows | None:
        """Read the integers of a product, if all of its parts are kept in integers that fit."""
        parts = [self.weights.quantized(one.name) for one in matrices]
        found = [part for part in parts if part is not None]
        joined = join(found) if len(found) == len(parts) else None
        if joined is None:
            self.not_integers.update(one.name for one in matrices)
        elif not is_finite(joined):
            self.not_finite.update(
                one.name for one, part in zip(matrices, found, strict=True) if not is_finite(part)
            )
        return joined

    def _coded_linear(self, matrices: Sequence[TensorSpec], bias: Tensor | None) -> Linear | None:
        """Pack the codes of a product; None where the packer cannot take all its matrices."""
        if self.coded is None or not isinstance(self.weights, SafetensorsWeights):
            return None
        found = [self.weights.coded(one.name) for one in matrices]
        parts = [part for part in found if part is not None and part.is_finite()]
        linear = self.coded(parts, bias) if len(parts) == len(found) else None
        if linear is not None:
            self.coded_bytes.append(linear.weight_bytes)
            self.sizes_bytes.append(linear.weight_bytes)
        return linear

    def _stacked(self, tensors: Sequence[TensorSpec], dtype: torch.dtype) -> Tensor:
        num_rows = sum(one.shape[0] for one in tensors)
        shape = (num_rows, *tensors[0].shape[1:])
        stacked = torch.empty(shape, dtype=dtype, device=self.device)
        start = 0
        for one in tensors:
            end = start + one.shape[0]
            if not read_into(self.weights, one.name, stacked[start:end]):
                self.not_finite.add(one.name)
            start = end
        return stacked
