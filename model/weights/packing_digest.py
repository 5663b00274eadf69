"""Computes a digest of everything that packed weights depend on, but for the weights themselves."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from model.architectures.arch import ArchSpec
from model.architectures.registry import declare_tensors
from model.weights.file_content import sha256_of

#: The code between a file and tiles; that of the kernels defines the layout of a tile.
_CODE = ("architectures/*.py", "formats/*.py", "weights/*.py", "cpu/csrc/*.h", "cpu/csrc/*.cpp")
#: Packages that decode and round.
_PACKAGES = ("gguf", "torch")


def digest_of_packing(arch: ArchSpec, fmt: str) -> str:
    """Return the digest for a model's tensors in a linear format, packed by this code."""
    tensors = {name: asdict(one) for name, one in declare_tensors(arch).items()}
    # The whole of `arch` would not do: the length of the longest request is in it.
    values = [arch.head_dim, arch.is_tied, arch.norm_offset]
    return sha256_of([tensors, values, fmt, _digest_of_code()])


@functools.cache
def _digest_of_code() -> str:
    digest = hashlib.sha256()
    model = Path(__file__).parents[1]
    for path in sorted(path for pattern in _CODE for path in model.glob(pattern)):
        digest.update(str(path.relative_to(model)).encode() + b"\0" + path.read_bytes())
    for package in _PACKAGES:
        digest.update(f"{package} {version(package)}\n".encode())
    return digest.hexdigest()
