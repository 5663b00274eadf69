"""Stop strings, found in text that arrives in pieces. Knows nothing of tokens or of HTTP."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

MAX_STOPS = 16
#: A stop string's automaton is built on the event loop: 16 of these take some ten milliseconds.
MAX_STOP_CHARS = 1024


class StopMatcher:
    """Lets text through up to the first stop string.

    The first is the one that completes first; if several complete with the same character, the
    longest. `include`: it is let through itself as well.
    Held back is the longest end of the text that is a proper beginning of some stop string, no
    more. Aho and Corasick's automaton (CACM 18(6), 1975): O(1) a character for any number of
    stops, and the depth of its state is the length to hold back.

    Raises `ValueError` for an empty or too long stop string, or too many.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        _validate(stops)
        self._include = include
        self._matched: str | None = None
        #: By state: the next state by character; 0 is the root.
        self._next: list[dict[str, int]] = [{}]
        #: By state: its text's length; the state of its longest proper end that is one; the
        #: longest stop string it ends in.
        self._depth = [0]
        self._shorter = [0]
        self._found: list[str | None] = [None]
        for stop in stops:
            self._insert(stop)
        self._link()
        self._state = 0
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Return the text to send now, and the stop string that ended it, with "" after one."""
        if self._matched is not None:
            return "", self._matched
        if len(self._next) == 1:
            return text, None
        state = self._state
        for position, letter in enumerate(text):
            state = self._step(state, letter)
            if self._found[state] is not None:
                return self._match(state, self._held + text[: position + 1])
        self._state = state
        known = self._held + text
        num_sent = len(known) - self._depth[state]
        self._held = known[num_sent:]
        return known[:num_sent], None

    def finish(self) -> str:
        """Return the text held back, when the stream ends without a match."""
        held, self._held, self._state = self._held, "", 0
        return held

    def check(self) -> None:
        """Assert that the text held back is as long as the automaton's state."""
        assert len(self._held) == self._depth[self._state], (
            f"{self._held!r} is held back in a state of depth {self._depth[self._state]}"
        )

    def _step(self, state: int, letter: str) -> int:
        while state and letter not in self._next[state]:
            state = self._shorter[state]
        return self._next[state].get(letter, 0)

    def _match(self, state: int, known: str) -> tuple[str, str]:
        stop = self._found[state]
        assert stop is not None, "matched in a state without a stop string"
        self._matched = stop
        self._held, self._state = "", 0
        return known if self._include else known[: len(known) - len(stop)], stop

    def _insert(self, stop: str) -> None:
        state = 0
        for letter in stop:
            if letter not in self._next[state]:
                self._next[state][letter] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._shorter.append(0)
                self._found.append(None)
            state = self._next[state][letter]
        self._found[state] = stop

    def _link(self) -> None:
        """Set `_shorter` and inherit `_found`, shallow states first."""
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            if self._found[state] is None:
                self._found[state] = self._found[self._shorter[state]]
            for letter, deeper in self._next[state].items():
                self._shorter[deeper] = self._step(self._shorter[state], letter)
                waiting.append(deeper)


def _validate(stops: Sequence[str]) -> None:
    if len(stops) > MAX_STOPS:
        raise ValueError(f"stop: at most {MAX_STOPS} strings are allowed, got {len(stops)}")
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise ValueError(
                f"stop: each string must have 1 to {MAX_STOP_CHARS} characters, one has {len(stop)}"
            )
