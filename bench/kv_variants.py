"""Formats and views of keys and values, measured on a decoder with exact weights.

For `bench/quality.py` and `bench/needle.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from policy_text import PolicyText
from torch import Tensor

from configs.kv_policy import KVPolicy, parse_kv_policy
from configs.schema import ModelSection
from model import build
from model.architectures.transformer import ServedDecoder, Transformer
from model.attention.registry import choose_backend
from model.cpu.library import load_cpu_library
from model.cpu.ops import CpuOps
from model.implementation import build_decoder
from model.key_selection import why_not
from model.kv.format import KV_FORMATS
from model.kv_proof import PagedText
from model.ops import TorchOps

#: Tokens of a step: a chunk, as the server has it.
STEP_TOKENS = 512
#: The reference of the others.
FULL_FORMAT = "float32"


@dataclass(frozen=True, slots=True)
class Variant:
    """A format of the pages, and the policy of the keys in them."""

    kv_format: str
    policy: KVPolicy = field(default_factory=KVPolicy)

    def __str__(self) -> str:
        return self.kv_format if self.policy == KVPolicy() else f"{self.kv_format} {self.policy}"


class Pages:
    """A decoder whose keys and values are kept in one variant."""

    def __init__(self, decoder: ServedDecoder, variant: Variant, backend: str) -> None:
        """Raises `ValueError` if the attention backend does not have the variant."""
        self._decoder, self._policy = decoder, variant.policy
        self._spec = decoder.attention_spec(KV_FORMATS[variant.kv_format])
        self._offer = choose_backend(backend, self._spec)
        if self._policy.type == "full":
            return
        if not self._offer.reads_views:
            raise ValueError(f"attention backend {self._offer.name} reads all keys")
        if self._policy.is_by_score and (reason := why_not(self._spec)):
            raise ValueError(f"{self._policy}: {reason}")

    @property
    def bytes_per_token(self) -> int:
        layout = self._spec.layout(self._offer.default_page_size)
        return layout.bytes_per_page // layout.page_size

    @property
    def backend(self) -> str:
        return self._offer.name

    def text(self, max_tokens: int) -> PagedText | PolicyText:
        if self._policy.type == "full":
            return PagedText(self._decoder, self._spec, self._offer, max_tokens)
        assert isinstance(self._decoder, Transformer), "see exact_decoder"
        return PolicyText(self._decoder, self._spec, self._offer, self._policy, max_tokens)


def append(text: PagedText | PolicyText, token_ids: Sequence[int]) -> Tensor:
    """Compute tokens in steps of the server's size; return their hidden states."""
    starts = range(0, len(token_ids), STEP_TOKENS)
    return torch.cat([text.append(token_ids[at : at + STEP_TOKENS]) for at in starts])


def exact_decoder(model: str, quantization: str) -> ServedDecoder:
    """Load a model on the CPU with activations in float32."""
    found = load_cpu_library()
    library = None if isinstance(found, str) else found
    return build_decoder(
        build.resolve_source(model),
        ModelSection(model=model, quantization=quantization),  # type: ignore[arg-type] # parsed
        dtype=torch.float32,
        device=torch.device("cpu"),
        ops=CpuOps(library) if library else TorchOps(),
        tiles=library,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of both scripts."""
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--kv", type=_formats, metavar="FORMAT[,FORMAT]", help="formats of pages")
    parser.add_argument(
        "--view",
        type=_policy,
        metavar="window:W|sinks:S+W|morph:W/C",
        help="of all formats, as --kv-policy of the server",
    )
    parser.add_argument("--quantization", default="none", help="of the weights (none: float32)")
    parser.add_argument("--attention-backend", default="auto")


def variants(arguments: argparse.Namespace) -> list[Variant]:
    """Return the variants of the command line; the reference is not among them."""
    kv_formats: list[str] = arguments.kv or []
    if arguments.view is None:
        return [Variant(kv_format) for kv_format in kv_formats if kv_format != FULL_FORMAT]
    return [Variant(kv_format, arguments.view) for kv_format in kv_formats or [FULL_FORMAT]]


def _formats(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in KV_FORMATS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(KV_FORMATS)}")
    return names


def _policy(text: str) -> KVPolicy:
    try:
        return parse_kv_policy(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
