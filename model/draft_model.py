"""A draft model: guesses at the next tokens of rows, before the served model verifies them.

Its keys and values are more layers of the same pages: a pool of its own under the same page ids,
with the same rows, block tables and moves. So shared prefixes, copies, preemption and eviction hold
for it as they are. Knows nothing of why a row has guesses, nor of how they are verified.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from cache.view import FULL_VIEW
from model.architectures.transformer import Decoder
from model.attention.interface import AttentionBackend
from model.interface import GUESSED_TOKEN, StepInput
from model.kv.pool import KVPool
from model.packing import Packer


@dataclass(slots=True)
class _Row:
    """A row of a step, as far as the draft model has not computed it."""

    slot: int
    page_ids: list[int]
    #: The tokens without keys, and the position of the first.
    token_ids: list[int]
    position: int
    num_wanted: int
    guesses: list[int] = field(default_factory=list)

    @property
    def lacks_guess(self) -> bool:
        return len(self.guesses) < self.num_wanted

    def completes_page(self, page_size: int) -> bool:
        """Return whether a page is full with these tokens."""
        return (self.position + len(self.token_ids)) // page_size > self.position // page_size


class DraftModel:
    """Computes its keys as late as possible: for a guess, or with the last token of a page.

    The pages that sequences share are full, so none of them lacks keys. A decode without drafts
    costs next to nothing: its tokens are computed together, a page at a time.
    """

    def __init__(
        self,
        *,
        decoder: Decoder,
        attention: AttentionBackend,
        pool: KVPool,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        self._decoder = decoder
        self._attention = attention
        self._pool = pool
        self._page_size = pool.layout.page_size
        self._packer = Packer(max_num_seqs, max_model_len, self._page_size)
        #: By slot, the last tokens without keys, and the position of the first.
        self._missing: dict[int, tuple[int, list[int]]] = {}

    def complete(self, step: StepInput) -> tuple[StepInput, dict[int, list[int]]]:
        """Return the step with the guesses in their places, and these by row.

        After it the draft model's pages hold the keys of all tokens of the step, except for those
        at a sequence's end that it computes later. Raises `ValueError` for a view of a request:
        pages out of it may belong to others.
        """
        for start in step.started:
            if start.view != FULL_VIEW:
                raise ValueError(f"a draft model cannot follow the view of a request: {start.view}")
            self._packer.forget(start.slot)
            self._missing.pop(start.slot, None)
        # Its layers read all keys: they are of that group of pages.
        self._pool.take_step(step.page_ids, [one for one in step.moves if not one.is_windowed])
        rows = self._rows(step)
        due = rows
        while due := [row for row in due if row.lacks_guess or row.completes_page(self._page_size)]:
            self._compute(due)
        for row in rows:
            self._missing[row.slot] = row.position, row.token_ids
        guesses = {index: row.guesses for index, row in enumerate(rows) if row.guesses}
        if not guesses:
            return step, guesses
        places = iter([token_id for row in rows for token_id in row.guesses])
        token_ids = [next(places) if id_ == GUESSED_TOKEN else id_ for id_ in step.token_ids]
        return replace(step, token_ids=token_ids), guesses

    def _rows(self, step: StepInput) -> list[_Row]:
        rows, start = list[_Row](), 0
        columns = zip(step.slots, step.page_ids, step.positions, step.counts, strict=True)
        for slot, page_ids, position, count in columns:
            token_ids = step.token_ids[start : start + count]
            num_wanted = token_ids.count(GUESSED_TOKEN)
            first, missing = self._missing.get(slot, (position, []))
            # Drafts that were not accepted are missing no longer.
            first = min(first, position)
            token_ids = missing[: position - first] + token_ids[: count - num_wanted]
            assert len(token_ids) == position - first + count - num_wanted, "a gap in the keys"
            rows.append(_Row(slot, page_ids, token_ids, first, num_wanted))
            start += count
        return rows

    def _compute(self, rows: list[_Row]) -> None:
        """Compute the missing keys of rows, and one guess of each that lacks one."""
        guessing = [index for index, row in enumerate(rows) if row.lacks_guess]
        step = StepInput(
            token_ids=[token_id for row in rows for token_id in row.token_ids],
            positions=[row.position for row in rows],
            counts=[len(row.token_ids) for row in rows],
            slots=[row.slot for row in rows],
            page_ids=[row.page_ids for row in rows],
            sample_rows=guessing,
        )
        packed = self._packer.pack(step).on(self._pool.device)
        self._attention.plan(packed.batch)
        hidden = self._decoder.forward(packed.token_ids, packed.batch.positions, self._attention)
        for row in rows:
            row.position += len(row.token_ids)
            row.token_ids = []
        if guessing:
            logits = self._decoder.logits(hidden[packed.sampled])
            for index, token_id in zip(guessing, logits.argmax(-1).tolist(), strict=True):
                rows[index].guesses.append(token_id)
                rows[index].token_ids = [token_id]

    def idle(self) -> bool:
        """See `ModelRunner`."""
        return self._pool.idle()
