"""Chooses between Octavo's own decoder and that of `transformers` on Octavo's pages.

Knows nothing of either; the choice depends on which of them supports the architecture.
"""

from __future__ import annotations

from typing import Literal

import torch

from configs.schema import ModelSection
from model.architectures.arch import ArchError, BadValueError
from model.architectures.read_arch import read_arch
from model.architectures.transformer import ServedDecoder
from model.cpu.library import CpuLibrary
from model.ops import Ops
from model.weights.interface import QuantizedWeightsError, WeightsError
from model.weights.load import CodedPacker, build_transformer
from model.weights.packed_cache import PackedCache
from model.weights.source import ModelSource


def choose_implementation(
    source: ModelSource, asked: str
) -> tuple[Literal["octavo", "transformers"], str]:
    """Return the implementation, and the reason if it is not Octavo's own.

    Raises `ValueError` if `asked` is not possible, `OSError` if files cannot be read.
    """
    if source.kind == "gguf" and asked == "transformers":
        raise ValueError("model_impl transformers reads folders of safetensors, and not .gguf")
    if source.kind == "gguf" or asked == "octavo":
        return "octavo", ""
    if asked == "transformers":
        return "transformers", "as asked"
    try:
        read_arch(source)
    except BadValueError:
        raise
    except ArchError as reason:
        return "transformers", str(reason)
    return "octavo", ""


def build_decoder(
    source: ModelSource,
    config: ModelSection,
    *,
    dtype: torch.dtype,
    device: torch.device,
    ops: Ops,
    tiles: CpuLibrary | None,
    coded: CodedPacker | None = None,
    cache: PackedCache | None = None,
) -> ServedDecoder:
    """Load a model with either implementation. Raises `ValueError` with the reason."""
    chosen, reason = choose_implementation(source, config.model_impl)
    if chosen == "octavo":
        try:
            return build_transformer(
                source,
                quantization=config.quantization,
                activation_bits=config.activation_bits,
                dtype=dtype,
                device=device,
                ops=ops,
                progress=True,
                max_positions=config.max_model_len,
                tiles=tiles,
                coded=coded,
                cache=cache,
            )
        except QuantizedWeightsError:
            raise
        except WeightsError as error:
            if config.model_impl == "octavo" or source.kind == "gguf":
                raise
            # That library supports more ways to save a model.
            reason = str(error)
    if config.activation_bits == "8":
        raise ValueError(
            "activation_bits 8 is for what Octavo computes itself, not for transformers. Octavo's "
            f"own code: {reason}"
        )
    if config.quantization not in {"auto", "none"}:
        raise ValueError(
            f"quantization {config.quantization} is for what Octavo computes itself; with "
            "transformers use none, and --dtype bfloat16 for half the weights. Octavo's own code: "
            f"{reason}"
        )
    return _build_hf(source, config, dtype, device, reason)


def _build_hf(
    source: ModelSource,
    config: ModelSection,
    dtype: torch.dtype,
    device: torch.device,
    reason: str,
) -> ServedDecoder:
    try:
        from model.hf.decoder import load_hf_decoder  # noqa: PLC0415 - importing transformers takes seconds
    except ImportError as error:
        raise ValueError(
            f"this model is computed by the package transformers ({reason}), which cannot be "
            f"imported ({error}); `make install`, or pip install transformers, puts it there"
        ) from error
    try:
        decoder = load_hf_decoder(
            source, dtype=dtype, device=device, max_positions=config.max_model_len
        )
    except (ArchError, OSError) as error:
        raise ArchError(f"{error}. Octavo's own code: {reason}") from error
    decoder.notes = (f"not Octavo's own code: {reason}", *decoder.notes)
    return decoder
