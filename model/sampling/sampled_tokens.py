"""Chosen tokens on their way from the device to the host.

Knows nothing of how they were chosen: the sampler passes the functions that complete them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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


class Span(NamedTuple):
    """The tokens of one span."""

    #: Its first row of logits.
    row: int
    #: Empty where even the first row has none.
    token_ids: list[int]


class SampledTokens:
    """Tokens on the device, on their way to the host."""

    def __init__(
        self,
        tokens: Tensor,
        peaks: Tensor,
        *,
        drafts: list[list[int]] | None = None,
        widen: Callable[[int], int] | None = None,
        refuse: Callable[[list[int]], dict[int, str]] | None = None,
        follow: Callable[[list[Span]], None] | None = None,
        describe: Callable[[list[int]], list[TokenLogprobs | None]] | None = None,
    ) -> None:
        """`peaks` `[rows]`: the largest logit of each row; NaN where one of its logits is NaN.

        `drafts`: see `DrawnRows`. `widen` draws again for a row that is `NOT_DECIDED`. `refuse`
        replaces invalid tokens by `NO_TOKEN`, and returns by row why its request cannot go on; it
        skips rows with `NO_TOKEN`. `follow` consumes the tokens. `describe` returns the
        log-probabilities of the tokens as drawn.
        """
        marked = _marked(tokens, peaks)
        #: int64 `[rows]`; after `settle`, tokens of the vocabulary.
        self.tokens = tokens
        self._drafts = drafts
        self._widen = widen
        self._refuse = refuse
        self._follow = follow
        self._describe = describe
        self._drawn: list[int] | None = None
        #: The accepted tokens, after `settle`.
        self.spans: list[Span] = []
        self._output = StepOutput([])
        self._host, self._wait = _to_host(marked)

    def settle(self) -> None:
        """Complete the tokens as far as the next step depends on them.

        Waits for the device in three cases. With top-k or top-p, the first candidates may not have
        been enough. With grammars or bad_words, the tokens decide which may come next. With drafts,
        the accepted ones are counted for penalties.
        """
        if self._drafts or self._widen or self._refuse or self._follow:
            self._take()

    def finish(self) -> StepOutput:
        """Wait for the tokens; the one time the host does."""
        try:
            drawn = self._take()
        finally:
            # Nothing is left to settle, even if this raised: the next step must not raise again.
            self._widen = self._refuse = self._follow = None
        if self._describe is not None:
            rows = self._describe(drawn)
            for span in self.spans:
                own = rows[span.row : span.row + len(span.token_ids)]
                self._output.logprobs.append([one for one in own if one])
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
            if self._refuse is not None:
                failures |= self._refuse(token_ids)
            self.spans = _spans(token_ids, self._drafts)
            if self._follow is not None:
                self._follow(self.spans)
            self._output = self._output_of(failures, not_finite)
            # Last, so that an exception above is raised again by `finish`.
            self._drawn = drawn
        return self._drawn

    def _output_of(self, failures: dict[int, str], not_finite: list[int]) -> StepOutput:
        """Return the output by span. A fault behind a draft shows in the step that has no draft."""
        index_of_row = {span.row: index for index, span in enumerate(self.spans)}
        return StepOutput(
            [span.token_ids for span in self.spans],
            [],
            {index_of_row[row]: why for row, why in failures.items() if row in index_of_row},
            [index_of_row[row] for row in not_finite if row in index_of_row],
        )


def _spans(token_ids: list[int], drafts: list[list[int]] | None) -> list[Span]:
    """Return the tokens of each span up to the first that differs from its draft."""
    if not drafts:
        return [Span(row, [] if id_ == NO_TOKEN else [id_]) for row, id_ in enumerate(token_ids)]
    spans: list[Span] = []
    is_open = False
    for row, (token_id, draft) in enumerate(zip(token_ids, drafts, strict=True)):
        if not draft:
            spans.append(Span(row, []))
            is_open = True
        else:
            # The row holds for this draft alone.
            is_open = is_open and token_ids[row - 1] == draft[-1]
        is_open = is_open and token_id != NO_TOKEN
        if is_open:
            spans[-1].token_ids.append(token_id)
    return spans


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
