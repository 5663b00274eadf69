"""A model's output, piece by piece, to content, reasoning and calls.

The same output gives the same events' sum however it is cut. Text that may become a call is held
back until that is known; what turns out to be none is let out as it was. Spaces around calls and
reasoning are the template's, not the reader's: they are left out. Knows nothing of tokens or HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from server.tools.events import Call, Content, CutCall, Event, Reasoning, SpelledCall
from server.tools.source import EndedError, MismatchError, Reading, Source
from server.tools.syntaxes import CallSyntax, read_bare
from server.tools.typed import typed_arguments


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


class SpeechParser:
    """Reads one output."""

    def __init__(self, speech: Speech) -> None:
        self._speech = speech
        self._source = Source()
        self._events: list[Event] = []
        self._num_calls = 0
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

    def _advance(self) -> list[Event]:
        next(self._reading, None)
        events, self._events = self._events, []
        return events

    def _read(self) -> Reading[None]:
        if self._speech.tags is not None:
            yield from self._read_reasoning(self._speech.tags)
        calls = self._speech.calls
        if calls is not None and calls.has_bare_calls:
            yield from self._read_bare()
        while True:
            marker = yield from self._read_content()
            if calls is None or not marker:
                return
            start = self._source.pos
            at = self._source.text.index(marker, start) + len(marker)
            yield from self._read_calls(calls.read(self._source, at, self._found), at)

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
            known = end if end >= 0 else len(source.text) - _begun(source.text, (tags.closer,))
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

    def _read_bare(self) -> Reading[None]:
        source = self._source
        try:
            at = yield from source.space(source.pos)
        except EndedError:
            return
        if source.text[at] != "{":
            return
        reading = read_bare(source, at, self._speech.tool_names, self._found)
        yield from self._read_calls(reading, at + 1, is_marked=False)

    def _read_calls(
        self, reading: Reading[None], opened: int, *, is_marked: bool = True
    ) -> Reading[None]:
        """Tell the calls that `reading` finds; `opened`: where what announces them ends."""
        source, num_before = self._source, self._num_calls
        try:
            yield from reading
        except EndedError:
            if is_marked or self._num_calls > num_before:
                self._events.append(CutCall(source.text[source.pos :].strip()))
                source.pos = len(source.text)
        except MismatchError:
            if self._num_calls == num_before:
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
            at, marker = _first(source.text, source.pos, markers)
            known = at if marker else len(source.text) - _begun(source.text[source.pos :], markers)
            text = source.text[source.pos : known].rstrip()
            self._tell(text)
            source.pos += len(text)
            if marker:
                return marker
            try:
                yield from source.more()
            except EndedError:
                rest = source.text[source.pos :]
                self._tell(rest.rstrip() if self._num_calls or self._has_reasoning else rest)
                source.pos = len(source.text)
                return ""

    def _found(self, call: Call | SpelledCall, end: int) -> None:
        self._num_calls += 1
        if isinstance(call, SpelledCall):
            schema = self._speech.schemas.get(call.name, {})
            call = Call(call.name, typed_arguments(call.values, schema))
        self._events.append(call)
        self._source.pos = end

    def _tell(self, text: str) -> None:
        """Tell `text`, which stands at the source's position."""
        end = self._source.num_dropped + self._source.pos + len(text)
        if not self._has_content and (self._num_calls or self._has_reasoning):
            text = text.lstrip()
        if text:
            self._has_content = True
            self._events.append(Content(text, end - len(text)))


def _first(text: str, start: int, markers: tuple[str, ...]) -> tuple[int, str]:
    """Return the first marker from `start` on and where it stands; (0, "") if there is none."""
    places = [(text.find(marker, start), marker) for marker in markers]
    return min(((at, marker) for at, marker in places if at >= 0), default=(0, ""))


def _begun(text: str, markers: tuple[str, ...]) -> int:
    """Return how many characters at the end of `text` may become a marker."""
    longest = max(map(len, markers), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in markers):
            return length
    return 0
