"""A mixture of experts with torch: a router, and a product for each expert that has tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from model.architectures.arch import RouterSpec
from model.architectures.transformer import GatedMlp
from model.ops import Ops

#: Keeps the quotient of scores finite, as in `transformers`.
_LEAST_SUM = 1e-20


class Router:
    """Chooses the experts of each token, see `RouterSpec`; all of it in float32."""

    def __init__(self, spec: RouterSpec, weight: Tensor, bias: Tensor | None) -> None:
        """Keep a weight `[experts, hidden]`, and numbers added to scores for the choice."""
        self._spec, self._weight, self._bias = spec, weight, bias

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the chosen experts of each row and their factors, `[rows, chosen]` each."""
        spec = self._spec
        products = functional.linear(x.float(), self._weight)
        scores = products.softmax(-1) if spec.scores == "softmax" else products.sigmoid()
        ranks = scores if self._bias is None else scores + self._bias
        if spec.num_groups > 1:
            ranks = ranks.masked_fill(~self._is_in_best_groups(ranks), -torch.inf)
        chosen = ranks.topk(spec.num_chosen, dim=-1, sorted=False).indices
        factors = scores.gather(1, chosen)
        if spec.is_normalized:
            factors = factors / (factors.sum(-1, keepdim=True) + _LEAST_SUM)
        return chosen, factors * spec.factor

    def _is_in_best_groups(self, ranks: Tensor) -> Tensor:
        """Return `[rows, experts]`: whether an expert's group is one of the best of its row."""
        spec = self._spec
        grouped = ranks.view(len(ranks), spec.num_groups, -1)
        worth = grouped.topk(spec.num_group_scores, dim=-1).values.sum(-1)
        best = worth.topk(spec.num_chosen_groups, dim=-1, sorted=False).indices
        is_best = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, best, value=True)
        return is_best.repeat_interleave(grouped.shape[-1], dim=1)


class Mixture:
    """See `Mlp` and `MixtureSpec`.

    A row's result is the sum over its experts in their order, so it does not depend on other rows.
    """

    def __init__(self, router: Router, shared: GatedMlp, experts: tuple[GatedMlp, ...]) -> None:
        self._router, self._shared, self._experts = router, shared, experts
        self.in_dtype = shared.in_dtype

    def __call__(self, x: Tensor, ops: Ops) -> Tensor:
        """See `Mlp`; the result is float32."""
        chosen, factors = self._router(x)
        out = self._shared(x, ops).float()
        # Pairs of a row and an expert, by expert: each product then has all of its rows.
        experts = chosen.flatten()
        order = experts.argsort(stable=True)
        rows = order // chosen.shape[1]
        scales = factors.flatten()[order].unsqueeze(1)
        counts = experts.bincount(minlength=len(self._experts)).tolist()
        end = 0
        for expert, count in zip(self._experts, counts, strict=True):
            start, end = end, end + count
            if count:
                mine = rows[start:end]
                found = expert(x.index_select(0, mine), ops).float()
                out.index_add_(0, mine, found * scales[start:end])
        return out
