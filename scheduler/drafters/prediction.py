"""Drafts from the text that a client expects: OpenAI's `prediction`.

The output is followed along the text. Where they part, one token was replaced, or the output goes
on at another place.
"""

from __future__ import annotations

from scheduler.drafters.draft import Draft
from scheduler.drafters.lookups import MIN_MATCH_TOKENS, probability
from scheduler.drafters.text_index import MAX_MATCH_TOKENS, Match, TextIndex
from scheduler.sequence import Sequence

#: After so many wrong tokens in a row the place is looked up alone.
_MAX_MISSES = 2


class _Reading:
    """The place of one output in its prediction."""

    def __init__(self, prediction: tuple[int, ...]) -> None:
        self._prediction = prediction
        self._index = TextIndex(len(prediction), MIN_MATCH_TOKENS)
        self._index.extend(prediction)
        #: Of the output, so many tokens were followed.
        self._num_seen = 0
        #: The next token of the prediction.
        self.position = 0
        #: Tokens before it that the output repeated, and that it did not, since the last of those.
        self.num_hits = 0
        self.num_misses = 0
        #: Behind the last token that the output repeated.
        self._parted_at = 0

    def follow(self, token_ids: list[int], num_prompt: int) -> None:
        """Take in the tokens of the output that are new."""
        prediction = self._prediction
        for token_id in token_ids[num_prompt + self._num_seen :]:
            is_hit = self.position < len(prediction) and prediction[self.position] == token_id
            self.num_hits = self.num_hits + 1 if is_hit else 0
            self.num_misses = 0 if is_hit else self.num_misses + 1
            self.position += 1
            if is_hit:
                self._parted_at = self.position
        self._num_seen = len(token_ids) - num_prompt
        if self.num_hits < MIN_MATCH_TOKENS:
            self._look_up(token_ids)

    def _look_up(self, token_ids: list[int]) -> None:
        """Go to the longest match, if longer than the present one; of equal ones to the next."""
        matches = self._index.matches(token_ids)
        best = max(matches, key=self._rank, default=None)
        if best is not None and best.num_tokens > self.num_hits:
            self.position, self.num_hits = best
            self._parted_at = self.position
            self.num_misses = 0

    def _rank(self, match: Match) -> tuple[int, bool, int]:
        distance = match.position - self._parted_at
        return match.num_tokens, distance > 0, -abs(distance)

    def next_tokens(self, max_tokens: int) -> list[int]:
        """Return the tokens that the output is expected to have next."""
        if self.num_misses > _MAX_MISSES:
            return []
        return list(self._prediction[self.position : self.position + max_tokens])


class PredictionDrafter:
    """Drafts from `prediction_token_ids` of the request."""

    name = "prediction"

    def __init__(self) -> None:
        self._readings: dict[int, _Reading] = {}

    def propose(self, sequence: Sequence, max_tokens: int) -> Draft | None:
        """See `Drafter`."""
        prediction = sequence.request.prediction_token_ids
        if not prediction:
            return None
        reading = self._readings.get(sequence.request_id)
        if reading is None:
            reading = self._readings[sequence.request_id] = _Reading(prediction)
        reading.follow(sequence.token_ids, sequence.num_prompt)
        token_ids = reading.next_tokens(max_tokens)
        if not token_ids:
            return None
        num_hits = min(reading.num_hits, MAX_MATCH_TOKENS)
        return Draft(token_ids, probability(num_hits, reading.num_misses), self.name)

    def observe(self, sequence: Sequence, accepted_token_ids: list[int]) -> None:
        """Do nothing: the output is followed at the next proposal."""

    def forget(self, sequence: Sequence) -> None:
        """See `Drafter`."""
        self._readings.pop(sequence.request_id, None)

    @property
    def num_sequences(self) -> int:
        """Sequences with a place in their prediction."""
        return len(self._readings)
