"""From logits to tokens: the next token of each row, by its own request's parameters.

Keeps each slot's parameters and, for slots with penalties, the tokens of its sequence. Knows
nothing of pages, of the model, or of when a sequence ends. The arithmetic is in
`model/sampling/sampling_ops.py` and `model/sampling/logprobs.py`.

Order, as in vLLM: log-probabilities are of the raw logits; then allowed_token_ids, logit_bias,
banned tokens, penalties, the grammar's mask, temperature, min-p, top-k, top-p. Rows are grouped by
the operations they need, and no group pays for the operations of another.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from model.grammar.grammars import CompiledGrammar
from model.grammar.matchers import MASK_TIMEOUT_S, Matchers, TokenMask
from model.interface import SlotStart, StepOutput, TokenLogprobs
from model.packing import upload
from model.sampling.bad_words import BannedSequences
from model.sampling.grammar_masks import masks_of, must_end, refuse
from model.sampling.logprobs import describe
from model.sampling.plan import Penalized, Plan, Planner, SlotRequest
from model.sampling.sampled_tokens import NOT_DECIDED, SampledTokens, Span
from model.sampling.sampling_ops import draw_plain, draw_ranked, penalize, rng_stream, uniform
from model.sampling.token_counts import TokenCounts

#: How many of the likeliest tokens top-k and top-p look at first; then at these many more, then at
#: the whole vocabulary. A `topk` of 256 costs a twentieth of a sort of 49,152 on a CPU, one of
#: 4,096 a sixth.
CANDIDATES = (256, 4096)


class Sampler:
    """Chooses the next tokens.

    A row's token depends on its logits, its request and its position alone: not on other rows, on
    earlier steps or on restarts.

    A row with NaN or plus infinity gets no token (`StepOutput.not_finite`). Nor does a row of
    minus infinity alone, whose request fails. Neither harms another row.
    """

    def __init__(
        self,
        max_num_seqs: int,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        device: torch.device,
        *,
        candidates: tuple[int, ...] = CANDIDATES,
        mask_timeout_s: float = MASK_TIMEOUT_S,
    ) -> None:
        """`mask_timeout_s`: how long a step waits for the masks of its grammars."""
        self._max_num_seqs = max_num_seqs
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._device = device
        self._candidates = (*candidates, vocab_size)
        self._slots: dict[int, SlotRequest] = {}
        #: Of the slots with bad_words.
        self._banned: dict[int, BannedSequences] = {}
        self._counts = TokenCounts(vocab_size, device)
        self._matchers = Matchers(vocab_size, mask_timeout_s=mask_timeout_s)
        self._planner = Planner(vocab_size, device)
        self._last_plan: Plan | None = None
        #: Rows so far whose first candidates were not enough.
        self.num_widened_rows = 0

    def start(self, start: SlotStart) -> None:
        """Give a slot a sequence: new, or preempted or resumed with its output so far.

        Raises `ValueError` naming the parameter with a token outside the vocabulary.
        """
        params = start.params
        assert 0 <= start.slot < self._max_num_seqs, f"slot {start.slot} of {self._max_num_seqs}"
        slot = self._slots[start.slot] = self._slot_request(start)
        self._last_plan = None
        if start.constraint is None:
            assert params.grammar is None, "a grammar that was not prepared"
            self._matchers.drop(start.slot)
        else:
            assert isinstance(start.constraint, CompiledGrammar), "another runner's grammar"
            self._matchers.start(start.slot, start.constraint, start.output_token_ids)
        if slot.is_penalized:
            self._counts.take(start.slot, start.prompt_token_ids, start.output_token_ids)
        else:
            self._counts.drop(start.slot)
        self._banned.pop(start.slot, None)
        # Likewise, a sequence with a token outside the vocabulary is never generated.
        bad_words = [word for word in params.bad_words if max(word) < self._vocab_size]
        if bad_words:
            self._banned[start.slot] = BannedSequences(bad_words, start.output_token_ids)

    def _slot_request(self, start: SlotStart) -> SlotRequest:
        params = start.params
        self._require_known("logit_bias", (token for token, _ in params.logit_bias))
        self._require_known("allowed_token_ids", params.allowed_token_ids or ())
        ends = {*self._eos_token_ids, *params.stop_token_ids}
        return SlotRequest(
            params=params,
            rng_stream=rng_stream(params.seed),
            free_from=len(start.prompt_token_ids) + params.min_tokens,
            # A stop token outside the vocabulary is never generated: there is nothing to ban.
            banned=tuple(sorted(token for token in ends if 0 <= token < self._vocab_size)),
            disallowed=self._disallowed(params.allowed_token_ids),
        )

    def _require_known(self, name: str, token_ids: Iterable[int]) -> None:
        for token in token_ids:
            if not 0 <= token < self._vocab_size:
                last = self._vocab_size - 1
                raise ValueError(f"{name} names token {token}; the vocabulary ends at {last}")

    def _disallowed(self, allowed: Sequence[int] | None) -> Tensor | None:
        if allowed is None:
            return None
        mask = torch.ones(self._vocab_size, dtype=torch.bool, device=self._device)
        mask[self._planner.index(allowed)] = False
        return mask

    def sample(self, logits: Tensor, slots: list[int], positions: list[int]) -> StepOutput:
        """Choose a token for each row and wait for it: `begin`, then `SampledTokens.finish`."""
        return self.begin(logits, slots, positions).finish()

    def begin(
        self,
        logits: Tensor,
        slots: list[int],
        positions: list[int],
        drafts: list[list[int]] | None = None,
    ) -> SampledTokens:
        """Begin to choose a token for each row of float32 `[rows, vocab]` logits.

        `positions[i]` is the position of the new token in row i's sequence: the number of tokens
        before it. `drafts`: see `DrawnRows`; each row is drawn as if they were tokens of the
        sequence, and dropped if they are not. The logits may be overwritten, and must not be
        changed until the tokens are settled. Waits for a grammar's mask until the timeout, and for
        the device only where penalties meet top-k, top-p, bad_words, a grammar or drafts.
        """
        assert logits.shape == (len(slots), self._vocab_size), f"logits of {tuple(logits.shape)}"
        plan = self._plan(slots)
        if plan.is_only_greedy:
            return SampledTokens(*_likeliest(logits), drafts=drafts)
        describe_rows = None
        if rows := plan.wants_logprobs.rows:
            # Read now: the slots may have other requests by then. Indexed: the rows will change.
            num_tops = [self._slots[slots[row]].params.logprobs or 0 for row in rows]
            raw = logits[plan.wants_logprobs.index]
            describe_rows = partial(self._logprobs, rows, num_tops, raw)
        masks = masks_of(plan, drafts, self._matchers)
        self._edit(plan, logits, positions, masks, drafts)
        tokens, peaks = self._choose(plan, logits, positions)
        is_ranked = any(draw.is_ranked for draw in plan.draws)
        sampled = SampledTokens(
            tokens,
            peaks,
            drafts=drafts,
            widen=partial(self._widen, plan, logits, positions) if is_ranked else None,
            refuse=partial(refuse, masks) if masks else None,
            follow=partial(self._follow, plan) if masks or plan.followed else None,
            describe=describe_rows,
        )
        if plan.penalized is not None:
            sampled.settle()
            if drafts:
                self._count_spans(plan.penalized, sampled)
            else:
                self._count(plan.penalized, tokens, masks)
        return sampled

    def score(self, logits: Tensor, slot: int, token_ids: list[int]) -> list[TokenLogprobs]:
        """Return the log-probabilities of tokens of a slot's prompt.

        `logits`: float32 `[len(token_ids), vocab]`, of the tokens before them.
        """
        count = self._slots[slot].params.prompt_logprobs or 0
        chosen = self._planner.index(token_ids).unsqueeze(-1)
        return describe(logits, chosen, token_ids, [count] * len(token_ids))

    def forced_tokens(self, slot: int) -> list[int]:
        """Return the next tokens that the grammar in a slot forces, or none."""
        return self._matchers.forced(slot)

    def close(self) -> None:
        """End the threads, if there are any."""
        self._matchers.close()

    def check(self) -> None:
        """Assert that exactly the slots with penalties, bad words or grammars hold them."""
        for slot, held in self._slots.items():
            has_grammar = held.params.grammar is not None
            assert self._matchers.holds(slot) == has_grammar, f"slot {slot}: grammar and matcher"
        self._counts.check()
        penalized = {slot for slot, held in self._slots.items() if held.is_penalized}
        assert penalized == self._counts.row_of_slot.keys(), (
            f"slots {penalized} use penalties, {set(self._counts.row_of_slot)} hold counts"
        )
        banning = {slot for slot, held in self._slots.items() if held.params.bad_words}
        assert self._banned.keys() <= banning, f"slots {set(self._banned)} follow bad words"

    def _plan(self, slots: list[int]) -> Plan:
        """Return the plan for these slots: the last one, while neither they nor it changed."""
        if self._last_plan is None or self._last_plan.slots != slots:
            held = [self._slots[slot] for slot in slots]
            self._last_plan = self._planner.plan(list(slots), held, self._counts.row_of_slot)
        return self._last_plan

    def _edit(
        self,
        plan: Plan,
        logits: Tensor,
        positions: list[int],
        masks: dict[int, TokenMask | None],
        drafts: list[list[int]] | None,
    ) -> None:
        """Apply in place the steps before temperature."""
        if plan.restricted is not None:
            place = plan.restricted.group.place
            logits[place] = logits[place].masked_fill(plan.restricted.disallowed, -torch.inf)
        if plan.bias is not None:
            rows, tokens, biases = plan.bias
            logits.index_put_((rows, tokens), biases, accumulate=True)
        banned = [
            (row, token)
            for row in plan.guarded
            if not must_end(masks.get(row), self._slots[plan.slots[row]].banned)
            for token in self._next_banned(
                plan.slots[row], positions[row], drafts[row] if drafts else ()
            )
        ]
        if banned:
            banned_rows, banned_tokens = zip(*banned, strict=True)
            index = self._planner.index(banned_rows), self._planner.index(banned_tokens)
            logits[index] = -torch.inf
        if plan.penalized is not None:
            self._penalize(plan.penalized, logits, drafts)
        for row, mask in masks.items():
            if mask is not None:
                logits[row].masked_fill_(upload(mask.is_banned, self._device), -torch.inf)

    def _follow(self, plan: Plan, spans: list[Span]) -> None:
        """Advance grammars and bad_words by the accepted tokens."""
        chosen: list[tuple[int, list[int]]] = []
        for span in spans:
            slot = plan.slots[span.row]
            if banned := self._banned.get(slot):
                banned.push(span.token_ids)
            # The end is not a part of a grammar's text.
            text = [id_ for id_ in span.token_ids if id_ not in self._eos_token_ids]
            if text and self._matchers.holds(slot):
                chosen.append((slot, text))
        self._matchers.advance(chosen)

    def _count_spans(self, penalized: Penalized, sampled: SampledTokens) -> None:
        """Count the accepted tokens of penalized rows, the first of all spans, then the second."""
        count_row = dict(zip(penalized.group.rows, penalized.counts.rows, strict=True))
        spans = [span for span in sampled.spans if span.row in count_row]
        for offset in range(max((len(span.token_ids) for span in spans), default=0)):
            found = [span for span in spans if offset < len(span.token_ids)]
            rows = [count_row[span.row] for span in found]
            tokens = self._planner.index(span.token_ids[offset] for span in found)
            self._counts.add(rows, self._planner.index(rows), tokens)

    def _count(
        self, penalized: Penalized, tokens: Tensor, masks: dict[int, TokenMask | None]
    ) -> None:
        """Count the new tokens of penalized rows, except for rows whose mask was late."""
        counts, group = penalized.counts, penalized.group
        on_time = [i for i, row in enumerate(group.rows) if masks.get(row, True) is not None]
        if len(on_time) == len(group.rows):
            self._counts.add(counts.rows, counts.index, tokens[group.index])
        elif on_time:
            index = self._planner.index(on_time)
            rows = [counts.rows[i] for i in on_time]
            self._counts.add(rows, counts.index[index], tokens[group.index[index]])

    def _next_banned(self, slot: int, position: int, draft: Sequence[int]) -> Collection[int]:
        held, follows = self._slots[slot], self._banned.get(slot)
        banned = set() if follows is None else follows.next_banned(draft)
        if position < held.free_from:
            banned.update(held.banned)
        allowed = held.params.allowed_token_ids
        return () if allowed is not None and banned.issuperset(allowed) else banned

    def _penalize(
        self, penalized: Penalized, logits: Tensor, drafts: list[list[int]] | None
    ) -> None:
        """Apply penalties to the tokens of the sequences: a few hundred, not the vocabulary."""
        held = penalized.counts
        token_ids = self._counts.tokens_of(held.rows, held.index)
        drafted = None
        if drafts and (longest := max(len(drafts[row]) for row in penalized.group.rows)):
            padded = [[*drafts[row], *[-1] * longest][:longest] for row in penalized.group.rows]
            drafted = upload(np.asarray(padded), self._device)
            token_ids = torch.cat([token_ids, drafted.clamp(min=0)], dim=-1)
        counts = held.index.unsqueeze(-1), token_ids
        # Where an id stands twice in a row, the same value is written twice.
        place = penalized.group.index.unsqueeze(-1), token_ids
        generated = self._counts.generated[counts]
        if drafted is not None:
            generated += (token_ids.unsqueeze(-1) == drafted.unsqueeze(-2)).sum(-1)
        logits[place] = penalize(
            logits[place],
            generated,
            self._counts.in_prompt[counts],
            penalized.penalties,
        )

    def _choose(self, plan: Plan, logits: Tensor, positions: list[int]) -> tuple[Tensor, Tensor]:
        """Return the tokens of all rows, and each row's largest logit.

        A token is `NOT_DECIDED` where there were too few candidates.
        """
        tokens = torch.empty(len(plan.slots), dtype=torch.int64, device=self._device)
        peaks = torch.empty(len(plan.slots), dtype=logits.dtype, device=self._device)
        if plan.greedy.rows:
            index = plan.greedy.index
            tokens[index], peaks[index] = _likeliest(logits[plan.greedy.place])
        for draw in plan.draws:
            u = self._uniforms(plan, draw.group.rows, positions)
            some = logits[draw.group.place]
            if draw.is_ranked:
                drawn, is_decided, peak = draw_ranked(some, draw.filters, u, self._candidates[0])
                drawn = torch.where(is_decided, drawn, NOT_DECIDED)
            else:
                drawn, peak = draw_plain(some, draw.filters, u)
            tokens[draw.group.index], peaks[draw.group.index] = drawn, peak
        return tokens, peaks

    def _uniforms(self, plan: Plan, rows: list[int], positions: list[int]) -> Tensor:
        streams = (self._slots[plan.slots[row]].rng_stream for row in rows)
        at = (positions[row] for row in rows)
        return self._planner.column(map(uniform, streams, at), np.float64)

    def _widen(self, plan: Plan, logits: Tensor, positions: list[int], row: int) -> int:
        """Draw again, from more candidates."""
        self.num_widened_rows += 1
        filters = self._planner.filters([self._slots[plan.slots[row]].params])
        u = self._uniforms(plan, [row], positions)
        for num_candidates in self._candidates[1:]:
            drawn, is_decided, _ = draw_ranked(logits[row : row + 1], filters, u, num_candidates)
            if is_decided.item():
                return int(drawn.item())
        raise AssertionError("the whole vocabulary did not decide")

    def _logprobs(
        self, rows: list[int], num_tops: list[int], raw: Tensor, token_ids: list[int]
    ) -> list[TokenLogprobs | None]:
        """Describe the tokens of `rows` by their raw logits `[len(rows), vocab]`."""
        chosen = [token_ids[row] for row in rows]
        entries = describe(raw, self._planner.index(chosen).unsqueeze(-1), chosen, num_tops)
        by_row = dict(zip(rows, entries, strict=True))
        return [by_row.get(row) for row in range(len(token_ids))]


def _likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first of the likeliest tokens of each row, and its logit."""
    found = logits.max(dim=-1)
    return found.indices, found.values
