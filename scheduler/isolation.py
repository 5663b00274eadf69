"""Finds the request that crashes engines, without ending the requests beside it.

Pure: requests, deaths and steps in, messages to the engine out. Knows nothing of processes.

Any request that an engine has begun may have crashed it. When a second engine dies with the same
requests at the same place, these are suspects: each is run alone for a while, one after another,
and all others wait. Only the death of an engine with one request counts against that request, and
two such deaths end it. A death by SIGKILL from outside counts half: an operator may have sent it,
or the kernel for want of memory.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from scheduler.client import EngineFaultError
from scheduler.messages import Begun, Cancel, Submit
from scheduler.streams import Stream, Streams

_log = logging.getLogger(__name__)

#: Engines in a row that died with a request, before it is run alone.
_MAX_DEATHS = 2
#: Weight of a death for the only request of the engine, and the weight that ends a request.
_OWN_WEIGHT, _OUTSIDE_WEIGHT, _MAX_WEIGHT = 2, 1, 4
#: Tokens after the place of a death that clear a request of it.
_CLEARING_TOKENS = 16
#: Turns alone double in length, since several requests together may be the cause.
_MAX_DOUBLINGS = 6


class Isolation:
    """Decides which streams an engine gets."""

    def __init__(self, streams: Streams, send: Callable[[Submit | Cancel], None]) -> None:
        self._streams = streams
        self._send = send
        self._has_engine = False
        #: How many requests the engine was ever given; the first few that it has begun with.
        self._num_given = 0
        self._begun: set[int] = set()
        #: Streams to be run alone, and the one that runs alone now.
        self._suspects: deque[Stream] = deque()
        self._alone: Stream | None = None

    @property
    def is_on(self) -> bool:
        """Whether suspects are run alone, and all others wait."""
        return self._alone is not None or bool(self._suspects)

    def send(self, message: Submit | Cancel) -> None:
        """Pass on a message of a stream; a new request may have to wait."""
        if isinstance(message, Submit):
            if self._has_engine and not self.is_on:
                self._give(self._streams.get(message.request_id))
        else:
            self._send(message)
            self.advance()

    def begin(self) -> None:
        """Give a new engine the requests it may run."""
        self._has_engine = True
        self._num_given = 0
        self._begun.clear()
        self._give_next()

    def note_begun(self, begun: Begun) -> None:
        """Note the requests that may crash the engine from now on."""
        if len(self._begun) <= 1:
            self._begun.update(begun.request_ids)
        self._streams.begin(begun)

    def advance(self) -> None:
        """End the turn of the request that runs alone, if it is due. Called after each step."""
        alone = self._alone
        if alone is None or not self._has_engine:
            return
        if not alone.is_over:
            if len(alone.sent_token_ids) < alone.suspicion.turn_ends:
                return
            if self._suspects:
                self._send(Cancel(alone.request_id))
                self._streams.renew(alone)
        self._give_next()

    def end(self) -> None:
        """Give the engine nothing more: it is dead, or about to be."""
        self._has_engine = False

    def judge(self, *, is_outside: bool) -> None:
        """Count the death of the engine, and end a request that is certain to be the cause.

        `is_outside`: it was killed from outside.
        """
        given = [stream for stream in self._streams.unfinished() if stream.is_given]
        involved = [stream for stream in given if stream.has_begun]
        if not involved and not is_outside:
            # The message itself may have crashed it.
            involved = given
        weight = _OUTSIDE_WEIGHT if is_outside else _OWN_WEIGHT
        is_certain = self._alone is not None or (len(self._begun) or self._num_given) == 1
        for stream in involved:
            _note_death(stream, weight if is_certain else 0)
        for stream in given:
            stream.is_given = stream.has_begun = False
        if self._alone is not None:
            # Repeated kills from outside must not hit the same request each time.
            is_last = is_outside and bool(involved)
            self._suspects.insert(len(self._suspects) if is_last else 0, self._alone)
            self._alone = None
        self._mark(involved)

    def _mark(self, involved: list[Stream]) -> None:
        num_suspects = len(self._suspects)
        for stream in involved:
            if stream.suspicion.weight >= _MAX_WEIGHT:
                _log.error("engines die of request %d; it is ended", stream.arrival)
                message = "the engine died twice or more while it ran nothing but this request"
                stream.fail(EngineFaultError(message))
            elif stream.suspicion.num_deaths >= _MAX_DEATHS and stream not in self._suspects:
                self._suspects.append(stream)
        if len(self._suspects) > num_suspects:
            message = "two engines died with the same %d requests; they are run one at a time"
            _log.error(message, len(self._suspects))

    def _give_next(self) -> None:
        self._alone = None
        while self._suspects and self._alone is None:
            stream = self._suspects.popleft()
            if not stream.is_over:
                self._alone = stream
                _begin_turn(stream)
                self._give(stream)
        if self._alone is None:
            for stream in self._streams.unfinished():
                if not stream.is_given:
                    self._give(stream)

    def _give(self, stream: Stream) -> None:
        message = stream.submit()
        stream.is_given = stream.was_given = True
        self._num_given += 1
        self._send(message)

    def check(self) -> None:
        """Assert that nothing runs beside the request that is run alone."""
        given = [stream for stream in self._streams.unfinished() if stream.is_given]
        assert self._alone is None or given in ([], [self._alone]), "something runs beside it"


def _note_death(stream: Stream, weight: int) -> None:
    suspicion, num_tokens = stream.suspicion, len(stream.sent_token_ids)
    if num_tokens - suspicion.num_tokens >= _CLEARING_TOKENS:
        suspicion.num_deaths = suspicion.weight = 0
    suspicion.num_deaths += 1
    suspicion.weight += weight
    suspicion.num_tokens = num_tokens


def _begin_turn(stream: Stream) -> None:
    suspicion = stream.suspicion
    num_tokens = _CLEARING_TOKENS << min(suspicion.num_turns, _MAX_DOUBLINGS)
    suspicion.turn_ends = len(stream.sent_token_ids) + num_tokens
    suspicion.num_turns += 1
