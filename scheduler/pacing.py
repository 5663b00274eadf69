"""How many prompt tokens may ride along while others decode, so that no stream stalls.

A step takes about `decode_s + prompt_tokens * token_s`. Both are estimated from the steps' times,
which the caller measures: this module has no clock. Knows nothing of sequences.

A mixed step does not separate the two costs, and under steady load all steps are mixed. So once in
a while a step has decodes alone. Without it an estimate made with one stream open would still be
used with sixty: each prompt token would seem expensive, and prompts would stay slow.
"""

from __future__ import annotations

from scheduler.draft_lengths import Step
from scheduler.draft_price import DraftPrice

#: Weight of the newest step in each running mean.
_NEWEST = 0.2
#: One step counts for no more than so many times the mean: the machine may have been asleep.
_OUTLIER = 5.0
#: Before anything was measured, and never less than this: a prompt must get on, too.
_MIN_CHUNK_TOKENS = 16
#: Mixed steps in a row before one of decodes alone, which is the shortest there is.
_MAX_MIXED_STEPS = 16
#: The same for steps with drafts. Where most drafts are accepted, such a step gives few tokens.
_MAX_DRAFTED_STEPS = 64
#: Until they are timed, so many tokens of drafts are taken to cost as much as a decode.
_GUESSED_SHARE = 8


class Pacing:
    """Bounds a step to `max_slowdown` times a step in which all its sequences decode."""

    def __init__(self, max_slowdown: float) -> None:
        self._max_slowdown = max_slowdown
        #: The running means; None: not measured yet.
        self.decode_s: float | None = None
        self.token_s: float | None = None
        #: The mean number of decodes in the steps that `decode_s` was measured with.
        self._num_decodes = 0.0
        self._num_mixed_steps = 0
        #: Of drafts that were found in texts, and of those of a draft model.
        self.text_price, self.model_price = DraftPrice(), DraftPrice()
        self._num_drafted_steps = 0

    def prompt_tokens(self, budget_tokens: int, *, num_decodes: int, num_prompts: int) -> int:
        """Return how many prompt tokens the next step may compute, at most `budget_tokens`.

        `num_prompts`: sequences that will decode beside the others as soon as they are computed.
        """
        if num_decodes == 0:
            return budget_tokens
        if self._num_mixed_steps >= _MAX_MIXED_STEPS:
            return 0
        if self.decode_s is None or self.token_s is None:
            return min(budget_tokens, _MIN_CHUNK_TOKENS)
        now_s = self._decodes_s(num_decodes)
        limit_s = self._max_slowdown * self._decodes_s(num_decodes + num_prompts)
        return min(budget_tokens, max(_MIN_CHUNK_TOKENS, int((limit_s - now_s) / self.token_s)))

    def _decodes_s(self, num_decodes: int) -> float:
        """Estimate the time of a step of so many decodes: one more costs a token more, at least."""
        assert self.decode_s is not None, "decodes were not measured"
        more = num_decodes - self._num_decodes
        return max(self.decode_s + more * (self.token_s or 0.0), self.decode_s / _OUTLIER)

    @property
    def has_to_time_decodes(self) -> bool:
        """Whether the next step should have no drafts, so that decodes are timed without any."""
        if self.decode_s is None:
            return self.token_s is not None
        is_mixed_too_long = self._num_mixed_steps >= _MAX_MIXED_STEPS
        return is_mixed_too_long or self._num_drafted_steps >= _MAX_DRAFTED_STEPS

    def step(self, num_decodes: int, price: DraftPrice) -> Step | None:
        """Estimate a step of decodes, with the price of drafts; None while no step was timed."""
        if self.decode_s is None or num_decodes == 0:
            return None
        time_s = self._decodes_s(num_decodes)
        draft_token_s = price.token_s
        if draft_token_s is None:
            # A guess that lets the first drafts be tried. The price of prompts' tokens is none: of
            # a short prompt it is a whole step's.
            draft_token_s = time_s / (_GUESSED_SHARE * num_decodes)
        return Step(num_decodes, time_s, draft_token_s)

    def observe(
        self,
        elapsed_s: float,
        *,
        num_decodes: int,
        num_prompt_tokens: int,
        num_draft_tokens: int = 0,
        num_guessed_tokens: int = 0,
    ) -> None:
        """Update the estimates from a step that took `elapsed_s`.

        A step with drafts, which has no prompts, gives the price of drafts. `num_guessed_tokens`:
        those by a draft model.

        A mixed step gives one of the two costs once the other is known. If only prompts have been
        timed, it gives the decodes' share. So the chunks of a burst of arrivals can grow before
        there was a step of decodes alone.
        """
        if num_draft_tokens:
            self._num_drafted_steps = min(self._num_drafted_steps + 1, _MAX_DRAFTED_STEPS)
            self._learn_drafts(elapsed_s, num_decodes, num_draft_tokens, num_guessed_tokens)
            return
        if num_prompt_tokens == 0:
            self._num_mixed_steps = self._num_drafted_steps = 0
            self._learn_decode(elapsed_s, num_decodes)
            return
        if num_decodes:
            # Planned before the ones before it were timed, one may come too many.
            self._num_mixed_steps = min(self._num_mixed_steps + 1, _MAX_MIXED_STEPS)
            if self.decode_s is None and self.token_s is not None:
                # None left for the decodes: prompts alone were timed wrongly, or hardly at all.
                rest_s = elapsed_s - num_prompt_tokens * self.token_s
                if rest_s > 0.0:
                    self._learn_decode(rest_s, num_decodes)
                return
        is_base_known = num_decodes and self.decode_s is not None
        base_s = self._decodes_s(num_decodes) if is_base_known else 0.0
        token_s = max(elapsed_s - base_s, 1e-9) / num_prompt_tokens
        self.token_s = _mean(self.token_s, token_s)

    def _learn_drafts(
        self, elapsed_s: float, num_decodes: int, num_draft_tokens: int, num_guessed_tokens: int
    ) -> None:
        if self.decode_s is None:
            return
        num_found_tokens = num_draft_tokens - num_guessed_tokens
        found_s = num_found_tokens * (self.text_price.token_s or 0.0)
        guessed_s = num_guessed_tokens * (self.model_price.token_s or 0.0)
        most_s = _OUTLIER * (self.decode_s + found_s + guessed_s)
        added_s = min(elapsed_s, most_s) - self._decodes_s(num_decodes)
        if num_guessed_tokens:
            # In a step with both kinds the price of the other one is taken as it is.
            self.model_price.learn(added_s - found_s, num_guessed_tokens)
        else:
            self.text_price.learn(added_s, num_found_tokens)

    def _learn_decode(self, elapsed_s: float, num_decodes: int) -> None:
        self._num_decodes = _mean(self._num_decodes if self.decode_s else None, num_decodes)
        self.decode_s = _mean(self.decode_s, elapsed_s)

    def check(self) -> None:
        """Assert that the estimates can be times."""
        assert self.decode_s is None or self.decode_s > 0.0, "a step took no time"
        assert self.token_s is None or self.token_s > 0.0, "a token took no time"
        assert self._num_mixed_steps <= _MAX_MIXED_STEPS, "decodes had no step of their own"


def _mean(mean: float | None, newest: float) -> float:
    if mean is None:
        return newest
    return mean + _NEWEST * (min(newest, _OUTLIER * mean) - mean)
