"""The waiting sequences in order of precedence; every operation is O(1) in their number.

Knows nothing of why a sequence waits or when it is admitted.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Iterator

from scheduler.sequence import Sequence


class WaitingQueue:
    """First come, first served within a priority; smaller priorities first."""

    def __init__(self) -> None:
        self._by_priority: dict[int, OrderedDict[int, Sequence]] = {}
        #: Ascending; there are as many lanes as priorities in use, which is few.
        self._priorities: list[int] = []
        self._num_waiting = 0
        self._num_tokens = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        """In order of precedence. The queue must not change meanwhile."""
        for priority in self._priorities:
            yield from self._by_priority[priority].values()

    def __reversed__(self) -> Iterator[Sequence]:
        """Beginning with the newest of the lowest priority. The queue must not change meanwhile."""
        for priority in reversed(self._priorities):
            yield from reversed(self._by_priority[priority].values())

    @property
    def lowest_priority(self) -> int:
        """The priority of the last that waits, at least 0, the default."""
        return max([0, *self._priorities[-1:]])

    @property
    def num_tokens(self) -> int:
        """Tokens of all that wait: prompts, and outputs of preempted sequences."""
        return self._num_tokens

    def append(self, sequence: Sequence) -> None:
        """Add a sequence at the end of its priority."""
        priority = sequence.request.priority
        lane = self._by_priority.get(priority)
        if lane is None:
            lane = self._by_priority[priority] = OrderedDict()
            insort(self._priorities, priority)
        lane[sequence.request_id] = sequence
        self._num_waiting += 1
        self._num_tokens += len(sequence.token_ids)

    def append_first(self, sequence: Sequence) -> None:
        """Add a sequence that ran before, ahead of the others of its priority."""
        self.append(sequence)
        self._by_priority[sequence.request.priority].move_to_end(sequence.request_id, last=False)

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that waits."""
        priority = sequence.request.priority
        lane = self._by_priority[priority]
        del lane[sequence.request_id]
        self._num_waiting -= 1
        self._num_tokens -= len(sequence.token_ids)
        if not lane:
            del self._by_priority[priority]
            self._priorities.remove(priority)

    def drop_last_token(self, sequence: Sequence) -> None:
        """Take back the newest token of a waiting sequence."""
        del sequence.token_ids[-1]
        self._num_tokens -= 1

    def count_tokens(self, num_more: int) -> None:
        """Count tokens that a waiting sequence was given."""
        self._num_tokens += num_more

    def check(self) -> None:
        """Assert that lanes, priorities and the count agree."""
        assert self._priorities == sorted(self._by_priority), (
            "a lane without a priority, or unsorted"
        )
        assert all(self._by_priority.values()), "an empty lane was kept"
        assert self._num_waiting == sum(map(len, self._by_priority.values())), "miscounted queue"
        assert self._num_tokens == sum(len(s.token_ids) for s in self), "miscounted tokens"
