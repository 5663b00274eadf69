"""The drafters that `--speculation` names, and the best of their drafts."""

from __future__ import annotations

from collections.abc import Iterable

from cache.kv_cache import KVCache
from scheduler.drafters.draft import Draft, Drafter
from scheduler.drafters.lookups import MIN_MATCH_TOKENS, NgramDrafter, SuffixDrafter
from scheduler.drafters.prediction import PredictionDrafter
from scheduler.drafters.prefix import PrefixDrafter
from scheduler.sequence import Sequence


class BestDrafter:
    """Takes the draft of which the most tokens are expected to be accepted."""

    name = "best"

    def __init__(self, drafters: Iterable[Drafter]) -> None:
        """Of equal drafts, that of the earlier drafter is taken."""
        self._drafters = tuple(drafters)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its drafters, the preferred one first."""
        return tuple(drafter.name for drafter in self._drafters)

    def propose(self, sequence: Sequence, max_tokens: int) -> Draft | None:
        """See `Drafter`."""
        best: Draft | None = None
        num_best_tokens = 0.0
        for drafter in self._drafters:
            draft = drafter.propose(sequence, max_tokens)
            if draft is not None and (found := num_expected_tokens(draft)) > num_best_tokens:
                best, num_best_tokens = draft, found
        return best

    def observe(self, sequence: Sequence, accepted_token_ids: list[int]) -> None:
        """See `Drafter`."""
        for drafter in self._drafters:
            drafter.observe(sequence, accepted_token_ids)

    def forget(self, sequence: Sequence) -> None:
        """See `Drafter`."""
        for drafter in self._drafters:
            drafter.forget(sequence)


def num_expected_tokens(draft: Draft) -> float:
    """Return how many tokens of a draft are expected to be accepted: `sum of p^j`."""
    probability, num_tokens = draft.probability, len(draft.token_ids)
    if probability == 1.0:
        return float(num_tokens)
    return probability * (1.0 - probability**num_tokens) / (1.0 - probability)


def build_drafters(
    speculation: str,
    cache: KVCache,
    *,
    further: Iterable[Drafter] = (),
    lookup_min_tokens: int = MIN_MATCH_TOKENS,
    lookup_max_tokens: int | None = None,
) -> BestDrafter | None:
    """Build the drafters of `--speculation`; None for `none`.

    `further`: drafters that need more than tokens (of grammars), preferred to all others.
    The lookups are vLLM's `prompt_lookup_min` and `prompt_lookup_max`. Raises `ValueError`.
    """
    asked: list[Drafter]
    match speculation.partition(":")[0]:
        case "none":
            return None
        case "ngram":
            asked = [NgramDrafter(lookup_min_tokens, lookup_max_tokens)]
        case "suffix":
            asked = [SuffixDrafter()]
        case "auto" | "draft":
            # A draft model drafts where these do not (`Speculation`).
            asked = [PrefixDrafter(cache), SuffixDrafter()]
        case _:
            names = "none, auto, ngram, suffix or draft:MODEL"
            raise ValueError(f"speculation must be {names}, got {speculation!r}")
    # A prediction is the wish of one request, whatever the server drafts from otherwise.
    return BestDrafter([*further, PredictionDrafter(), *asked])
