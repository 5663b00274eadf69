"""A model's output, piece by piece, to content, reasoning and calls.

The same output gives the same events' sum however it is cut. Text that may become a call is held
back until that is known; what turns out to be none is let out as it was. A call is told while it is
read; none is ever taken back. Spaces around calls and reasoning are the template's, not the
reader's: they are left out. Knows nothing of tokens or HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from server.tools.call_writer import CallWriter
from server.tools.events import Content, Event, Reasoning
from server.tools.source import EndedError, MismatchError, Reading, Source, first_of, num_begun
from server.tools.syntaxes import CallSyntax


@dataclass(frozen=True, slots=True)
class ThinkTags:
    """What a model writes around its reasoning."""

    opener: str
    closer: str
    #: Whether they are special tokens in the model's vocabulary.
    is_special: bool = False
    #: Whether an output is reasoning up to the closer though nothing opened it.
    is_implied: bool = False


@dataclass(frozen=True, slots=True)
class Speech:
    """How one output is to be read."""

    #: None: calls are not looked for.
    calls: CallSyntax | None = None
    tags: ThinkTags | None = None
    #: The prompt ended within the reasoning.
    is_thinking: bool = False
    #: Names of the tools that were offered.
    tool_names: frozenset[str] = field(default_factory=frozenset)
    #: The schemas of their arguments, by name.
    schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def has_special_marks(self) -> bool:
        """Whether special tokens must be left in the text for it to be read."""
        is_special = self.tags is not None and self.tags.is_special
        return is_special or (self.calls is not None and self.calls.has_special_marks)


class OutputParser:
    """Reads one output."""

    def __init__(self, speech: Speech) -> None:
        self._speech = speech
        self._source = Source()
        self._events: list[Event] = []
        self._calls = CallWriter(self._source, self._events, speech.tool_names, speech.schemas)
        self._has_content = False
        self._has_reasoning = False
        self._reading = self._read()
        next(self._reading, None)

    def push(self, text: str) -> list[Event]:
        """Return what is known now that `text` follows."""
        self._source.text += text
        return self._advance()

    def finish(self) -> list[Event]:
        """Return what is left now that nothing follows."""
        self._source.is_ended = True
        return self._advance()

    def check(self) -> None:
        """Assert that nothing is told twice or forgotten."""
        source = self._source
        assert 0 <= source.pos <= len(source.text), "the text told is not the text known"
        assert not source.is_ended or source.pos == len(source.text), "text was left at the end"
        assert not source.is_ended or not self._calls.is_open, "a call has no end"

    def _advance(self) -> list[Event]:
        next(self._reading, None)
        events = self._events.copy()
        self._events.clear()
        return events

    def _read(self) -> Reading[None]:
        if self._speech.tags is not None:
            yield from self._read_reasoning(self._speech.tags)
        calls = self._speech.calls
        if calls is not None and calls.read_bare is not None:
            yield from self._read_bare(calls)
        while True:
            marker = yield from self._read_content()
            if calls is None or not marker:
                return
            start = self._source.pos
            at = self._source.text.index(marker, start) + len(marker)
            yield from self._read_calls(calls.read(self._source, at, self._calls), at)

    def _read_reasoning(self, tags: ThinkTags) -> Reading[None]:
        source = self._source
        try:
            at = yield from source.space(0)
            yield from source.word(at, tags.opener)
            source.pos = at + len(tags.opener)
        except (MismatchError, EndedError):
            if not self._speech.is_thinking:
                return
        self._has_reasoning = True
        has_begun = False
        while True:
            source.drop_told()
            end = source.text.find(tags.closer)
            known = (
                end if end >= 0 else len(source.text) - num_begun(source.text, 0, (tags.closer,))
            )
            text = source.text[:known].rstrip()
            source.pos = len(text)
            text = text if has_begun else text.lstrip()
            if text:
                has_begun = True
                self._events.append(Reasoning(text))
            if end >= 0:
                source.pos = end + len(tags.closer)
                return
            try:
                yield from source.more()
            except EndedError:
                rest = source.text[source.pos :].rstrip()
                source.pos = len(source.text)
                if rest:
                    self._events.append(Reasoning(rest))
                return

    def _read_bare(self, calls: CallSyntax) -> Reading[None]:
        source = self._source
        assert calls.read_bare is not None, "the syntax has no bare calls"
        try:
            at = yield from source.space(source.pos)
        except EndedError:
            return
        if source.text[at] != calls.bare_opener:
            return
        reading = calls.read_bare(source, at, self._calls)
        yield from self._read_calls(reading, at + 1, is_marked=False)

    def _read_calls(
        self, reading: Reading[None], opened: int, *, is_marked: bool = True
    ) -> Reading[None]:
        """Tell the calls that `reading` finds; `opened`: where what announces them ends."""
        source, calls, num_before = self._source, self._calls, self._calls.num_calls
        try:
            yield from reading
        except EndedError:
            if is_marked or calls.is_open or calls.num_calls > num_before:
                calls.cut(source.text[source.pos :].strip())
                source.pos = len(source.text)
        except MismatchError:
            if calls.is_open:
                calls.cut()
            elif calls.num_calls == num_before:
                self._tell(source.text[source.pos : opened])
                source.pos = opened

    def _read_content(self) -> Reading[str]:
        """Tell the text up to the next marker. Return the marker, or "" at the end."""
        source = self._source
        markers = () if self._speech.calls is None else self._speech.calls.markers
        while True:
            if source.pos * 2 > len(source.text):
                # Not each time: an output of nothing but markers would be copied once for each.
                source.drop_told()
            at, marker = first_of(source.text, source.pos, markers)
            begun = num_begun(source.text, source.pos, markers)
            text = source.text[source.pos : at if marker else len(source.text) - begun].rstrip()
            self._tell(text)
            source.pos += len(text)
            if marker:
                return marker
            try:
                yield from source.more()
            except EndedError:
                rest = source.text[source.pos :]
                has_other = self._calls.num_calls or self._has_reasoning
                self._tell(rest.rstrip() if has_other else rest)
                source.pos = len(source.text)
                return ""

    def _tell(self, text: str) -> None:
        """Tell `text`, which stands at the source's position."""
        end = self._source.num_dropped + self._source.pos + len(text)
        if not self._has_content and (self._calls.num_calls or self._has_reasoning):
            text = text.lstrip()
        if text:
            self._has_content = True
            self._events.append(Content(text, end - len(text)))
