"""Sequences of failed steps, which run alone, one after another, until the one at fault is known.

A sequence that fails alone is accused. Before it is ended, a probe of one token runs: if that
fails too, the model is at fault and no request is. Knows nothing of steps, pages or slots.
"""

from __future__ import annotations

from model.interface import SamplingParams
from scheduler.messages import GenerateRequest, Submit
from scheduler.sequence import Sequence

#: The request id of the probe; requests have ids from 0 on.
PROBE_ID = -1


class ModelFaultError(Exception):
    """Not even the probe succeeds: the model is at fault, and no request is."""


def new_probe() -> Sequence:
    """Return a sequence of one token that belongs to no request and samples nothing."""
    request = GenerateRequest((0,), SamplingParams(max_tokens=0), namespace="\0probe")
    probe = Sequence(Submit(PROBE_ID, request), arrival=PROBE_ID, eos_token_ids=(), max_model_len=2)
    # So that its admission is not reported.
    probe.is_started = True
    return probe


class Suspects:
    """The sequences that run alone, and the evidence against them."""

    def __init__(self) -> None:
        #: Each suspect, and how many of its tokens have to be computed to clear it.
        self._num_tokens: dict[Sequence, int] = {}
        self._accused: Sequence | None = None
        self._why = ""
        #: Runs before all suspects while one of them is accused.
        self.probe: Sequence | None = None

    def __bool__(self) -> bool:
        return bool(self._num_tokens)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._num_tokens

    @property
    def current(self) -> Sequence:
        """The one sequence that may run now."""
        return self.probe or next(iter(self._num_tokens))

    def add(self, sequence: Sequence, num_tokens: int) -> None:
        """Let a sequence run alone until `num_tokens` of its tokens are computed."""
        self._num_tokens[sequence] = num_tokens

    def accuse(self, sequence: Sequence, why: str) -> Sequence:
        """Note that a suspect failed alone; returns the probe that is to run next."""
        self._accused, self._why, self.probe = sequence, why, new_probe()
        return self.probe

    def convict(self) -> tuple[Sequence, str]:
        """Take out the accused, and why it fails: the probe succeeded."""
        assert self._accused is not None, "a probe without an accused sequence"
        accused = self._accused
        self.drop(accused)
        return accused, self._why

    def drop(self, sequence: Sequence) -> Sequence | None:
        """Take out a sequence that has ended; returns the probe if it is not needed any more."""
        self._num_tokens.pop(sequence, None)
        if sequence is not self._accused:
            return None
        probe, self._accused, self.probe = self.probe, None, None
        return probe

    def clear(self, sequence: Sequence) -> None:
        """Take out a suspect that has come past the place of the fault."""
        if sequence.num_completed >= self._num_tokens.get(sequence, sequence.num_completed + 1):
            del self._num_tokens[sequence]
            sequence.trusts_cache = True

    def check(self) -> None:
        """Assert that there is a probe exactly while a suspect is accused."""
        assert (self._accused is None) == (self.probe is None), "a probe proves nothing"
        assert self._accused is None or self._accused in self._num_tokens, "no longer a suspect"
