"""Chosen tokens on their way from the device to the host.

Knows nothing of how they were chosen, nor of what is still to be done about them: it is given.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from model.interface import StepOutput, TokenLogprobs

#: In a draft's tokens: there were too few candidates.
NOT_DECIDED = -1
#: In what `follow` is given and gives: the row has no token.
NO_TOKEN = -1
#: In the copy for the host: the row's largest logit is not a number, or plus infinity; or it is
#: minus infinity, so that no token is left.
_NOT_FINITE, _NONE_LEFT = -2, -3


class Draft:
    """Tokens on the device, on their way to the host."""

    def __init__(
        self,
        tokens: Tensor,
        peaks: Tensor,
        *,
        widen: Callable[[int], int] | None = None,
        follow: Callable[[list[int]], dict[int, str]] | None = None,
        describe: Callable[[list[int]], list[TokenLogprobs | None]] | None = None,
    ) -> None:
        """`peaks` `[rows]`: the largest logit of each row, which is NaN where any of them is.

        `widen`: draws again for a row that is `NOT_DECIDED`. `follow`: takes in the tokens, puts
        `NO_TOKEN` for those that cannot stand, and returns by row why its request cannot go on; it
        passes over those that are `NO_TOKEN`. `describe`: tells of them as they were drawn.
        """
        told = _told(tokens, peaks)
        #: int64 `[rows]`; once the draft is settled, tokens of the vocabulary.
        self.tokens = tokens
        self._widen = widen
        self._follow = follow
        self._describe = describe
        self._drawn: list[int] | None = None
        self._output = StepOutput([])
        self._host, self._is_there = _to_host(told)

    def settle(self) -> None:
        """See that all that the next step needs to know of it is known, before it begins.

        Waits only for a draft with top-k or top-p, whose first candidates may not have been enough,
        and for one whose tokens say on the host what may come next (grammars, bad_words).
        """
        if self._widen is not None or self._follow is not None:
            self._take()

    def finish(self) -> StepOutput:
        """Wait for the tokens; the one time the host does."""
        try:
            drawn = self._take()
        finally:
            # Nothing is left to settle, even if this raised: the next step is not to raise by it.
            self._widen = self._follow = None
        if self._describe is not None:
            rows = zip(self._output.token_ids, self._describe(drawn), strict=True)
            self._output.logprobs.extend([one] if one and tokens else [] for tokens, one in rows)
        return self._output

    def _take(self) -> list[int]:
        if self._drawn is None:
            self._is_there()
            drawn: list[int] = self._host.tolist()
            not_finite = [row for row, token_id in enumerate(drawn) if token_id == _NOT_FINITE]
            none_left = [row for row, token_id in enumerate(drawn) if token_id == _NONE_LEFT]
            for row in (*not_finite, *none_left):
                drawn[row] = 0
            if self._widen is not None and NOT_DECIDED in drawn:
                for row, token_id in enumerate(drawn):
                    if token_id == NOT_DECIDED:
                        drawn[row] = self._widen(row)
                self.tokens.copy_(torch.tensor(drawn))
            token_ids = list(drawn)
            for row in (*not_finite, *none_left):
                token_ids[row] = NO_TOKEN
            failures = dict.fromkeys(none_left, "no token is left that is allowed")
            if self._follow is not None:
                failures |= self._follow(token_ids)
            spans = [[] if token_id == NO_TOKEN else [token_id] for token_id in token_ids]
            self._output = StepOutput(spans, [], failures, not_finite)
            # Last, so that what raises above raises again where the step is waited for.
            self._drawn = drawn
        return self._drawn


def _told(tokens: Tensor, peaks: Tensor) -> Tensor:
    """Return what to tell the host of the tokens; those of rows without one become 0, in place."""
    if peaks.device.type == "cpu" and np.isfinite(peaks.numpy()).all():
        return tokens  # as ever, and at a tenth of the time of what follows
    is_finite = peaks.isfinite()
    fault = torch.where(peaks == -torch.inf, _NONE_LEFT, _NOT_FINITE)
    told = torch.where(is_finite, tokens, fault)
    tokens.masked_fill_(is_finite.logical_not(), 0)
    return told


def mark(device: torch.device) -> Callable[[], None]:
    """Return what waits for all that the device was asked to do so far."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call] # torch's
    event.record()
    return event.synchronize


def _to_host(tokens: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """Start a copy to the host; the second result waits until it is there."""
    if tokens.device.type != "cuda":
        return tokens, lambda: None
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    return host, mark(tokens.device)
