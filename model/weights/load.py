"""From files to a decoder: reads, packs and drops tensor after tensor, the largest first.

Peak memory is what is kept plus, for each worker, one product in the dtype its packing wants; the
largest products are packed while little else is there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

from model.architectures.arch import ArchSpec, lengthened
from model.architectures.transformer import (
    DecoderLayer,
    Embedding,
    PlainEmbedding,
    Transformer,
    TransformerWeights,
)
from model.cpu.library import CpuLibrary
from model.kv.arena import Arena
from model.ops import Ops
from model.weights.gguf import ROPE_FACTORS
from model.weights.interface import WeightSource, read_into
from model.weights.linear import (
    Format,
    Linear,
    PlainLinear,
    choose_format,
    head_format,
    pack,
    staging_dtype,
)
from model.weights.open import open_weights
from model.weights.source import ModelSource
from model.weights.tiled_linear import TILED_FORMATS, TiledEmbedding, TiledLinear, Tiles


def build_transformer(
    source: ModelSource,
    *,
    quantization: str,
    dtype: torch.dtype,
    device: torch.device,
    ops: Ops,
    progress: bool,
    max_positions: int | None = None,
    tiles: CpuLibrary | None = None,
) -> Transformer:
    """Load a model onto `device`.

    `tiles`: pack bf16 and int8 weights for this library's products instead of torch's.
    `dtype` is that of the activations, on a CPU float32; `max_positions`: as long as requests will
    be at most, where that is known. With `progress`, a bar on stderr where that is a terminal.
    Raises `ValueError` (`WeightsError`, `ArchError`, `FormatError` are ones) or `OSError`.
    """
    fmt, note = choose_format(quantization, device, dtype, has_tiles=tiles is not None)
    arch, weights = open_weights(source)
    arch = lengthened(arch, max_positions)
    packs_tiles = fmt in TILED_FORMATS
    loader = _Loader(arch, weights, device, fmt, dtype, tiles if packs_tiles else None)
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
    if loader.not_finite:
        notes.append(f"weights that are not finite: {', '.join(sorted(loader.not_finite))}")
    return Transformer(arch, loaded, ops, fmt, tuple(notes))


def _load(loader: _Loader, bar: tqdm) -> TransformerWeights:
    """Load the vocabulary and the layers side by side.

    Decoding and packing release the interpreter's lock, and each is single-threaded or too short
    to share out, so threads by layer are what makes loading fast.
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
        final_norm=loader.kept("model.norm.weight"),
        lm_head=lm_head,
        rope_factors=loader.rope_factors(),
        is_head_shared=loader.is_head_shared,
    )


