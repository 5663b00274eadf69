"""What a parser tells of a model's output, in the order in which it was written."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str
    #: Where in the output it stands, in characters; it is there letter by letter.
    start_char: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text the model wrote for itself."""

    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """A whole call: it is told once its JSON is complete, so that none is ever taken back."""

    name: str
    #: An object of JSON, as the model wrote it.
    arguments: str


@dataclass(frozen=True, slots=True)
class SpelledValue:
    """An argument written as bare text."""

    key: str
    text: str
    #: Whether it is a string; None: the tool's schema says.
    is_string: bool | None = None


@dataclass(frozen=True, slots=True)
class SpelledCall:
    """A whole call whose arguments are bare texts: what they are is still to be found out."""

    name: str
    values: tuple[SpelledValue, ...]


@dataclass(frozen=True, slots=True)
class CutCall:
    """The output ended within a call; this is all there is of it."""

    text: str


Event = Content | Reasoning | Call | CutCall
