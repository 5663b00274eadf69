"""A drafter that follows a script, for tests of everything that uses drafts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from scheduler.drafters.draft import Draft
from scheduler.sequence import Sequence


@dataclass
class ScriptedDrafter:
    """Proposes the tokens of `script`, a function of the known tokens and the limit.

    Checks that it is called as `Drafter` requires, and keeps the observed tokens.
    """

    script: Callable[[list[int], int], list[int]]
    probability: float = 1.0
    name: str = "scripted"
    #: Whether drafts may be longer than allowed.
    is_too_long: bool = False
    num_proposals: int = 0
    #: By request id, the tokens of all observed steps.
    observed: dict[int, list[int]] = field(default_factory=dict)
    forgotten: list[Sequence] = field(default_factory=list)

    def propose(self, sequence: Sequence, max_tokens: int) -> Draft | None:
        assert max_tokens > 0, "a draft of no tokens"
        assert min(sequence.token_ids) >= 0, "a draft behind a token that is not known"
        self.num_proposals += 1
        token_ids = self.script(sequence.token_ids, max_tokens)
        if not self.is_too_long:
            token_ids = token_ids[:max_tokens]
        return Draft(token_ids, self.probability, self.name) if token_ids else None

    def observe(self, sequence: Sequence, accepted_token_ids: list[int]) -> None:
        assert accepted_token_ids, "a step without tokens"
        known = [token_id for token_id in sequence.token_ids if token_id >= 0]
        assert known[-len(accepted_token_ids) :] == accepted_token_ids
        self.observed.setdefault(sequence.request_id, []).extend(accepted_token_ids)

    def forget(self, sequence: Sequence) -> None:
        assert sequence not in self.forgotten, "forgotten twice"
        self.forgotten.append(sequence)