#: Eight-bit tiles of 64 inputs that share a scale. A layer multiplies whole prompts, where each
#: scale costs time; the logits, of few rows, feel the rounding most (docs/performance.md).
_LAYER_SCALE_TILES, _HEAD_SCALE_TILES = 2, 1
#: Each has a layer's product in hand, so many of them would cost peak memory.
_MAX_WORKERS = 4
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@contextmanager
def _without_holes() -> Iterator[None]:
    """Have malloc take large blocks from the system one by one, and give them back one by one.

    Otherwise weights that are kept settle in the room of temporaries that are not, and the next
    temporary takes new room: half as much again as the weights, measured. Afterwards malloc has
    the limits it would have found by itself; where it is not glibc's, nothing is done.
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


class _Loader:
    """Reads and packs parts of a model; its methods may run side by side."""

    def __init__(
        self,
        arch: ArchSpec,
        weights: WeightSource,
        device: torch.device,
        fmt: Format,
        dtype: torch.dtype,
        tiles: CpuLibrary | None,
    ) -> None:
        self.arch = arch
        #: Whether the embedding is also the product that gives the logits.
        self.is_head_shared = arch.is_tied and (fmt == "none" or tiles is not None)
        #: Names of tensors with NaN or infinities in them.
        self.not_finite: set[str] = set()
        #: None: the weights are not packed in tiles.
        self._tiles = tiles
        self._arena = Arena()
        self._weights = weights
        self._device = device
        self._fmt = fmt
        self._dtype = dtype

    def vocabulary(self) -> tuple[Embedding, Linear]:
        """Load the two largest: the product first, since its packing needs the most room."""
        name = "model.embed_tokens.weight"
        # 16 bits hold any embedding closely enough; looked-up rows are made float32 again.
        kept_dtype = self._dtype if self._fmt == "none" else torch.float16
        if self.is_head_shared and self._tiles is None:
            embedding = self.kept(name, kept_dtype)
            return PlainEmbedding(embedding), PlainLinear(embedding, None)
        head = "model.embed_tokens" if self.arch.is_tied else "lm_head"
        lm_head = self._linear([head], head_format(self._fmt), scale_tiles=_HEAD_SCALE_TILES)
        if self.is_head_shared:
            assert isinstance(lm_head, TiledLinear), "packed in tiles"
            return TiledEmbedding(lm_head.tiles), lm_head
        return PlainEmbedding(self.kept(name, kept_dtype)), lm_head

    def layer(self, index: int) -> DecoderLayer:
        """Load a layer, its largest product first."""
        at = f"model.layers.{index}."
        attention, mlp = f"{at}self_attn.", f"{at}mlp."
        has_qk_norm, fmt = self.arch.has_qk_norm, self._fmt
        return DecoderLayer(
            gate_up=self._linear([f"{mlp}gate_proj", f"{mlp}up_proj"], fmt),
            down=self._linear([f"{mlp}down_proj"], fmt),
            qkv=self._linear([f"{attention}{one}_proj" for one in "qkv"], fmt),
            o=self._linear([f"{attention}o_proj"], fmt),
            input_norm=self.kept(f"{at}input_layernorm.weight"),
            post_norm=self.kept(f"{at}post_attention_layernorm.weight"),
            q_norm=self.kept(f"{attention}q_norm.weight") if has_qk_norm else None,
            k_norm=self.kept(f"{attention}k_norm.weight") if has_qk_norm else None,
        )

    def kept(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Read a tensor that stays as it is; norms in float32, since they are small."""
        return self._stacked([name], dtype)

    def rope_factors(self) -> Tensor | None:
        """Read what the file divides rope's frequencies by, where it does."""
        if ROPE_FACTORS not in self._weights.shapes:
            return None
        factors = torch.empty(self._weights.shapes[ROPE_FACTORS])
        read_into(self._weights, ROPE_FACTORS, factors)
        return factors

    def _linear(
        self, parts: Sequence[str], fmt: Format, *, scale_tiles: int = _LAYER_SCALE_TILES
    ) -> Linear:
        """Pack products that share their input as one, their rows one after another."""
        staging = staging_dtype(fmt, self._dtype)
        biases = [f"{part}.bias" for part in parts]
        bias = self._stacked(biases, staging) if biases[0] in self._weights.shapes else None
        weight = self._stacked([f"{part}.weight" for part in parts], staging)
        if self._tiles is None:
            return pack(weight, bias, fmt)
        if self._fmt != "int8":
            scale_tiles = 0
        tiles = Tiles(weight, bias, scale_tiles=scale_tiles, arena=self._arena)
        return TiledLinear(tiles, self._tiles)

    def _stacked(self, names: Sequence[str], dtype: torch.dtype) -> Tensor:
        shapes = [self._weights.shapes[name] for name in names]
        num_rows = sum(shape[0] for shape in shapes)
        stacked = torch.empty(num_rows, *shapes[0][1:], dtype=dtype, device=self._device)
        start = 0
        for name, shape in zip(names, shapes, strict=True):
            if not read_into(self._weights, name, stacked[start : start + shape[0]]):
                self.not_finite.add(name)
            start += shape[0]
        return stacked
