"""Events of a parser for a model's output, in the order in which it was written."""

from __future__ import annotations

from collections.abc import Iterable
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
class CallStarted:
    """A call begins; the events up to its `CallEnded` or `CutCall` belong to it."""

    name: str
    #: Its arguments are a text: the tool is a custom one.
    is_custom: bool = False


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """More of a call's arguments: all of them together are an object of strict JSON, or a text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """The call is complete."""


@dataclass(frozen=True, slots=True)
class CutCall:
    """The output ended or went astray within a call; if one had started, it stays incomplete."""

    #: The part of the call's text that no event has reported.
    text: str


Event = Content | Reasoning | CallStarted | ArgumentsDelta | CallEnded | CutCall


def joined(events: Iterable[Event]) -> list[Event]:
    """Return the events with texts that follow each other as one, as if the output had no cuts."""
    whole: list[Event] = []
    for event in events:
        match whole[-1:], event:
            case [Content(before, start)], Content(text):
                whole[-1] = Content(before + text, start)
            case [Reasoning(before)], Reasoning(text):
                whole[-1] = Reasoning(before + text)
            case [ArgumentsDelta(before)], ArgumentsDelta(text):
                whole[-1] = ArgumentsDelta(before + text)
            case _:
                whole.append(event)
    return whole
