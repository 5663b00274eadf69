"""Bugs to put in on purpose, as pieces of source text: see `tools/seeded_bugs.py`."""

from __future__ import annotations

from typing import NamedTuple


class Bug(NamedTuple):
    """`old`, which stands exactly once in `file`, becomes `new`."""

    name: str
    file: str
    old: str
    new: str


VIEW, SELECTION = "cache/view.py", "cache/selection.py"
SCHEDULER, SEQUENCE = "scheduler/scheduler.py", "scheduler/sequence.py"
TABLE, SUSPECTS = "scheduler/table.py", "scheduler/suspects.py"
REFUSAL = "scheduler/admission.py"
PLAN, LANDING = "scheduler/plan.py", "scheduler/landing.py"
SPECULATION = "scheduler/speculation.py"
PRICED_DRAFTS = "scheduler/priced_drafts.py"

SCHEDULER_BUGS = [
    Bug(
        "a preempted sequence keeps its count of computed tokens",
        TABLE,
        "        sequence.num_computed = sequence.num_completed = 0\n",
        "",
    ),
    Bug(
        "cached tokens are computed again, over shared pages",
        TABLE,
        "        sequence.num_computed = sequence.num_completed = num_cached\n",
        "        sequence.num_computed = sequence.num_completed = 0\n",
    ),
    Bug(
        "page copies are forgotten",
        SCHEDULER,
        "        plan.step.moves.extend(allocation.moves)\n",
        "",
    ),
    Bug(
        "a slot is not given back",
        TABLE,
        "        self.free_slots.append(sequence.slot)\n",
        "",
    ),
    Bug(
        "a request that was cancelled while it waited stays in the queue",
        TABLE,
        "            self.waiting.remove(sequence)\n            sequence.move(",
        "            sequence.move(",
    ),
    Bug(
        "tokens count as computed although their step failed",
        SCHEDULER,
        "        for row, sequence in enumerate(plan.sequences):\n",
        "        self._advance(plan, [])\n"
        "        for row, sequence in enumerate(plan.sequences):\n",
    ),
    Bug(
        "one preemption is believed to be enough room",
        TABLE,
        "        while not self._cache.grow(",
        "        if not self._cache.grow(",
    ),
    Bug(
        "the oldest is preempted",
        TABLE,
        "next(one for one in reversed(self.running)",
        "next(one for one in self.running",
    ),
    Bug(
        "a chunk may be longer than what is left of the budget",
        TABLE,
        "min(num_missing, budget_tokens, ",
        "min(num_missing, ",
    ),
    Bug(
        "a prompt that can never fit is let into the queue",
        REFUSAL,
        "    if num_tokens >= max_len_tokens:\n",
        "    if num_tokens > max_len_tokens:\n",
    ),
    Bug(
        "a request ends a token late",
        SEQUENCE,
        "if length >= self.max_len_tokens",
        "if length > self.max_len_tokens",
    ),
    Bug(
        "pages count as computed while their step is under way",
        TABLE,
        "self._cache.free(sequence.allocation, sequence.token_ids, sequence.num_completed)",
        "self._cache.free(sequence.allocation, sequence.token_ids, sequence.num_computed)",
    ),
    Bug(
        "a chunk that does not reach the end samples all the same",
        PLAN,
        "    if end == len(token_ids):\n",
        "    if True:\n",
    ),
    Bug(
        "a prompt that is scored reuses all that is cached",
        SEQUENCE,
        "self.num_scored if self.num_scored < self.num_to_score else None",
        "None",
    ),
    Bug(
        "the last token of a chunk is not scored",
        PLAN,
        "min(end, sequence.num_to_score)",
        "min(end - 1, sequence.num_to_score)",
    ),
    Bug(
        "a token is sampled though none is wanted",
        SCHEDULER,
        "            if sequence.params.max_tokens == 0 and index not in output.not_finite:\n",
        "            if False:\n",
    ),
    Bug(
        "what a late token reads when it is computed again is dropped",
        LANDING,
        "cache.drop_unread(allocation, completed)",
        "cache.drop_unread(allocation, sequence.num_computed)",
    ),
]

#: About the pages that a sequence under a window gives back.
WINDOW_BUGS = [
    Bug(
        "a page too many is dropped",
        VIEW,
        "self.start(position) // page_size)",
        "self.start(position) // page_size + 1)",
    ),
    Bug(
        "nothing is dropped",
        LANDING,
        "cache.drop_unread(allocation, completed)",
        "pass",
    ),
    Bug(
        "a prompt gets no room for its next token",
        SCHEDULER,
        "(has_room or self._table.go_on(sequence)) and is_decode",
        "is_decode and (has_room or self._table.go_on(sequence))",
    ),
    Bug(
        "a chunk outgrows its table",
        TABLE,
        "            return count\n"
        "        return len(allocation.shortest_page_ids) * self._page_size - end\n",
        "            return count\n        return count\n",
    ),
    Bug(
        "a prompt longer than the pool counts as too long",
        REFUSAL,
        "longest + 1)",
        "info.num_pages * info.page_size + 1)",
    ),
    Bug(
        "a request that fits under its window finds no room",
        REFUSAL,
        "        num_tokens = min(num_tokens, num_sequences * self.max_held_tokens)\n",
        "",
    ),
]

