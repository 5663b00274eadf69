"""Refusals of requests that can never run, or that find too much waiting already.

Knows nothing of how the scheduler runs the admitted requests.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from sys import maxsize

from cache.bounds import Bounds
from cache.kv_cache import KVCache
from cache.view import View
from configs.schema import SchedulerSection
from model.interface import ModelInfo
from scheduler.compaction import has_room, why_no_room
from scheduler.messages import Rejected, RejectKind, Submit
from scheduler.queue import WaitingQueue
from scheduler.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Room:
    """The room for new requests; waiting ones have the first claim to it."""

    num_free_slots: int
    num_free_pages: int
    page_size: int
    #: Tokens whose pages one sequence holds at a time, at most.
    max_held_tokens: int
    #: The same of the new request, whose view may be narrower than the model's.
    max_new_tokens: int = maxsize
    #: Of the windowed layers, where these have pages of their own.
    windowed: Room | None = None

    def is_enough(self, num_sequences: int, num_tokens: int) -> bool:
        """Return whether so many sequences with so many tokens could start, and go on for a page.

        Conservative: reuse of cached pages is not counted.
        """
        num_tokens = min(num_tokens, num_sequences * self.max_held_tokens)
        max_pages = (num_tokens + num_sequences * (self.page_size - 1)) // self.page_size
        # Each that is admitted keeps one page free for each that runs (see `Scheduler._admit`).
        max_pages += num_sequences - 1
        is_enough = num_sequences <= self.num_free_slots and max_pages <= self.num_free_pages
        if self.windowed is None or not is_enough:
            return is_enough
        return self.windowed.is_enough(num_sequences, num_tokens)


def room_in(cache: KVCache, view: View, num_free_slots: int, num_running: int) -> Room:
    """Return the room for a new request of a view."""
    *others, room = (
        Room(
            num_free_slots,
            # Each that runs may need one more.
            group.available_pages - num_running,
            group.bounds.page_size,
            group.bounds.max_held_tokens(group.view),
            group.bounds.max_held_tokens(group.search.own_view(view)),
        )
        for group in cache.groups
    )
    for other in others:
        room = replace(other, windowed=room)
    return room


def max_len(submit: Submit, info: ModelInfo, cache: KVCache) -> int:
    """Return the most tokens that a request may have, prompt and answer together."""
    view = submit.request.view
    if has_room(submit, cache.bounds):
        return info.max_len(view)
    longest = min(one.bounds.max_tokens(one.search.own_view(view)) for one in cache.groups)
    # The newest token of a sequence needs no place: its keys are never read.
    return min(info.max_len(view.within(info.view)), longest + 1)


def why_never(submit: Submit, max_len_tokens: int, bounds: Bounds) -> Rejected | None:
    """Return the refusal of a request that can never run."""
    num_tokens = submit.num_tokens
    request_id, invalid = submit.request_id, RejectKind.INVALID
    if not submit.request.prompt_token_ids:
        return Rejected(request_id, invalid, "the prompt has no tokens", "prompt")
    if num_tokens >= max_len_tokens:
        message = (
            f"the prompt has {num_tokens} tokens, which leaves no room for an answer: "
            f"at most {max_len_tokens} tokens fit, prompt and answer together"
        )
        return Rejected(request_id, invalid, message, "prompt")
    if message := why_no_room(submit, max_len_tokens, bounds):
        return Rejected(request_id, invalid, message, "kv_policy")
    return None


def why_not_now(
    submit: Submit,
    num_waiting: int,
    num_waiting_tokens: int,
    room: Room,
    config: SchedulerSection,
    max_queue: int | None = None,
) -> Rejected | None:
    """Return the refusal of a request that would have to wait where too much waits already.

    The limits are for requests that must wait: a burst that can start at once is never refused for
    arriving between two steps. An empty queue takes any request, or one longer than
    `max_queue_tokens` would always be refused. `max_queue`: in place of that of `config`.
    """
    if max_queue is None:
        max_queue = config.max_queue
    num_tokens = len(submit.request.prompt_token_ids)
    num_held_tokens = num_waiting_tokens + min(num_tokens, room.max_new_tokens)
    if submit.is_resumed or room.is_enough(num_waiting + 1, num_held_tokens):
        return None
    message = ""
    if num_waiting >= max_queue:
        message = f"{num_waiting} requests are waiting already, which is the limit"
        if not max_queue:
            message = "there is no room now, and no queue to wait in"
    elif num_waiting and num_waiting_tokens + num_tokens > config.max_queue_tokens:
        message = (
            f"requests of {num_waiting_tokens} tokens are waiting already; with the {num_tokens} "
            f"of this one they would be more than the limit of {config.max_queue_tokens}"
        )
    return Rejected(submit.request_id, RejectKind.BUSY, message) if message else None


def place_for(
    submit: Submit,
    waiting: WaitingQueue,
    room: Room,
    config: SchedulerSection,
    probe: Sequence | None = None,
) -> Rejected | list[Sequence]:
    """Return the sequences that must leave the queue to make room for a request, or its refusal.

    Sequences of lower priority leave that have not begun, the newest of the lowest first, and only
    as many as needed; if that is not enough, none. Preempted and resumed sequences can make a queue
    longer than its limit. Then one that leaves is enough, as the queue gets no longer: else a
    request of higher priority would be refused while one of lower priority waits. A waiting `probe`
    belongs to no request: it neither counts nor leaves.
    """
    num_waiting, num_tokens = len(waiting), waiting.num_tokens
    if probe is not None:
        num_waiting, num_tokens = num_waiting - 1, num_tokens - len(probe.token_ids)
    refused = why_not_now(submit, num_waiting, num_tokens, room, config)
    if refused is None:
        return []
    max_queue = max(config.max_queue, num_waiting) if config.max_queue else 0
    leaving: list[Sequence] = []
    for sequence in reversed(waiting):
        if sequence.request.priority <= submit.request.priority:
            break
        if sequence.has_begun or sequence is probe:
            continue
        leaving.append(sequence)
        num_waiting -= 1
        num_tokens -= len(sequence.token_ids)
        if why_not_now(submit, num_waiting, num_tokens, room, config, max_queue) is None:
            return leaving
    return refused


def displaced(sequence: Sequence) -> Rejected:
    """Return the refusal of a request that had to leave the queue."""
    message = "the queue is full, and a request of higher priority took the place of this one"
    return Rejected(sequence.request_id, RejectKind.BUSY, message)
