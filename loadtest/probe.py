"""Finds out, before a run, which requests a server accepts and how its tokens are counted.

Nothing is guessed by a server's name: each way is tried, best first. The first accepted one is
used and reported in the run's notes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from loadtest.answer import Answer
from loadtest.prompts import Composer, Ending, Manner, Spelling
from loadtest.records import Failure
from loadtest.target import Target, TargetError
from loadtest.words import WORDS
from loadtest.workloads import Drawn, Turn, Workload, draws

#: `auto`: token ids if the server returns them and the route accepts them, else words.
PromptForm: TypeAlias = Literal["auto", "ids", "text"]

_PROBE_WORDS = (32, 64)
_REFUSALS = ("http 400", "http 422")
_TIMEOUT_S = 300.0
#: Of a preset all conversations are alike, and there may be no end of them.
_MOST_CONVERSATIONS = 10_000


@dataclass(frozen=True, slots=True)
class Learnt:
    """The form of the requests, and notes on it for readers of the figures."""

    composer: Composer
    notes: tuple[str, ...]


async def learn(
    target: Target,
    model: str,
    workload: Workload,
    *,
    form: PromptForm,
    wants_continuous_usage: bool,
    extra: dict[str, Any],
) -> Learnt:
    """Send some small requests. Raises `TargetError` with the reason if the server accepts none."""
    token_ids = await _token_ids(target, model, workload, form)
    manner = Manner(has_continuous_usage=wants_continuous_usage, extra=extra)
    composer = Composer(model, workload, Spelling(token_ids), manner)
    composer, first = await _agreed(target, composer)
    notes = list(_notes(composer.manner, workload))
    if token_ids is None and _has_drawn(workload):
        composer, told = await _calibrated(target, composer, first)
        notes.append(told)
    return Learnt(composer, tuple(notes))


async def _token_ids(
    target: Target, model: str, workload: Workload, form: PromptForm
) -> tuple[int, ...] | None:
    if form == "text" or workload.endpoint == "chat":
        if form == "ids":
            raise TargetError("--prompts ids: chats are sent as text; use --endpoint completions")
        return None
    ids = await target.token_ids(" ".join(("and", *WORDS)), model)
    if ids is None:
        if form == "ids":
            raise TargetError(f"--prompts ids: {target.url} has no /tokenize to learn them from")
        return None
    # Without the first, which may be special and is spelt otherwise than words after a space.
    return tuple(dict.fromkeys(ids[1:]))


async def _agreed(target: Target, composer: Composer) -> tuple[Composer, Answer]:
    """Find the best manner the server takes."""
    refusals: list[Failure] = []
    for manner in _manners(composer.manner, composer.workload):
        tried = replace(composer, manner=manner)
        answer, failure = await _ask(target, tried, _PROBE_WORDS[0])
        if failure is None:
            return tried, answer
        refusals.append(failure)
        if failure.kind not in _REFUSALS:
            break
    # The last request had the fewest fields, so its error is about the request itself.
    fault = refusals[-1]
    raise TargetError(f"{target.url} refuses to be tested: {fault.kind}: {fault.message}")


def _manners(wanted: Manner, workload: Workload) -> Iterator[Manner]:
    endings: tuple[Ending, ...] = ("ignore_eos", "min_tokens", "none")
    for ending in endings[2:] if workload.ends_itself else endings:
        yield replace(wanted, ending=ending)
    if not wanted.has_continuous_usage:
        yield replace(wanted, ending="none", has_usage=False)


async def _ask(
    target: Target, composer: Composer, num_tokens: int
) -> tuple[Answer, Failure | None]:
    # The longer begins like the shorter: how the first word is spelt differs from all others.
    turn, answer = Turn(Drawn(draws(num_tokens, "probe")), max_tokens=1), Answer()
    body = composer.body(turn, [])
    outcome = await target.stream(composer.path, body, _TIMEOUT_S, answer)
    return answer, outcome.failure


async def _calibrated(target: Target, composer: Composer, first: Answer) -> tuple[Composer, str]:
    """Count tokens a word, and those around them, by two prompts of known words."""
    second, _ = await _ask(target, composer, _PROBE_WORDS[1])
    few, many = first.prompt_tokens, second.prompt_tokens
    if few is None or many is None or many <= few:
        return composer, "the server tells no prompt tokens: a word is taken for one token"
    per_word = (many - few) / (_PROBE_WORDS[1] - _PROBE_WORDS[0])
    around = max(0.0, few - per_word * _PROBE_WORDS[0])
    spelling = Spelling(tokens_per_word=per_word, overhead_tokens=around)
    told = f"prompts are words of {per_word:.3g} tokens, with {around:.3g} tokens around them"
    return replace(composer, spelling=spelling), told


def _notes(manner: Manner, workload: Workload) -> Iterator[str]:
    if manner.ending == "none" and not workload.ends_itself:
        yield "the server takes neither ignore_eos nor min_tokens: answers may end early"
    if not manner.has_usage:
        yield "the server takes no stream_options: each piece of text is counted as one token"


def _has_drawn(workload: Workload) -> bool:
    return any(
        isinstance(turn.prompt, Drawn)
        for lane in workload.lanes
        for number in range(min(workload.num_conversations, _MOST_CONVERSATIONS))
        for turn in lane.make(number)
    )
