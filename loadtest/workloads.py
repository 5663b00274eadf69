"""The requests: conversations of seeded words. Pure; the same seed gives the same requests.

A prompt is a row of draws, one for each token it shall have. `loadtest/prompts.py` turns draws into
the words or token ids of a certain server; nothing here knows any.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

Endpoint: TypeAlias = Literal["completions", "chat"]

#: Draws are below this; a draw's word is the remainder by the number of words.
DRAW_RANGE = 1 << 30

#: Asked for by the workload `structured`; small enough for a small model, with each common type.
PERSON_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "is_member": {"type": "boolean"},
        "role": {"enum": ["reader", "writer", "editor"]},
    },
    "required": ["name", "age", "is_member", "role"],
    "additionalProperties": False,
}
RESPONSE_FORMAT: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {"name": "person", "strict": True, "schema": PERSON_SCHEMA},
}


@dataclass(frozen=True, slots=True)
class Drawn:
    """A prompt of as many tokens as there are draws, after words that mean something."""

    draws: tuple[int, ...]
    before: str = ""


@dataclass(frozen=True, slots=True)
class Verbatim:
    """A given prompt: text, token ids, or the messages of a chat."""

    content: str | list[int] | list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a conversation."""

    prompt: Drawn | Verbatim
    max_tokens: int
    #: More fields of its body.
    fields: Mapping[str, Any] = field(default_factory=dict)
    #: Of the message before the prompt.
    system: Drawn | None = None
    #: How long the client waits after the answer before it.
    think_s: float = 0.0
    #: Sent as the result of the calls in the answer before it, if there are any.
    is_result: bool = False


#: Turns that follow each other; each is sent after the answer to the one before it.
Conversation: TypeAlias = tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Lane:
    """A kind of request among others in a workload; lanes run side by side."""

    name: str
    #: How many conversations run at a time in a closed loop.
    concurrency: int
    make: Callable[[int], Conversation]
    #: How long a closed loop waits before the next conversation.
    think_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Workload:
    """Lanes, and the parts that all requests share. The first lane decides when a run is over."""

    name: str
    lanes: tuple[Lane, ...]
    num_conversations: int
    endpoint: Endpoint = "completions"
    #: Whether answers end of themselves, rather than at `max_tokens`.
    ends_itself: bool = False
    response_format: Mapping[str, Any] | None = None
    #: Whether an answer must be JSON.
    asks_for_json: bool = False
    #: When the conversations of a trace are due; None for other workloads.
    due_s: tuple[float, ...] | None = None
    #: Its parameters, for the record.
    shape: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Shape:
    """The options of a preset; None leaves the preset's own."""

    seed: int = 0
    concurrency: int | None = None
    num_conversations: int | None = None
    prompt_tokens: int | None = None
    max_tokens: int | None = None
    endpoint: Endpoint | None = None
    #: Requests of an agent, one after another.
    num_turns: int | None = None
    #: False: a structured workload without its schema, for the ratio.
    has_schema: bool = True


def draws(num_tokens: int, *key: object) -> tuple[int, ...]:
    """Return draws that depend on the key alone."""
    # A string as a seed is hashed by `random` itself, the same in every process.
    chance = random.Random("/".join(map(str, key)))  # noqa: S311 - a workload is not a secret
    return tuple(chance.randrange(DRAW_RANGE) for _ in range(num_tokens))


def _fixed(shape: Shape, concurrency: int, prompt: int, out: int, name: str = "fixed") -> Workload:
    prompt = shape.prompt_tokens or prompt
    out = shape.max_tokens or out

    def make(number: int) -> Conversation:
        return (Turn(Drawn(draws(prompt, shape.seed, name, number)), out),)

    return of_one_lane(
        name, shape, concurrency, make, shaped={"prompt_tokens": prompt, "max_tokens": out}
    )


def _shared_prefix(shape: Shape) -> Workload:
    prefix_tokens, own_tokens = shape.prompt_tokens or 1000, 64
    out = shape.max_tokens or 32
    prefix = draws(prefix_tokens, shape.seed, "prefix")

    def make(number: int) -> Conversation:
        return (Turn(Drawn(prefix + draws(own_tokens, shape.seed, "suffix", number)), out),)

    shaped = {"prefix_tokens": prefix_tokens, "own_tokens": own_tokens, "max_tokens": out}
    return of_one_lane("shared-prefix", shape, 8, make, shaped=shaped)


def _multi_turn(shape: Shape) -> Workload:
    num_turns, first, later = 5, shape.prompt_tokens or 200, 50
    out = shape.max_tokens or 64

    def make(number: int) -> Conversation:
        return tuple(
            Turn(Drawn(draws(later if turn else first, shape.seed, "turn", number, turn)), out)
            for turn in range(num_turns)
        )

    shaped = {"turns": num_turns, "first_tokens": first, "later_tokens": later, "max_tokens": out}
    return of_one_lane("multi-turn", shape, 8, make, shaped=shaped, endpoint="chat", per_worker=2)


