"""Plain English documents of seeded sentences, which a small model can repeat. Pure."""

from __future__ import annotations

import random
from itertools import cycle, islice

_PEOPLE = (
    "Maria", "Thomas", "Anna", "Daniel", "Clara", "Peter", "Laura", "Simon", "Julia", "Martin",
    "the farmer", "the teacher", "the old captain", "the doctor", "the young clerk", "her brother",
)  # fmt: skip
_PLACES = (
    "the river", "the village", "the harbor", "the school", "the market", "the bridge", "the mill",
    "the old church", "the railway station", "the garden", "the library", "the northern road",
)  # fmt: skip
_THINGS = (
    "a letter", "a small boat", "the broken clock", "two baskets of apples", "a map of the coast",
    "the keys of the house", "a box of books", "the last lantern", "an old coat", "a heavy stone",
)  # fmt: skip
_SENTENCES = (
    "{person} walked to {place} and carried {thing}.",
    "In the morning {person} found {thing} near {place}.",
    "{person} said that {other} had left {thing} at {place}.",
    "Nobody at {place} knew why {person} needed {thing}.",
    "After {number} days the water reached {place}, and {person} went home.",
    "{person} and {other} talked about {thing} until it was dark.",
    "There were {number} people at {place} when {person} arrived.",
    "{person} wanted to give {thing} to {other}, but {place} was closed.",
)
#: Of one sentence, by the tokenizer of a small model.
TOKENS_PER_SENTENCE = 14


def document(num_tokens: int, *key: object) -> str:
    """Return a text of about so many tokens, of which each key has one of its own."""
    chance = random.Random("/".join(map(str, key)))  # noqa: S311 - a workload is not a secret
    num_sentences = max(1, num_tokens // TOKENS_PER_SENTENCE)
    # Sentences of one form are far from each other: small models mix them up.
    forms = islice(cycle(chance.sample(_SENTENCES, len(_SENTENCES))), num_sentences)
    return " ".join(_sentence(chance, form) for form in forms)


def _sentence(chance: random.Random, form: str) -> str:
    person, other = chance.sample(_PEOPLE, 2)
    sentence = form.format(
        person=person,
        other=other,
        place=chance.choice(_PLACES),
        thing=chance.choice(_THINGS),
        number=chance.randint(3, 99),
    )
    return sentence[0].upper() + sentence[1:]
