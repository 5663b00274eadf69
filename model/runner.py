"""Steps into tokens with torch: brings rows to the device, runs the decoder, samples.

Knows nothing of why a row is in a step, of requests or of how pages came to be shared. On CUDA
nothing here waits for the device but `Flight.wait`, once a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention.interface import AttentionBackend
from model.graphs import DecodeGraphs
from model.interface import ModelInfo, StepInput, StepOutput
from model.kv_pool import KVPool
from model.packing import PackedStep, Packer
from model.sampler import Draft, Sampler
from model.transformer import Decoder


@dataclass(frozen=True, slots=True)
class _Sampling:
    """A step that samples, on its way."""

    draft: Draft

    @torch.inference_mode()
    def wait(self) -> StepOutput:
        return self.draft.finish()


@dataclass(frozen=True, slots=True)
class _Prefill:
    """A step that samples nothing; on CUDA it may still be under way, and nobody need wait."""

    def wait(self) -> StepOutput:
        return StepOutput([])


class TorchRunner:
    """See `ModelRunner`: one decoder, one pool of pages, one attention backend, one sampler."""

    def __init__(
        self,
        *,
        info: ModelInfo,
        decoder: Decoder,
        attention: AttentionBackend,
        pool: KVPool,
        sampler: Sampler,
        max_num_seqs: int,
        graphs: DecodeGraphs | None = None,
        max_flights: int = 1,
    ) -> None:
        self._info = info
        self._decoder = decoder
        self._attention = attention
        self._pool = pool
        self._sampler = sampler
        self._device = pool.device
        self._graphs = graphs
        self._max_flights = max_flights
        self._packer = Packer(max_num_seqs, info.max_model_len, info.page_size)
        #: What the step before sampled, if it did.
        self._newest: Draft | None = None

    @property
    def info(self) -> ModelInfo:
        """See `ModelRunner`."""
        return self._info

    @property
    def max_flights(self) -> int:
        """See `ModelRunner`: two on a GPU; a CPU computes while it is asked to."""
        return self._max_flights

    @torch.inference_mode()
    def launch(self, step: StepInput) -> _Sampling | _Prefill:
        """See `ModelRunner`."""
        if self._newest is not None:
            self._newest.settle()
        for start in step.started:
            self._sampler.start(start)
        if step.copies:
            self._pool.copy_pages(step.copies)
        hidden = self._compute(self._packer.pack(step))
        if not step.sample_rows:
            self._newest = None
            return _Prefill()
        self._newest = self._sampler.begin(
            self._decoder.logits(hidden),
            [step.slots[row] for row in step.sample_rows],
            [step.starts[row] + step.counts[row] for row in step.sample_rows],
        )
        return _Sampling(self._newest)

    def _compute(self, packed: PackedStep) -> Tensor:
        """Return the hidden states of the tokens that are sampled after."""
        graphs = self._graphs
        padded = graphs.pad(packed) if graphs is not None else None
        step = (padded or packed).on(self._device)
        if len(packed.pending):
            assert self._newest is not None, "a token is pending that no step samples"
            newest = self._newest.tokens[step.pending_from]
            step.token_ids.index_copy_(0, step.pending, newest)
        if graphs is not None and padded is not None:
            hidden = graphs.run(step)
        else:
            self._attention.plan(step.batch)
            positions = step.batch.positions
            hidden = self._decoder.forward(step.token_ids, positions, self._attention)
        if len(packed.sampled) < hidden.shape[0]:
            hidden = hidden[step.sampled]
        return hidden

    def close(self) -> None:
        """See `ModelRunner`. Memory goes with the process."""
