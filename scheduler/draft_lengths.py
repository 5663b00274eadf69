"""How long each draft of a step is to be, so that the step gives the most tokens a second.

Knows nothing of sequences, of tokens or of clocks: prices and acceptance are parameters.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple


class Step(NamedTuple):
    """A step, and the price of drafts that are added to it."""

    #: Tokens it gives.
    num_tokens: float
    #: Its estimated time.
    time_s: float
    #: The time that each further token of a draft adds.
    draft_token_s: float

    def pays(self, num_more_tokens: float) -> bool:
        """Return whether a draft's token of which so much is expected raises tokens a second."""
        return num_more_tokens * self.time_s > self.draft_token_s * self.num_tokens

    def with_token(self, num_more_tokens: float) -> Step:
        """Return the step with a further token of a draft, of which so much is expected."""
        num_tokens, time_s = self.num_tokens + num_more_tokens, self.time_s + self.draft_token_s
        return self._replace(num_tokens=num_tokens, time_s=time_s)


class Offer(NamedTuple):
    """A draft of so many tokens, each accepted with this probability if those before it are."""

    num_tokens: int
    acceptance: float


def choose_lengths(offers: list[Offer], budget_tokens: int, step: Step) -> tuple[list[int], Step]:
    """Return how many tokens of each draft to verify, and the step with them.

    Takes the token that is most likely accepted while it raises the step's tokens a second: with
    equal prices, the best choice of any number of tokens. O(tokens of all drafts * log(drafts)).
    """
    lengths = [0] * len(offers)
    likeliest = [(-offer.acceptance, index) for index, offer in enumerate(offers)]
    heapq.heapify(likeliest)
    while likeliest and budget_tokens:
        gain, index = -likeliest[0][0], likeliest[0][1]
        if not step.pays(gain):
            break
        step = step.with_token(gain)
        budget_tokens -= 1
        lengths[index] += 1
        if lengths[index] < offers[index].num_tokens:
            heapq.heapreplace(likeliest, (-gain * offers[index].acceptance, index))
        else:
            heapq.heappop(likeliest)
    return lengths, step