#: Rare where steps are launched at random: each has a test of its own.
OVERLAP_BUGS = [
    Bug(
        "a step counts for a sequence that was preempted and came back meanwhile",
        LANDING,
        "if allocation is None or allocation.page_ids is not page_ids:",
        "if allocation is None:",
    ),
    Bug(
        "a sequence comes back before its newest token is known",
        SCHEDULER,
        "if sequence.token_ids[-1] == PENDING_TOKEN:",
        "if False:",
    ),
    Bug(
        "a token is computed behind the last one there is room for",
        SCHEDULER,
        "if not (is_decode and sequence.awaits_token):",
        "if True:",
    ),
    Bug(
        "a late token is counted on",
        SEQUENCE,
        "self.constraint is not None or self.is_drafted",
        "self.is_drafted",
    ),
    Bug("a late token is not computed again", TABLE, "num_computed -= 1", "num_computed -= 0"),
    Bug(
        "a late token counts in the queue", "scheduler/queue.py", "_tokens -= 1\n", "_tokens -= 0\n"
    ),
    Bug(
        "a prompt's scores are told twice",
        LANDING,
        "scores[num_known:]",
        "scores",
    ),
]

#: About sequences that lack pages while steps of them are under way.
PROGRESS_BUGS = [
    Bug(
        "a sequence preempts itself with a step of it under way",
        TABLE,
        "        if sequence.num_completed < sequence.num_computed:\n",
        "        if False:\n",
    ),
    Bug(
        "a sequence that lacked a page goes on before its newest token is known",
        SEQUENCE,
        "if length == self.stalled_len_tokens:",
        "if False:",
    ),
]

#: What happens after a step that failed.
FAULT_BUGS = [
    Bug(
        "a step counts for a sequence that was rolled back",
        PLAN,
        " or sequence.num_rollbacks != self.rollbacks[row]",
        "",
    ),
    Bug(
        "tokens that never came stay",
        TABLE,
        "            del sequence.token_ids[-1]\n        self._leave",
        "            break\n        self._leave",
    ),
    Bug("pages that are not finite stay cached", TABLE, "if sequence.trusts_cache:", "if True:"),
    Bug(
        "a suspect reads cached pages that are not finite",
        SEQUENCE,
        "if not self.trusts_cache:",
        "if False:",
    ),
    Bug(
        "a cleared suspect never trusts the cache again",
        SUSPECTS,
        "sequence.trusts_cache = True",
        "pass",
    ),
    Bug(
        "suspects run with steps under way",
        SCHEDULER,
        "None if self._num_under_way else",
        "None if False else",
    ),
    Bug(
        "one that fails alone is ended without a probe",
        SUSPECTS,
        "self.probe or next(iter",
        "next(iter",
    ),
    Bug("a suspect outgrows its pages", SCHEDULER, " or not self._table.grow(sequence):", ":"),
    Bug(
        "a cancelled request leaves its probe",
        SCHEDULER,
        "if probe := self._suspects.drop(sequence):",
        "if (probe := self._suspects.drop(sequence)) and False:",
    ),
]

#: About sequences that drop keys by their scores.
COMPACTION_BUGS = [
    Bug(
        "a row crosses a compaction point",
        TABLE,
        "min(num_missing, budget_tokens, sequence.tokens_to_point())",
        "min(num_missing, budget_tokens)",
    ),
    Bug(
        "a sequence that would lose its keys is preempted",
        TABLE,
        "next(one for one in reversed(self.running) if one.selection is None)",
        "self.running[-1]",
    ),
    Bug(
        "the pages of an answer are shared",
        SEQUENCE,
        "min(self.max_stored_tokens, self.num_prompt)",
        "self.max_stored_tokens",
    ),
    Bug(
        "queries of the first window come out of the cache",
        SELECTION,
        "self.first_point(num_prompt) - self.window",
        "self.first_point(num_prompt)",
    ),
    Bug(
        "no pages are set aside for those that the prompt shares",
        SELECTION,
        "num_first_pages + min(num_prompt // page_size, num_store_pages)",
        "num_first_pages",
    ),
    Bug(
        "a sequence that comes back counts its dropped keys",
        TABLE,
        "        sequence.num_dropped = 0\n",
        "",
    ),
]

SPECULATION_BUGS = [
    Bug("accepted tokens are computed again", LANDING, "sequence.num_computed += num_more", "pass"),
    Bug(
        "keys of drafts that were not accepted count",
        LANDING,
        "len(token_ids[row]) if row in plan.drafts else count - (row in again)",
        "count - (row in again)",
    ),
    Bug("tokens behind the end are kept", SEQUENCE, "return token_ids[: count + 1]", "pass"),
    Bug(
        "a step is planned before the number of accepted tokens is known",
        SEQUENCE,
        "self.constraint is not None or self.is_drafted",
        "self.constraint is not None",
    ),
    Bug(
        "drafts take the last pages",
        TABLE,
        "end + num_tokens, len(self.running))",
        "end + num_tokens)",
    ),
    Bug(
        "a draft is longer than the rest of the answer",
        PRICED_DRAFTS,
        "min(self._max_tokens, budget_tokens, room_tokens)",
        "min(self._max_tokens, budget_tokens)",
    ),
    Bug(
        "drafts are made behind a pending token",
        SPECULATION,
        " and sequence.token_ids[-2] != PENDING_TOKEN",
        "",
    ),
]
