"""A drafter that follows a script, for tests of everything that uses drafts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from scheduler.drafters.draft import Draft
from scheduler.messages import Submit
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


def knowing_drafter(
    requests: list[Submit], outputs: dict[int, list[int]], period: int
) -> ScriptedDrafter:
    """Return a drafter that knows the outputs; each token at a multiple of `period` is wrong."""
    texts = [[*r.request.prompt_token_ids, *outputs[r.request_id]] for r in requests]

    def guess(token_ids: list[int], max_tokens: int) -> list[int]:
        known = len(token_ids)
        text = next(text for text in texts if text[:known] == token_ids)
        return [
            255 - token_id if position % period == 0 else token_id
            for position, token_id in enumerate(text[known : known + max_tokens], known)
        ]

    return ScriptedDrafter(guess)
