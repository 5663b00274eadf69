"""Calls as events while they are read: the name first, then the arguments as strict JSON in parts.

An event is never taken back, so only the call of an offered tool is reported while it is read. Any
other call is reported once it is complete. Knows no format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from server.text.json_text import dumped
from server.tools.events import ArgumentsDelta, CallEnded, CallStarted, CutCall, Event
from server.tools.source import TOOL_NAME, MismatchError, Reading, Source
from server.tools.typed import allows_only_strings, typed

_NAME = re.compile(TOOL_NAME)


class CallWriter:
    """Takes the parts of calls from readers, in order; positions are in the source's text."""

    def __init__(
        self,
        source: Source,
        events: list[Event],
        tool_names: AbstractSet[str],
        schemas: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self._source = source
        self._events = events
        self._tool_names = tool_names
        self._schemas = schemas
        #: Complete calls.
        self.num_calls = 0
        #: Events of the present call if its tool was not offered.
        self._held: list[Event] = []
        self._is_held = False
        #: Whether an incomplete call has been reported.
        self.is_open = False
        self._properties: Mapping[str, Any] = {}
        self._keys: set[str] = set()

    def is_offered(self, name: str) -> bool:
        """Return whether there is a tool of this name."""
        return name in self._tool_names

    def start(self, name: str, at: int) -> None:
        """Begin a call whose head ends at `at`. Raises `MismatchError` for an invalid name."""
        if not _NAME.fullmatch(name):
            raise MismatchError
        self._is_held = name not in self._tool_names
        self._held = []
        self.is_open = not self._is_held
        properties = self._schemas.get(name, {}).get("properties")
        self._properties = properties if isinstance(properties, Mapping) else {}
        self._keys = set()
        self._add(CallStarted(name))
        if self.is_open:
            self._source.pos = at

    def json(self, text: str, at: int) -> None:
        """Add JSON to the arguments; its source text ends at `at`."""
        if text:
            self._add(ArgumentsDelta(text))
        if self.is_open:
            self._source.pos = at

    def characters(self, at: int, *stops: str) -> Reading[tuple[int, str]]:
        """Add the text up to the first of `stops` to a JSON string, as it arrives.

        Returns the position of the stop, and the stop.
        """
        while True:
            end, stop = self._source.known_until(at, stops)
            self.json(dumped(self._source.text[at:end])[1:-1], end)
            if stop:
                return end, stop
            at = end
            yield from self._source.more()

    def end(self, at: int) -> None:
        """End the call, which is complete; the text behind it begins at `at`."""
        self._events += [*self._held, CallEnded()]
        self._held, self.is_open = [], False
        self.num_calls += 1
        self._source.pos = at

    def cut(self, text: str = "") -> None:
        """Report that the call stays incomplete; `text`: the part of it that is not reported."""
        self._held, self.is_open = [], False
        self._events.append(CutCall(text))

    def is_string(self, key: str) -> bool:
        """Return whether the tool's schema allows only strings under this key."""
        return allows_only_strings(self._properties.get(key))

    def key(self, key: str, at: int) -> bool:
        """Begin a member of the arguments. Returns False for a repeated key: the first counts."""
        if key in self._keys:
            return False
        self.json((", " if self._keys else "{") + f"{dumped(key)}: ", at)
        self._keys.add(key)
        return True

    def value(self, key: str, text: str, at: int, *, is_string: bool | None) -> None:
        """Add a member whose value is `text`; `is_string`: see `typed`."""
        written = typed(text, self._properties.get(key), is_string=is_string)
        if self.key(key, at):
            self.json(written, at)

    def end_members(self, at: int) -> None:
        """End a call whose arguments came member by member."""
        self.json("}" if self._keys else "{}", at)
        self.end(at)

    def _add(self, event: Event) -> None:
        (self._held if self._is_held else self._events).append(event)
