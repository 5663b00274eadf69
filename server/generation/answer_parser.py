"""Reads one output into the events that all APIs send.

Knows nothing of how calls and reasoning are parsed (`server/tools/`) nor of how responses look.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterable, Iterator

from server.answer_types import LeftOut
from server.generation.tooling import ParserOptions
from server.tools.custom import input_of
from server.tools.events import (
    ArgumentsDelta,
    CallEnded,
    CallStarted,
    Content,
    CutCall,
    Event,
    Reasoning,
)
from server.tools.output_parser import OutputParser, OutputSyntax

_ID_CHARS = string.ascii_letters + string.digits
_NUM_ID_CHARS = 24


def call_ids(
    rng: random.Random, parser_options: ParserOptions | None, prefix: str = "call_"
) -> Callable[[], str]:
    """Return a function that draws ids of calls; some templates accept none with a `prefix`."""
    calls = parser_options.syntax.calls if parser_options is not None else None
    num_chars = calls.id_chars if calls is not None else None

    def new_call_id() -> str:
        drawn = "".join(rng.choices(_ID_CHARS, k=num_chars or _NUM_ID_CHARS))
        return drawn if num_chars else prefix + drawn

    return new_call_id


class AnswerParser:
    """Reads one output to the events that the client receives, in order."""

    def __init__(self, parser_options: ParserOptions | None) -> None:
        """`parser_options`: None for plain text."""
        self._options = parser_options or ParserOptions(OutputSyntax())
        self._parser = None if parser_options is None else OutputParser(parser_options.syntax)
        #: Of plain text.
        self._num_chars = 0
        #: Complete calls among the events.
        self.num_calls = 0
        self._num_started = 0
        self._is_skipping = False
        #: Arguments of a custom tool's call; its input follows when they are complete.
        self._held: str | None = None
        #: Output that is in none of the events.
        self.left_out: LeftOut = {}

    def push(self, text: str) -> list[Event]:
        """Return the events that are certain after `text`."""
        if self._parser is None:
            start, self._num_chars = self._num_chars, self._num_chars + len(text)
            return [Content(text, start)] if text else []
        return self._shown(self._parser.push(text))

    def finish(self) -> list[Event]:
        """Return the remaining events at the end of the output."""
        return [] if self._parser is None else self._shown(self._parser.finish())

    def _shown(self, events: Iterable[Event]) -> list[Event]:
        return [event for event in self._with_inputs(events) if self._is_shown(event)]

    def _with_inputs(self, events: Iterable[Event]) -> Iterator[Event]:
        """Yield the events with the input of custom tools in place of their arguments."""
        for event in events:
            match event:
                case CallStarted(name) if name in self._options.custom_names:
                    self._held = ""
                    yield CallStarted(name, is_custom=True)
                case ArgumentsDelta(text) if self._held is not None:
                    self._held += text
                case CallEnded() if self._held is not None:
                    held, self._held = self._held, None
                    yield from (ArgumentsDelta(input_of(held)), event)
                case CutCall(text) if self._held is not None:
                    held, self._held = self._held, None
                    yield CutCall(held + text)
                case _:
                    yield event

    def _is_shown(self, event: Event) -> bool:
        match event:
            case Content():
                return True
            case Reasoning():
                return self._options.has_reasoning
            case CallStarted():
                is_single = not self._options.has_parallel_calls
                self._is_skipping = is_single and self._num_started > 0
                self._num_started += not self._is_skipping
                return not self._is_skipping
            case ArgumentsDelta():
                return not self._is_skipping
            case CallEnded():
                if self._is_skipping:
                    self.left_out["num_tool_calls"] = self.left_out.get("num_tool_calls", 0) + 1
                else:
                    self.num_calls += 1
            case CutCall(text):
                if not self._is_skipping:
                    self.left_out["cut_tool_call"] = self.left_out.get("cut_tool_call", "") + text
        # The end of a call ends its being skipped.
        was_skipping, self._is_skipping = self._is_skipping, False
        return not was_skipping
