"""A model's output, piece by piece, to content, reasoning and calls.

The same output gives the same events' sum however it is cut. Text that may become a call is held
back until that is known, and reported unchanged if it is not a call. A call is reported while it is
read, and never taken back. Spaces around calls and reasoning belong to the template: they are left
out. Knows nothing of tokens or HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from server.tools.call_writer import CallWriter
from server.tools.events import Content, Event, Reasoning
from server.tools.harmony import HARMONY, MESSAGE_ENDS, Header, read_header
from server.tools.source import EndedError, MismatchError, Reading, Source
from server.tools.syntaxes import CallSyntax


@dataclass(frozen=True, slots=True)
class ThinkTags:
    """The marks that a model writes around its reasoning."""

    opener: str
    closer: str
    #: Whether they are special tokens in the model's vocabulary.
    is_special: bool = False
    #: Whether an output is reasoning up to the closer though nothing opened it.
    is_implied: bool = False
    #: Other ends of the reasoning, where the closer is missing.
    other_closers: tuple[str, ...] = ()
    #: Marks around content that are left out.
    frame: tuple[str, ...] = ()
    #: Whether an output is a list of messages with headers (`harmony.py`).
    has_messages: bool = False


@dataclass(frozen=True, slots=True)
class OutputSyntax:
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

    def __init__(self, syntax: OutputSyntax) -> None:
        self._syntax = syntax
        self._source = Source()
        self._events: list[Event] = []
        self._calls = CallWriter(self._source, self._events, syntax.tool_names, syntax.schemas)
        self._has_content = False
        self._has_reasoning = False
        self._reading = self._read()
        next(self._reading, None)

    def push(self, text: str) -> list[Event]:
        """Return the events that are certain once `text` follows."""
        self._source.text += text
        return self._advance()

    def finish(self) -> list[Event]:
        """Return the remaining events at the end of the output."""
        self._source.is_ended = True
        return self._advance()

    def check(self) -> None:
        """Assert that all text is reported, and once."""
        source = self._source
        assert 0 <= source.pos <= len(source.text), "more text is reported than there is"
        assert not source.is_ended or source.pos == len(source.text), "text was left at the end"
        assert not source.is_ended or not self._calls.is_open, "a call has no end"

    def _advance(self) -> list[Event]:
        next(self._reading, None)
        events = self._events.copy()
        self._events.clear()
        return events

    def _read(self) -> Reading[None]:
        tags, calls = self._syntax.tags, self._syntax.calls
        if calls is HARMONY or (tags is not None and tags.has_messages):
            yield from self._read_messages()
            return
        if tags is not None:
            yield from self._read_reasoning(tags)
        if calls is not None and calls.read_bare is not None:
            yield from self._read_bare(calls)
        markers = calls.markers if calls is not None else ()
        while True:
            marker = yield from self._read_content(markers, tags.frame if tags else ())
            if calls is None or not marker:
                return
            start = self._source.pos
            at = self._source.text.index(marker, start) + len(marker)
            yield from self._read_calls(calls.read(self._source, at, self._calls), at)

    def _read_messages(self) -> Reading[None]:
        """Read messages of the harmony format; text without a header is content."""
        source = self._source
        while not (source.is_ended and source.pos == len(source.text)):
            source.drop_reported()
            try:
                header = yield from read_header(source, 0)
            except EndedError:
                if not source.text.strip():
                    yield from self._read_message()
                    return
                self._calls.cut(source.text.strip())
                source.pos = len(source.text)
            except MismatchError:
                yield from self._read_message()
            else:
                yield from self._read_body(header)

    def _read_body(self, header: Header) -> Reading[None]:
        """Read the message behind a header, by its recipient and channel."""
        source, calls = self._source, self._syntax.calls
        source.pos = header.end
        if header.is_call and calls is not None:
            reading = calls.read(source, 0, self._calls)
            if not (yield from self._read_calls(reading, header.end)):
                yield from self._read_message()
        elif header.is_for_others:
            try:
                text, end, _ = yield from source.until(source.pos, *MESSAGE_ENDS)
            except EndedError:
                text, end = source.text[source.pos :], len(source.text)
            self._calls.cut(text)
            source.pos = end
        elif header.channel == "analysis" and self._syntax.tags is not None:
            yield from self._read_reasoning_until(MESSAGE_ENDS[:1])
        else:
            yield from self._read_message()

    def _read_message(self) -> Reading[None]:
        mark = yield from self._read_content(MESSAGE_ENDS)
        if mark:
            self._source.pos = self._source.text.index(mark, self._source.pos) + len(mark)

    def _read_reasoning(self, tags: ThinkTags) -> Reading[None]:
        source = self._source
        try:
            at = yield from source.space(0)
            yield from source.word(at, tags.opener)
            source.pos = at + len(tags.opener)
        except (MismatchError, EndedError):
            if not self._syntax.is_thinking:
                return
        yield from self._read_reasoning_until((tags.closer, *tags.other_closers))

    def _read_reasoning_until(self, closers: tuple[str, ...]) -> Reading[None]:
        source = self._source
        self._has_reasoning = True
        has_begun = False
        while True:
            source.drop_reported()
            end, closer = source.known_until(0, closers)
            text = source.text[:end].rstrip()
            source.pos = len(text)
            text = text if has_begun else text.lstrip()
            if text:
                has_begun = True
                self._events.append(Reasoning(text))
            if closer:
                source.pos = end + len(closer)
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
        if source.text[at] not in calls.bare_openers:
            return
        reading = calls.read_bare(source, at, self._calls)
        yield from self._read_calls(reading, at + 1, is_marked=False)

    def _read_calls(
        self, reading: Reading[None], opened: int, *, is_marked: bool = True
    ) -> Reading[bool]:
        """Report the calls that `reading` finds, and return whether there was nothing else.

        `opened`: the end of their marker.
        """
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
                self._report(source.text[source.pos : opened])
                source.pos = opened
            return False
        return True

    def _read_content(self, markers: tuple[str, ...], frame: tuple[str, ...] = ()) -> Reading[str]:
        """Report the text up to the next marker. Return the marker, or "" at the end."""
        source = self._source
        stops = markers + frame
        while True:
            if source.pos * 2 > len(source.text):
                # Not each time: an output of nothing but markers would be copied once for each.
                source.drop_reported()
            at, stop = source.known_until(source.pos, stops)
            text = self._reported(source.text[source.pos : at])
            self._report(text)
            source.pos += len(text)
            if stop in frame:
                source.pos = at + len(stop)
                continue
            if stop:
                return stop
            try:
                yield from source.more()
            except EndedError:
                rest = source.text[source.pos :]
                has_other = self._calls.num_calls or self._has_reasoning
                self._report(rest.rstrip() if has_other else rest)
                source.pos = len(source.text)
                return ""

    def _reported(self, text: str) -> str:
        """Return the text up to a marker without the spaces at its end, which are not reported."""
        calls = self._syntax.calls
        if calls is not None and calls.keeps_spaces and (self._has_content or text.strip()):
            return text
        return text.rstrip()

    def _report(self, text: str) -> None:
        """Report `text`, which stands at the source's position."""
        end = self._source.num_dropped + self._source.pos + len(text)
        if not self._has_content and (self._calls.num_calls or self._has_reasoning):
            text = text.lstrip()
        if text:
            self._has_content = True
            self._events.append(Content(text, end - len(text)))