def _long_among_decodes(shape: Shape) -> Workload:
    long_tokens, think_s = shape.prompt_tokens or 1800, 1.0
    out = shape.max_tokens or 256
    streams = shape.concurrency or 8

    def stream(number: int) -> Conversation:
        return (Turn(Drawn(draws(32, shape.seed, "stream", number)), out),)

    def long(number: int) -> Conversation:
        return (Turn(Drawn(draws(long_tokens, shape.seed, "long", number)), 1),)

    return Workload(
        "long-among-decodes",
        (Lane("streams", streams, stream), Lane("long prompts", 1, long, think_s)),
        num_conversations=shape.num_conversations or 3 * streams,
        endpoint=shape.endpoint or "completions",
        shape={"long_tokens": long_tokens, "think_s": think_s, "max_tokens": out},
    )


def _mixed(shape: Shape) -> Workload:
    """Create prompts of 16 to 1,024 tokens and answers of 8 to 256, mostly short ones."""
    longest_prompt, longest_out = shape.prompt_tokens or 1024, shape.max_tokens or 256

    def make(number: int) -> Conversation:
        chance = random.Random(f"{shape.seed}/lengths/{number}")  # noqa: S311 - no secret
        prompt = _log_uniform(chance, min(16, longest_prompt), longest_prompt)
        out = _log_uniform(chance, min(8, longest_out), longest_out)
        return (Turn(Drawn(draws(prompt, shape.seed, "mixed", number)), out),)

    shaped = {"longest_prompt_tokens": longest_prompt, "most_tokens": longest_out}
    return of_one_lane("mixed", shape, 8, make, shaped=shaped, per_worker=8)


def _log_uniform(chance: random.Random, low: int, high: int) -> int:
    return round(math.exp(chance.uniform(math.log(low), math.log(high))))


def _structured(shape: Shape) -> Workload:
    out, own_tokens = shape.max_tokens or 96, shape.prompt_tokens or 32
    task = (
        "Invent a person who fits these words and answer with a JSON object that has the keys name "
        "(text), age (a whole number), is_member (true or false) and role (reader, writer or "
        "editor). The words: "
    )

    def make(number: int) -> Conversation:
        return (Turn(Drawn(draws(own_tokens, shape.seed, "person", number), task), out),)

    shaped = {"max_tokens": out, "has_schema": shape.has_schema}
    plain = of_one_lane("structured", shape, 8, make, shaped=shaped, endpoint="chat")
    return replace(
        plain,
        ends_itself=True,
        asks_for_json=True,
        response_format=RESPONSE_FORMAT if shape.has_schema else None,
    )


def of_one_lane(
    name: str,
    shape: Shape,
    concurrency: int,
    make: Callable[[int], Conversation],
    *,
    shaped: dict[str, Any],
    endpoint: Endpoint = "completions",
    per_worker: int = 4,
) -> Workload:
    """Return a workload of one lane; `per_worker`: conversations of each at a time."""
    concurrency = shape.concurrency or concurrency
    return Workload(
        name,
        (Lane("all", concurrency, make),),
        num_conversations=shape.num_conversations or per_worker * concurrency,
        endpoint=endpoint if endpoint == "chat" else shape.endpoint or endpoint,
        shape=shaped,
    )


#: Its description and constructor.
Preset: TypeAlias = tuple[str, Callable[[Shape], Workload]]
#: Name to preset.
WORDS_ALONE: dict[str, Preset] = {
    "c1": ("one at a time, 129 tokens in, 128 out", lambda s: _fixed(s, 1, 129, 128)),
    "c8": ("eight at a time, 129 in, 128 out", lambda s: _fixed(s, 8, 129, 128)),
    "c32": ("32 at a time, 129 in, 128 out", lambda s: _fixed(s, 32, 129, 128)),
    "shared-prefix": (
        "eight at a time share 1,000 tokens, 64 of their own, 32 out",
        _shared_prefix,
    ),
    "multi-turn": ("eight conversations of five turns, as chats", _multi_turn),
    "long-prompts": (
        "two at a time, 1,800 tokens in, 32 out",
        lambda s: _fixed(s, 2, 1800, 32, "long-prompts"),
    ),
    "long-among-decodes": ("eight streams, and long prompts beside them", _long_among_decodes),
    "mixed": ("16 to 1,024 tokens in, 8 to 256 out", _mixed),
    "structured": ("a JSON schema; --response-format none is its twin without", _structured),
}
