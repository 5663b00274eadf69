"""Chosen tokens on their way from the device to the host.

Knows nothing of how they were chosen: the sampler passes the functions that complete them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from model.interface import StepOutput, TokenLogprobs

#: In the tokens on the device: there were too few candidates (-1 is `PENDING_TOKEN`).
NOT_DECIDED = -2
#: In the argument of `follow`: the row has no token.
NO_TOKEN = -3
#: In the copy for the host: the row's largest logit is not a number, or plus infinity; or it is
#: minus infinity, so that no token is left.
_NOT_FINITE, _NONE_LEFT = -4, -5


class SampledTokens:
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
        """`peaks` `[rows]`: the largest logit of each row; NaN where one of its logits is NaN.

        `widen` draws again for a row that is `NOT_DECIDED`. `follow` consumes the tokens, replaces
        invalid tokens by `NO_TOKEN`, and returns by row why its request cannot go on; it skips rows
        with `NO_TOKEN`. `describe` returns the log-probabilities of the tokens as drawn.
        """
        marked = _marked(tokens, peaks)
        #: int64 `[rows]`; after `settle`, tokens of the vocabulary.
        self.tokens = tokens
        self._widen = widen
        self._follow = follow
        self._describe = describe
        self._drawn: list[int] | None = None
        self._output = StepOutput([])
        self._host, self._wait = _to_host(marked)

    def settle(self) -> None:
        """Complete the tokens as far as the next step depends on them.

        Waits for the device in two cases. With top-k or top-p, the first candidates may not have
        been enough. With grammars or bad_words, the tokens decide which may come next.
        """
        if self._widen is not None or self._follow is not None:
            self._take()

    def finish(self) -> StepOutput:
        """Wait for the tokens; the one time the host does."""
        try:
            drawn = self._take()
        finally:
            # Nothing is left to settle, even if this raised: the next step must not raise again.
            self._widen = self._follow = None
        if self._describe is not None:
            rows = zip(self._output.token_ids, self._describe(drawn), strict=True)
            self._output.logprobs.extend([one] if one and tokens else [] for tokens, one in rows)
        return self._output

    def _take(self) -> list[int]:
        if self._drawn is None:
            self._wait()
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
            # Last, so that an exception above is raised again by `finish`.
            self._drawn = drawn
        return self._drawn


def _marked(tokens: Tensor, peaks: Tensor) -> Tensor:
    """Return the tokens with codes for rows that have none; in place, these rows become 0."""
    if peaks.device.type == "cpu" and np.isfinite(peaks.numpy()).all():
        return tokens  # the usual case, in a tenth of the time
    is_finite = peaks.isfinite()
    fault = torch.where(peaks == -torch.inf, _NONE_LEFT, _NOT_FINITE)
    marked = torch.where(is_finite, tokens, fault)
    tokens.masked_fill_(is_finite.logical_not(), 0)
    return marked


def mark(device: torch.device) -> Callable[[], None]:
    """Return a function that waits for all work launched on the device so far."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call] # torch's
    event.record()
    return event.synchronize


def _to_host(tokens: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """Start a copy to the host; the second result waits for its end."""
    if tokens.device.type != "cuda":
        return tokens, lambda: None
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    return host, mark(tokens.device)
