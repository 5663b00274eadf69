"""A text on pages of its own, read and kept by a policy of keys: for `bench/kv_variants.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cache.selection import Scoring, Selection
from cache.view import FULL_VIEW, View
from configs.kv_policy import KVPolicy
from model.architectures.transformer import Transformer
from model.attention.interface import AttentionSpec, BackendOffer
from model.interface import SamplingParams, SlotStart, StepInput
from model.key_selection import KeySelections
from model.kv.pool import KVPool
from model.packing import Packer


class PolicyText:
    """See `PagedText`. By a policy by score, keys are dropped as behind a prompt of one token."""

    def __init__(
        self,
        decoder: Transformer,
        spec: AttentionSpec,
        offer: BackendOffer,
        policy: KVPolicy,
        max_tokens: int,
    ) -> None:
        page_size = offer.default_page_size
        self._decoder = decoder
        self._pages = list(range(-(-max_tokens // page_size)))
        pool = KVPool(spec.layout(page_size), len(self._pages), spec.device)
        self._attention = offer.build(spec, pool)
        self._packer = Packer(1, max_tokens, page_size)
        self._selections = KeySelections(spec, pool)
        view, self._selection = FULL_VIEW, None
        if policy.is_by_score:
            scoring: Scoring = "all" if policy.type == "h2o" else "window"
            self._selection = Selection(
                policy.window, policy.capacity, policy.fusion, scoring=scoring
            )
        else:
            view = View(policy.sinks, policy.window)
        start = SlotStart(0, SamplingParams(0), [], view=view, selection=self._selection)
        self._selections.start(0, self._selection)
        self._started = [start]
        self.num_tokens = 0

    def append(self, token_ids: Sequence[int]) -> Tensor:
        """Compute the next tokens; return their hidden states `[tokens, hidden]`."""
        hidden, rest = list[Tensor](), list(token_ids)
        while rest:
            count, num_dropped = len(rest), 0
            if self._selection is not None:
                num_dropped = self._selection.num_dropped(self.num_tokens, 1)
                count = min(count, self._selection.next_point(self.num_tokens, 1) - self.num_tokens)
            hidden.append(self._step(rest[:count], num_dropped))
            rest = rest[count:]
        return torch.cat(hidden)

    def _step(self, token_ids: list[int], num_dropped: int) -> Tensor:
        dropped = {0: num_dropped} if num_dropped else {}
        columns = [self.num_tokens], [len(token_ids)], [0], [self._pages]
        step = StepInput(token_ids, *columns, [], started=self._started, dropped=dropped)
        if dropped and self._selections.has_to_drop(0, num_dropped):
            pages = torch.from_numpy(self._packer.take_table(0)).long()
            self._selections.drop(0, pages, pages, num_dropped)
        device_step = self._packer.pack(step).on(torch.device("cpu"))
        batch = device_step.batch
        self._attention.plan(batch)
        copy = self._selections.copy_of(step)
        hidden = self._decoder.forward(
            device_step.token_ids, batch.positions, self._attention, batch.views, copy
        )
        if copy is not None:
            self._selections.note(step, copy)
        self._started = []
        self.num_tokens += len(token_ids)
        return hidden

    def rewind(self, num_tokens: int) -> None:
        """Drop all but the first tokens. Keys that were dropped by their scores are gone."""
        assert self._selection is None, "keys behind a compaction point are gone"
        self.num_tokens = num_tokens
