"""The masks of a step's rows, and which tokens they refuse.

Knows nothing of logits or of how grammars are followed (`model/grammar/matchers.py`).
"""

from __future__ import annotations

from model.grammar.matchers import Matchers, TokenMask
from model.sampling.plan import Plan
from model.sampling.sampled_tokens import NO_TOKEN


def masks_of(
    plan: Plan, drafts: list[list[int]] | None, matchers: Matchers
) -> dict[int, TokenMask | None]:
    """Return the masks by row of the grammars' rows; None: not known in time.

    Each mask behind a draft holds if the draft is accepted. There is none behind a token that the
    grammar forbids.
    """
    firsts = [row for row in plan.constrained if not (drafts and drafts[row])]
    found = matchers.masks([plan.slots[row] for row in firsts])
    masks = dict(zip(firsts, found, strict=True))
    if not drafts:
        return masks
    for first in firsts:
        end = first + 1
        while end < len(drafts) and drafts[end]:
            end += 1
        ahead = matchers.look_ahead(plan.slots[first], drafts[end - 1])
        masks.update(zip(range(first + 1, end), ahead, strict=True))
    return masks


def refuse(masks: dict[int, TokenMask | None], token_ids: list[int]) -> dict[int, str]:
    """Replace the tokens of rows that have no mask, or a fault, by `NO_TOKEN`.

    Return by row why its request cannot go on.
    """
    failures: dict[int, str] = {}
    for row, mask in masks.items():
        token = token_ids[row]
        if mask is None:
            token_ids[row] = NO_TOKEN
        elif mask.error:
            failures[row] = mask.error
            token_ids[row] = NO_TOKEN
        elif token != NO_TOKEN and mask.is_banned[token]:
            failures[row] = "no token is left that the grammar allows"
            token_ids[row] = NO_TOKEN
    return failures


def must_end(mask: TokenMask | None, ends: tuple[int, ...]) -> bool:
    """Return whether a grammar allows nothing but these."""
    return mask is not None and mask.num_allowed == sum(not mask.is_banned[end] for end in ends)
