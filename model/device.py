"""The device, its operations and the threads that a runner is built for. Needs torch.

Knows nothing of models or of pages.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial

import torch

from configs.schema import ModelSection
from model.cpu.library import CpuLibrary, load_cpu_library
from model.cpu.ops import CpuOps
from model.cpu.quota import num_usable_cores, quota_cores
from model.cuda import ops as gpu_ops
from model.cuda.coded_linear import pack_codes
from model.cuda.ops import GpuOps
from model.ops import Ops, TorchOps
from model.weights.load import CodedPacker


@dataclass(frozen=True, slots=True)
class Device:
    """Where the model is computed, in which dtype and by which operations."""

    device: torch.device
    dtype: torch.dtype
    ops: Ops
    notes: tuple[str, ...] = ()
    #: Computes whole layers, if there is one.
    library: CpuLibrary | None = None
    #: Packs the codes of quantized checkpoints, where products with these run.
    coded: CodedPacker | None = None


@dataclass(frozen=True, slots=True)
class Threads:
    """The threads of a step."""

    number: int
    #: Whether fewer may compute while other processes use the cores: not where they are stated.
    may_shrink: bool
    notes: tuple[str, ...] = ()


def choose_threads(config: ModelSection) -> Threads:
    """Return the stated number of threads, or one for each core that may be used."""
    if config.threads is not None:
        return Threads(config.threads, may_shrink=False)
    num_cores, quota = len(os.sched_getaffinity(0)), quota_cores()
    number = num_usable_cores(num_cores, quota)
    if number == num_cores:
        return Threads(number, may_shrink=True)
    note = (
        f"{number} threads for {num_cores} cores: the control group's CPU quota is {quota:g} cores"
    )
    return Threads(number, may_shrink=True, notes=(note,))


def choose_device(config: ModelSection) -> Device:
    """Return the stated device, or a GPU if there is one; `ValueError` naming the setting."""
    name = config.device
    stated = None if config.dtype == "auto" else getattr(torch, config.dtype)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but torch finds no GPU here")
    device = torch.device(name)
    if name == "cuda":
        dtype = stated or torch.bfloat16
        if reason := gpu_ops.why_not():
            note = f"fused operations are not available ({reason}); torch's are slower"
            return Device(device, dtype, TorchOps(), (note,))
        coded = partial(pack_codes, dtype=dtype, device=device)
        return Device(device, dtype, GpuOps(), coded=coded)
    dtype = stated or torch.float32
    library = load_cpu_library()
    if isinstance(library, str):
        note = f"compiled CPU operations are not available ({library}); torch's are slower"
        return Device(device, dtype, TorchOps(), (note,))
    return Device(device, dtype, CpuOps(library), library.notes, library)
