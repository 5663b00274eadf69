"""The distance of each format from float32: `python bench/divergence.py [MODEL] [FORMAT...]`.

Prints the mean KL divergence of the next token's distribution, and how often both have the same
likeliest token. The texts are 512 tokens of prose (server/text/prose.txt) and of four pages of
docs/.

With `--shuffled` the hidden and the inner dimensions are in a random order. That is the same model,
but its groups of inputs are not those of the file. So a file of integers stands in for the floating
weights that it was made from: rounding them again is not free.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from model import build
from model.architectures.arch import ArchSpec
from model.attention import reference
from model.cpu.library import CpuLibrary, load_cpu_library
from model.cpu.ops import CpuOps
from model.kv.format import float_format
from model.kv_proof import PagedText
from model.ops import TorchOps
from model.weights import load
from model.weights.interface import WeightSource
from model.weights.linear import Format
from model.weights.open import open_weights
from model.weights.source import ModelSource
from server.text.load import load_text
from server.text.prose import PROSE

FORMATS = tuple(one for one in get_args(Format) if one != "none")
#: Beside the prose.
PAGES = tuple(
    Path(__file__).parents[1] / "docs" / f"{name}.md"
    for name in ("architecture", "operations", "api", "performance")
)
TEXT_TOKENS = 512
CPU = torch.device("cpu")


class Shuffled:
    """See `WeightSource`: a Llama's weights, floating, with both dimensions in another order."""

    own_bits = ""
    paths: tuple[Path, ...] = ()

    def __init__(self, source: WeightSource, arch: ArchSpec) -> None:
        self._source, self.shapes = source, source.shapes
        generator = torch.Generator().manual_seed(0)
        self._hidden = torch.randperm(arch.hidden_size, generator=generator)
        self._inner = torch.randperm(arch.layers[0].mlp.intermediate_size, generator=generator)

    def describe(self, name: str) -> str:
        """See `WeightSource`."""
        return self._source.describe(name)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """See `WeightSource`."""
        weight = torch.cat([block.float() for block in self._source.blocks(name)])
        module = name.split(".")[-2]
        if module in {"o_proj", "down_proj"} or "norm" in module:
            weight = weight[self._hidden]
        else:
            weight = weight[:, self._hidden]
        if module in {"gate_proj", "up_proj"}:
            weight = weight[self._inner]
        if module == "down_proj":
            weight = weight[:, self._inner]
        yield weight

    def integers(self, name: str) -> None:
        """See `WeightSource`."""


def _open_shuffled(source: ModelSource) -> tuple[ArchSpec, WeightSource]:
    arch, weights = open_weights(source)
    return arch, Shuffled(weights, arch)


class Model:
    """A model with one format of the weights."""

    def __init__(self, source: ModelSource, quantization: str, library: CpuLibrary | None) -> None:
        """`quantization`: a format, perhaps with the bits of activations behind a colon."""
        quantization, _, activation_bits = quantization.partition(":")
        self._transformer = load.build_transformer(
            source,
            quantization=quantization,
            activation_bits=activation_bits or "auto",
            dtype=torch.float32,
            device=CPU,
            ops=CpuOps(library) if library else TorchOps(),
            progress=False,
            tiles=library,
        )
        self.weights_bytes = self._transformer.weights.num_bytes

    def log_probabilities(self, token_ids: Sequence[int]) -> Tensor:
        """Return those of the token after each, `[tokens, vocabulary]`. Keys are float32."""
        spec = self._transformer.attention_spec(float_format(torch.float32))
        text = PagedText(self._transformer, spec, reference.offer(spec), len(token_ids))
        return self._transformer.logits(text.append(token_ids)).log_softmax(-1)


@torch.inference_mode()
def main() -> None:
    """Print a line for each format."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("formats", nargs="*", default=FORMATS)
    parser.add_argument("--shuffled", action="store_true")
    arguments = parser.parse_args()
    source = build.resolve_source(arguments.model)
    tokenizer = load_text(source.path).tokenizer
    texts = [
        tokenizer.encode(text, add_special_tokens=False)[:TEXT_TOKENS]
        for text in (PROSE, *(page.read_text() for page in PAGES))
    ]
    found = load_cpu_library()
    library = None if isinstance(found, str) else found
    exact = Model(source, "none", library)
    expected = [exact.log_probabilities(text) for text in texts]
    if arguments.shuffled:
        load.open_weights = _open_shuffled  # type: ignore[attr-defined] # a stand-in
    for quantization in arguments.formats:
        began = time.perf_counter()
        try:
            model = Model(source, quantization, library)
        except ValueError as reason:
            sys.stdout.write(f"{quantization:7} not here: {reason}\n")
            continue
        loaded_s = time.perf_counter() - began
        _report(quantization, model, loaded_s, texts, expected)


def _report(
    quantization: str,
    model: Model,
    loaded_s: float,
    texts: Sequence[Sequence[int]],
    expected: Sequence[Tensor],
) -> None:
    divergences, same = [], []
    for text, exact in zip(texts, expected, strict=True):
        kept = model.log_probabilities(text)
        divergences.append(float((exact.exp() * (exact - kept)).sum(-1).mean()))
        same.append(float((exact.argmax(-1) == kept.argmax(-1)).float().mean()))
    pages = divergences[1:]
    sys.stdout.write(
        f"{quantization:7} {model.weights_bytes / 2**20:6.0f} MiB  KL {divergences[0]:.1e} prose, "
        f"{sum(pages) / len(pages):.1e} pages  same likeliest token "
        f"{100 * sum(same) / len(same):.2f} %  loaded in {loaded_s:.1f} s\n"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
