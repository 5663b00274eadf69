"""The indexes of the drafters: of each sequence's own text, and of past outputs by namespace.

Both are bounded, and a namespace never reads the texts of another one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from model.interface import PENDING_TOKEN
from scheduler.drafters.text_index import END, TextIndex
from scheduler.sequence import Sequence

#: Of its own text a sequence looks up the last ones. 64 sequences hold 60 MB at most.
MAX_OWN_TOKENS = 1 << 15
#: Tokens added at a time, so that a long prompt delays a step by less than a millisecond.
_MAX_ADDED_TOKENS = 2048

#: Of past outputs, in each of the last namespaces: 2 MB each.
MAX_PAST_TOKENS = 1 << 16
MAX_NAMESPACES = 32


class OwnTexts:
    """An index of the prompt and the output of each sequence, brought up to date as it is read."""

    def __init__(self, make_index: Callable[[], TextIndex]) -> None:
        self._make_index = make_index
        self._indexes: dict[int, TextIndex] = {}

    def index(self, sequence: Sequence) -> TextIndex:
        """Return the sequence's index. It may lack the newest tokens of a long prompt."""
        index = self._indexes.get(sequence.request_id)
        if index is None:
            index = self._indexes[sequence.request_id] = self._make_index()
        index.extend(sequence.token_ids[index.end : index.end + _MAX_ADDED_TOKENS])
        return index

    def forget(self, sequence: Sequence) -> None:
        """Drop the index of a sequence, if there is one."""
        self._indexes.pop(sequence.request_id, None)

    @property
    def num_sequences(self) -> int:
        """Sequences with an index."""
        return len(self._indexes)


class PastOutputs:
    """The last outputs of the namespaces that were used last."""

    def __init__(
        self,
        make_index: Callable[[], TextIndex],
        max_namespaces: int = MAX_NAMESPACES,
    ) -> None:
        self._make_index = make_index
        self._max_namespaces = max_namespaces
        #: The namespace used last comes last.
        self._indexes: OrderedDict[str, TextIndex] = OrderedDict()

    def index(self, namespace: str) -> TextIndex | None:
        """Return the index of a namespace's outputs; None where there are none."""
        index = self._indexes.get(namespace)
        if index is not None:
            self._indexes.move_to_end(namespace)
        return index

    def add(self, sequence: Sequence) -> None:
        """Add the output of a sequence that has ended, unless it is not to be stored."""
        if sequence.request.store_up_to is not None:
            return
        output = sequence.token_ids[sequence.num_prompt :]
        if output and output[-1] == PENDING_TOKEN:
            output.pop()
        if not output:
            return
        namespace = sequence.request.namespace
        index = self.index(namespace)
        if index is None:
            index = self._indexes[namespace] = self._make_index()
            if len(self._indexes) > self._max_namespaces:
                self._indexes.popitem(last=False)
        index.extend((*output, END))

    @property
    def num_namespaces(self) -> int:
        """Namespaces with outputs."""
        return len(self._indexes)
