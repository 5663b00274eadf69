"""Steps written row by row."""

from __future__ import annotations

from collections.abc import Sequence

from cache.moves import PageMove
from model.interface import RowSpan, SampleSpan, ScoredSpan, SlotStart, StepInput


def step_of(
    token_ids: list[int],
    rows: Sequence[RowSpan],
    slots: list[int],
    page_ids: list[list[int]],
    samples: Sequence[SampleSpan],
    moves: Sequence[PageMove] = (),
    started: Sequence[SlotStart] = (),
    scored: Sequence[ScoredSpan] = (),
) -> StepInput:
    """Lay the spans out as columns."""
    return StepInput(
        token_ids=token_ids,
        positions=[row.position for row in rows],
        counts=[row.count for row in rows],
        slots=slots,
        page_ids=page_ids,
        sample_rows=[span.row for span in samples],
        moves=list(moves),
        started=list(started),
        scored=list(scored),
        dropped={i: row[0] - row[1] for i, row in enumerate(rows) if row[0] != row[1]},
        spans={i: s for i, s in enumerate(samples) if s[1:] != (rows[s.row].count - 1, 1)},
    )
