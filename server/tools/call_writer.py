"""Tells calls as they are read: the name first, then the arguments as strict JSON, bit by bit.

What has been told is never taken back, so a call is told while it is read only if its name is
that of an offered tool; any other is told once it is complete. Knows no format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from server.tools.events import ArgumentsDelta, CallEnded, CallStarted, CutCall, Event
from server.tools.source import TOOL_NAME, MismatchError, Source
from server.tools.typed import allows_only_strings, typed

_NAME = re.compile(TOOL_NAME)


class CallWriter:
    """Takes the parts of calls that readers find, in order; positions are in the source's text."""

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
        #: Calls that are complete.
        self.num_calls = 0
        #: The present call as far as it is not told: of a tool that was not offered.
        self._held: list[Event] = []
        self._is_held = False
        #: Whether a call has been told that is not complete.
        self.is_open = False
        self._properties: Mapping[str, Any] = {}
        self._keys: set[str] = set()

    def is_offered(self, name: str) -> bool:
        """Whether there is a tool of this name."""
        return name in self._tool_names

    def start(self, name: str, at: int) -> None:
        """Begin a call; `at`: where what says so ends. Raises `MismatchError` for a wrong name."""
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
        """Add JSON to the arguments; `at`: where what it was made of ends."""
        if text:
            self._add(ArgumentsDelta(text))
        if self.is_open:
            self._source.pos = at

    def end(self, at: int) -> None:
        """End the call, of which all has been said; what follows it begins at `at`."""
        self._events += [*self._held, CallEnded()]
        self._held, self.is_open = [], False
        self.num_calls += 1
        self._source.pos = at

    def cut(self, text: str = "") -> None:
        """Say that no more of the call comes; `text`: what is left of it."""
        self._held, self.is_open = [], False
        self._events.append(CutCall(text))

    def is_string(self, key: str) -> bool:
        """Whether the tool's schema has nothing but strings under this key."""
        return allows_only_strings(self._properties.get(key))

    def key(self, key: str, at: int) -> bool:
        """Begin a member of the arguments; False: there is one already, the first one counts."""
        if key in self._keys:
            return False
        self.json((", " if self._keys else "{") + f"{json.dumps(key, ensure_ascii=False)}: ", at)
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
