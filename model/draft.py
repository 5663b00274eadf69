"""Chosen tokens on their way from the device to the host.

Knows nothing of how they were chosen, nor of what is still to be done about them: it is given.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model.interface import StepOutput, TokenLogprobs

#: In a draft's tokens: there were too few candidates.
NOT_DECIDED = -1


class Draft:
    """Tokens on the device, on their way to the host."""

    def __init__(
        self,
        tokens: Tensor,
        *,
        widen: Callable[[int], int] | None = None,
        follow: Callable[[list[int]], dict[int, str]] | None = None,
        describe: Callable[[list[int]], list[TokenLogprobs | None]] | None = None,
    ) -> None:
        """`widen`: draws again for a row that is `NOT_DECIDED`.

        `follow`: takes in all the tokens, puts `NO_TOKEN` for those that cannot stand, and returns
        by row why its request cannot go on. `describe`: tells of them as they were drawn.
        """
        #: int64 `[rows]`; once the draft is settled, tokens of the vocabulary.
        self.tokens = tokens
        self._widen = widen
        self._follow = follow
        self._describe = describe
        self._drawn: list[int] | None = None
        self._output = StepOutput([])
        self._host, self._is_there = _to_host(tokens)

    def settle(self) -> None:
        """See that all that the next step needs to know of it is known, before it begins.

        Waits only for a draft with top-k or top-p, whose first candidates may not have been enough,
        and for one whose tokens say on the host what may come next (grammars, bad_words).
        """
        if self._widen is not None or self._follow is not None:
            self._take()

    def finish(self) -> StepOutput:
        """Wait for the tokens; the one time the host does."""
        drawn = self._take()
        if self._describe is not None:
            self._output.logprobs.extend(self._describe(drawn))
        return self._output

    def _take(self) -> list[int]:
        if self._drawn is None:
            self._is_there()
            self._drawn = drawn = self._host.tolist()
            if self._widen is not None and NOT_DECIDED in drawn:
                for row, token_id in enumerate(drawn):
                    if token_id == NOT_DECIDED:
                        drawn[row] = self._widen(row)
                self.tokens.copy_(torch.tensor(drawn))
            token_ids = list(drawn)
            failures = self._follow(token_ids) if self._follow is not None else {}
            self._output = StepOutput(token_ids, [], failures)
        return self._drawn


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
