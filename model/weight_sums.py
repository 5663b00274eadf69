"""The sums of the weights that all queries so far gave each stored key, as H2O scores keys.

See arXiv:2306.14048. A second pass over the keys of a step, in torch and in parts. Knows nothing of
pages, nor of which keys are kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

#: Weights of so many queries and keys are in memory at once, of all heads.
_QUERIES, KEYS = 64, 1024


class WeightSums:
    """The sums of one layer of a sequence."""

    def __init__(self, num_kv_heads: int, scale: float) -> None:
        self._scale = scale
        #: float64 `[kv_heads, keys]`: so the cuts of a text into steps do not show in them.
        self.sums = torch.zeros(num_kv_heads, 0, dtype=torch.float64)

    def add(self, queries: Tensor, first: int, load: Callable[[int, int], Tensor]) -> None:
        """Add the weights by queries `[queries, heads, head_dim]`, stored from index `first` on.

        `load(begin, end)`: keys by their stored indices, float32 `[keys, kv_heads, head_dim]`.
        """
        missing = first + len(queries) - self.sums.shape[1]
        self.sums = functional.pad(self.sums, (0, max(missing, 0)))
        for part in torch.split(queries, _QUERIES):
            self._add(part, first, load)
            first += len(part)

    def _add(self, queries: Tensor, first: int, load: Callable[[int, int], Tensor]) -> None:
        count, end = len(queries), first + len(queries)
        kv_heads = len(self.sums)
        # `[kv_heads, heads of one * queries, head_dim]`.
        grouped = (
            queries.view(count, kv_heads, -1, queries.shape[-1]).permute(1, 2, 0, 3).flatten(1, 2)
        )
        at = torch.arange(first, end).repeat(grouped.shape[1] // count)
        parts = [(begin, min(begin + KEYS, end)) for begin in range(0, end, KEYS)]

        def logits(begin: int, stop: int) -> Tensor:
            found: Tensor = grouped @ load(begin, stop).permute(1, 2, 0) * self._scale
            return found.masked_fill_(torch.arange(begin, stop) > at[:, None], -torch.inf)

        totals = torch.stack([logits(*part).logsumexp(-1) for part in parts]).logsumexp(0)
        for begin, stop in parts:
            weights = (logits(begin, stop) - totals.unsqueeze(-1)).exp_()
            self.sums[:, begin:stop] += weights.double().sum(1)

    def keep(self, kept: Tensor) -> None:
        """Keep the sums of the kept keys alone, `[keys, kv_heads]` as of `KVPool.keep`."""
        self.sums = self.sums.gather(1, kept.T)
