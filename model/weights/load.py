"""Builds a decoder from files: reads, packs and drops tensor after tensor, the largest first.

Peak memory is the kept weights plus, for each worker, one product in the dtype of its packing. The
largest products are packed first, while little other memory is in use. Weights in tiles are read
from `model/weights/packed_cache.py` instead, if an earlier start has packed the same files.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from model.architectures.arch import ArchSpec, TensorSpec, lengthened
from model.architectures.latent_transformer import LatentTransformer
from model.architectures.registry import declare_tensors
from model.architectures.transformer import Transformer, TransformerWeights
from model.cpu.library import CpuLibrary
from model.kv.arena import Arena
from model.ops import Ops
from model.weights.checkpoints.coded_matrix import CodedMatrix
from model.weights.file_content import FilesState
from model.weights.format_choice import choose_activation_bits, choose_format
from model.weights.gguf import ROPE_FACTORS
from model.weights.interface import WeightSource, read_into
from model.weights.linear import (
    Format,
    Linear,
    PlainLinear,
    head_format,
    pack,
    staging_dtype,
)
from model.weights.load_layer import load_layer
from model.weights.malloc import LARGE_BESIDE_TILES_BYTES, LARGE_BYTES, without_holes
from model.weights.open import open_weights
from model.weights.packed_cache import PackedCache, Recipe
from model.weights.packed_file import PackedError, PackedFile, Part
from model.weights.packing_digest import digest_of_packing
from model.weights.quantized_rows import form_of
from model.weights.round_integers import rounding_of
from model.weights.safetensors import SafetensorsWeights
from model.weights.source import ModelSource
from model.weights.tile_packer import CodePacker, TilePacker
from model.weights.tiled_linear import TILED_FORMATS, ActivationBits, TiledLinear
from model.weights.tiles import Tiles

#: Packs the matrices of a product, with a bias; None where it cannot.
CodedPacker: TypeAlias = Callable[[Sequence[CodedMatrix], Tensor | None], Linear | None]


def build_transformer(  # noqa: PLR0913 - named, and each is a decision of its own
    source: ModelSource,
    *,
    quantization: str,
    dtype: torch.dtype,
    device: torch.device,
    ops: Ops,
    progress: bool,
    activation_bits: str = "auto",
    max_positions: int | None = None,
    tiles: CpuLibrary | None = None,
    coded: CodedPacker | None = None,
    cache: PackedCache | None = None,
) -> Transformer:
    """Load a model onto `device`.

    `tiles`: pack weights of any of `TILED_FORMATS` for this library's products.
    `activation_bits`: auto, 8 or 16; of activations that meet integer weights.
    `coded`: packs the codes of quantized checkpoints, where `quantization` is auto.
    `cache`: has the tiles of earlier starts, and gets new ones to save.
    `dtype` is that of the activations, on a CPU float32; `max_positions`: the length of the longest
    request, where that is known. With `progress`, a bar on stderr where that is a terminal.
    Raises `ValueError` (`WeightsError`, `ArchError`, `FormatError` are ones) or `OSError`.
    """
    began_ns = time.time_ns()
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
    bits, bits_note = choose_activation_bits(activation_bits, fmt, tiles)
    packs_tiles = fmt in TILED_FORMATS and tiles is not None
    recipe = None
    if packs_tiles and weights.paths:
        files = FilesState.of(weights.paths)
        recipe = Recipe(digest_of_packing(arch, fmt), files, began_ns)
    make_loader = partial(
        _Loader,
        arch,
        weights,
        device,
        fmt,
        dtype,
        tiles if packs_tiles else None,
        activation_bits=bits,
        coded=coded if quantization == "auto" else None,
    )
    bar = tqdm(
        total=arch.num_layers + 1,
        desc=f"loading {source.name}",
        unit="layer",
        # None: only where stderr is a terminal.
        disable=None if progress else True,
    )
    notes: list[str] = []
    large_bytes = LARGE_BESIDE_TILES_BYTES if packs_tiles else LARGE_BYTES
    with without_holes(large_bytes), closing(bar):
        if cache is None or recipe is None:
            loader = make_loader()
            loaded = _load(loader, bar)
        else:
            loader, loaded, notes = _load_kept(make_loader, cache, recipe, bar)
    notes = [note, *filter(None, [bits_note]), *arch.notes, *notes, *loader.findings]
    kind = Transformer if arch.latent is None else LatentTransformer
    return kind(arch, loaded, ops, fmt, tuple(notes))


def _load_kept(
    make_loader: Callable[..., _Loader], cache: PackedCache, recipe: Recipe, bar: tqdm
) -> tuple[_Loader, TransformerWeights, list[str]]:
    """Read weights that an earlier start has packed; else pack them, and offer them to the cache.

    Also returns notes for the operator.
    """
    packed, notes = None, []
    try:
        packed = cache.find(recipe)
        if packed is not None:
            loader = make_loader(packed=packed)
            loaded = _load(loader, bar)
            packed.close()
            return loader, loaded, [f"weights packed by an earlier start: {packed.path}"]
    except PackedError as error:
        notes = [f"{error}: the weights were packed anew"]
        if packed is not None:
            cache.remove(packed)
        bar.reset()
    loader = make_loader()
    loaded = _load(loader, bar)
    cache.offer(recipe, loader.parts)
    return loader, loaded, notes


def _load(loader: _Loader, bar: tqdm) -> TransformerWeights:
    """Load the vocabulary and the layers side by side.

    Decoding and packing release the interpreter's lock, and each is single-threaded or too short
    to split, so one thread a layer makes loading fast.
    """
    num_layers = loader.arch.num_layers
    num_workers = min(torch.get_num_threads(), _MAX_WORKERS)
    with ThreadPoolExecutor(num_workers, "load", torch.set_num_threads, (1,)) as pool:
        vocabulary = pool.submit(loader.vocabulary)
        layers = [pool.submit(load_layer, loader, index) for index in range(num_layers)]
        vocabulary.add_done_callback(lambda _done: bar.update())
        for layer in layers:
            layer.add_done_callback(lambda _done: bar.update())
        try:
            embedding, lm_head = vocabulary.result()
            decoder_layers = tuple(layer.result() for layer in layers)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    final_norm = loader.norm("final_norm")
    loader.finish()
    return TransformerWeights(
        embedding=embedding,
        layers=decoder_layers,
        final_norm=final_norm,
        lm_head=lm_head,
        rope_factors=loader.rope_factors(),
        num_bytes=sum(loader.sizes_bytes),
    )


#: Each holds one layer's product, so more of them would raise peak memory.
_MAX_WORKERS = 4


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
    activation_bits: ActivationBits
    #: None: quantized matrices are widened.
    coded: CodedPacker | None = None
    #: Memory of each product in codes.
    coded_bytes: list[int] = field(default_factory=list)
    #: The parts, packed by an earlier start; None: they are made from `weights`.
    packed: PackedFile | None = None
    #: All parts, by name; of weights in tiles alone.
    parts: dict[str, Part] = field(default_factory=dict)
    arena: Arena = field(default_factory=Arena)
    #: Memory of each part that was loaded.
    sizes_bytes: list[int] = field(default_factory=list)
    #: Names of tensors with NaN or infinities in them.
    not_finite: set[str] = field(default_factory=set)
    #: Names of tensors whose product has no integers of its file, where these are kept.
    not_integers: set[str] = field(default_factory=set)
    #: Both, for the operator, when all are loaded.
    findings: list[str] = field(default_factory=list)
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
        lm_head = self.linear(head, head_format(self.fmt))
        if is_tied and isinstance(lm_head, TiledLinear):
            return lm_head.rows, lm_head
        if self.fmt == "own" and self.tiles is not None:
            part = self.part("embedding", lambda: self._packed_tiles("embedding", "own").part)
            tiled = TiledLinear(Tiles.from_part(part), self.tiles)
            self.sizes_bytes.append(tiled.weight_bytes)
            return tiled.rows, lm_head
        # 16 bits hold any embedding closely enough.
        kept_dtype = self.dtype if self.fmt == "none" else torch.float16
        return partial(_look_up, self.kept("embedding", kept_dtype)), lm_head

    def norm(self, target: str) -> Tensor:
        """Read a norm's weights, in float32 since they are small."""
        return self.kept(target, torch.float32, self.arch.norm_offset)

    def kept(self, target: str, dtype: torch.dtype, offset: float = 0.0) -> Tensor:
        """Read a tensor that is not packed, and add `offset`."""
        part = self.part(
            target, lambda: {"tensor": self._stacked(self.tensors[target], dtype).add_(offset)}
        )
        kept = part["tensor"]
        assert isinstance(kept, Tensor), "a tensor was kept"
        self.sizes_bytes.append(kept.nbytes)
        return kept

    def finish(self) -> None:
        """Record the findings about tensors, when all are loaded."""
        part = self.part("findings", lambda: {"text": "\n".join(self._findings())})
        self.findings = str(part["text"]).splitlines()

    def _findings(self) -> Iterator[str]:
        if num_coded := len(self.coded_bytes):
            yield f"{num_coded} products are computed from the codes of the checkpoint"
        if self.not_finite:
            yield f"weights that are not finite: {', '.join(sorted(self.not_finite))}"
        if self.not_integers:
            first, count = min(self.not_integers), len(self.not_integers)
            yield f"{count} tensors are widened to bf16, among them {self.weights.describe(first)}"

    def part(self, name: str, make: Callable[[], Part]) -> Part:
        """Return a part from the file of an earlier start, else `make` it.

        Raises `PackedError` if that file is damaged.
        """
        part = self.packed.read(name, self.arena) if self.packed else make()
        if self.tiles is not None:
            self.parts[name] = part
        return part

    def rope_factors(self) -> Tensor | None:
        """Read the divisors of rope's frequencies, if the file has any."""
        if ROPE_FACTORS not in self.weights.shapes:
            return None
        factors = torch.empty(self.weights.shapes[ROPE_FACTORS])
        read_into(self.weights, ROPE_FACTORS, factors)
        return factors

    def linear(self, target: str, fmt: Format) -> Linear:
        """Pack products that share their input as one, their rows one after another."""
        if linear := self._coded_linear(target, fmt):
            return linear
        if self.tiles is None:
            linear = pack(self._weight(target, fmt), self._bias(target, fmt), fmt)
        else:
            part = self.part(target, lambda: self._packed_tiles(target, fmt).part)
            linear = TiledLinear(Tiles.from_part(part), self.tiles, self.activation_bits)
        self.sizes_bytes.append(linear.weight_bytes)
        return linear

    def _packed_tiles(self, target: str, fmt: Format) -> Tiles:
        assert self.tiles is not None, "weights are packed in tiles"
        bias = self._bias(target, fmt)
        if fmt == "own" and (tiles := self._own_tiles(target, bias)):
            return tiles
        matrices = self._matrices(target)
        part = target.rpartition(".")[2]
        rounding = rounding_of(fmt, part) if fmt in {"int8", "int4"} else None
        shape = sum(one.shape[0] for one in matrices), matrices[0].shape[1]
        packer = TilePacker(shape, rounding, self.arena, self.tiles)
        for one in matrices:
            if not packer.add(self.weights.blocks(one.name)):
                self.not_finite.add(one.name)
        return packer.tiles(bias)

    def _own_tiles(self, target: str, bias: Tensor | None) -> Tiles | None:
        """Pack the integers of a product, if all of its parts are kept in integers that fit."""
        assert self.tiles is not None, "weights are packed in tiles"
        matrices = self._matrices(target)
        parts = [rows for one in matrices if (rows := self.weights.integers(one.name))]
        firsts = [next(rows) for rows in parts]
        form = form_of(firsts) if len(parts) == len(matrices) else None
        if form is None:
            self.not_integers.update(one.name for one in matrices)
            return None
        shape = sum(one.shape[0] for one in matrices), firsts[0].codes.shape[1]
        packer = CodePacker(shape, form, self.arena, self.tiles)
        for one, first, rest in zip(matrices, firsts, parts, strict=True):
            if not packer.add(chain([first], rest)):
                self.not_finite.add(one.name)
        return packer.tiles(bias)

    def _coded_linear(self, target: str, fmt: Format) -> Linear | None:
        """Pack the codes of a product; None where the packer cannot take all its matrices."""
        if self.coded is None or not isinstance(self.weights, SafetensorsWeights):
            return None
        found = [self.weights.coded(one.name) for one in self._matrices(target)]
        parts = [part for part in found if part is not None and part.is_finite()]
        complete = len(parts) == len(found)
        linear = self.coded(parts, self._bias(target, fmt)) if complete else None
        if linear is not None:
            self.coded_bytes.append(linear.weight_bytes)
            self.sizes_bytes.append(linear.weight_bytes)
        return linear

    def _weight(self, target: str, fmt: Format) -> Tensor:
        return self._stacked(self._matrices(target), staging_dtype(fmt, self.dtype))

    def _bias(self, target: str, fmt: Format) -> Tensor | None:
        biases = [one for one in self.tensors[target] if len(one.shape) == 1]
        return self._stacked(biases, staging_dtype(fmt, self.dtype)) if biases else None

    def _matrices(self, target: str) -> list[TensorSpec]:
        return [one for one in self.tensors[target] if len(one.shape) > 1]

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
