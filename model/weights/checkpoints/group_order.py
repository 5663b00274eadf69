"""The groups of a matrix' inputs where the writer sorted these (`desc_act`, `actorder`)."""

from __future__ import annotations

import torch
from torch import Tensor

from model.weights.checkpoints.interface import PartError


def mixed_groups(
    group_of_input: Tensor | None, group_inputs: int, part: str = "g_idx"
) -> Tensor | None:
    """Return the group of each input as int64; None where the groups are in order.

    Writers that did not sort leave zeros (GPTQ) or -1 (compressed-tensors): both stand for order.
    Raises `PartError`.
    """
    if group_of_input is None or bool((group_of_input <= 0).all()):
        return None
    groups = group_of_input.long()
    in_order = torch.arange(len(groups)) // group_inputs
    if torch.equal(groups, in_order):
        return None
    low, high, last = int(groups.min()), int(groups.max()), int(in_order[-1])
    if low < 0 or high > last:
        raise PartError(f"{part} has groups from {low} to {high}, though there are 0 to {last}")
    return groups
