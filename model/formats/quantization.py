"""The types that describe a quantized checkpoint: which matrices, in which layout. Free of torch.

A quantized matrix is saved in parts: codes (small integers or 8-bit floats), scales, zero points.
Knows nothing of config.json (`model/architectures/quantization.py` reads it) or of the parts'
bytes (`model/weights/checkpoints/`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

#: `packed`: integers in words; `integers` and `floats`: a byte a code, under the plain name.
Layout: TypeAlias = Literal["awq", "gptq", "gptq_v2", "packed", "integers", "floats"]

#: The modules that are tables of rows; all others of a dense decoder multiply.
_EMBEDDINGS = ("embed_tokens",)


@dataclass(frozen=True, slots=True)
class MatrixFormat:
    """How a quantized matrix is saved: value = scale * (code - zero point)."""

    layout: Layout
    #: Of a code: 4 or 8.
    bits: int
    #: Outputs and inputs that share a scale; None: all of them.
    block: tuple[int | None, int | None]
    #: Whether all zero points are the middle of the codes.
    is_symmetric: bool = True


@dataclass(frozen=True, slots=True)
class ModuleGroup:
    """The modules that share a format."""

    #: Names, patterns behind `re:`, or classes (`Linear`, `Embedding`).
    targets: tuple[str, ...]
    #: None: these modules are not quantized.
    format: MatrixFormat | None


@dataclass(frozen=True, slots=True)
class Quantization:
    """The formats of a checkpoint's matrices."""

    #: Of `quantization_config`, for messages.
    method: str
    groups: tuple[ModuleGroup, ...]
    #: Modules that no group has, written as targets are.
    ignored: tuple[str, ...] = ()
    #: For the operator.
    notes: tuple[str, ...] = ()

    def format_of(self, module: str) -> MatrixFormat | None:
        """Return the format of a module; None: it is not quantized.

        A name has precedence over a pattern, and a pattern over a class, as in compressed-tensors.
        """
        if any(_rank(module, one) is not None for one in self.ignored):
            return None
        found = [
            (rank, target, group.format)
            for group in self.groups
            for target in group.targets
            if (rank := _rank(module, target)) is not None
        ]
        return min(found, key=lambda one: one[:2])[2] if found else None


def _rank(module: str, target: str) -> int | None:
    """Return how closely a target names the module, 0 the closest; None: not at all."""
    if target == module:
        return 0
    if target.startswith("re:"):
        return 1 if re.match(target.removeprefix("re:"), module) else None
    class_name = "Embedding" if module.endswith(_EMBEDDINGS) else "Linear"
    return 2 if target == class_name else None
