"""Digests of past prompts, to find the part of a later request that changed.

Has no text and no token of them. Pure bookkeeping: no clock, no I/O. Knows nothing of caches.
"""

from __future__ import annotations

import json
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import takewhile

from server.answer_types import Comparison
from server.generation.generation_spec import Conversation, PromptMessage
from server.generation.request_fields import GenerationSpec
from server.http.errors import dotted

#: Tokens from one digest of the tokens to the next.
_STRIDE_TOKENS = 16
_DIGEST_BYTES = 16
#: Of all fingerprints, and of the objects around the bytes of one.
_MAX_BYTES = 2**25
_OVERHEAD_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The digests of one prompt."""

    num_tokens: int
    #: Of the tokens up to each multiple of the stride, 8 bytes each.
    marks: bytes
    tools: bytes
    system: bytes
    messages: tuple[bytes, ...]
    #: By name, of the settings that change a prompt or share no pages.
    settings: dict[str, bytes]

    @property
    def num_bytes(self) -> int:
        """Size in memory, about."""
        num_digests = len(self.messages) + len(self.settings)
        return _OVERHEAD_BYTES + len(self.marks) + 4 * _DIGEST_BYTES * num_digests


def fingerprint_of(spec: GenerationSpec, token_ids: Sequence[int]) -> Fingerprint:
    """Return the digests of a chat's prompt. O(bytes of the request)."""
    chat, fields = spec.prompt, spec.fields
    assert isinstance(chat, Conversation), "texts have no parts to compare"
    num_system = _num_system(chat.messages)
    settings: dict[str, object] = {
        "cache_salt": fields.cache_salt,
        "kv_policy": str(spec.kv_policy),
        "truncate_prompt_tokens": fields.truncate_prompt_tokens,
        "add_special_tokens": chat.add_special_tokens,
        "reasoning_effort": chat.reasoning_effort,
        "chat_template_kwargs": chat.variables,
        "tool_choice": str(chat.tool_use),
    }
    return Fingerprint(
        num_tokens=len(token_ids),
        marks=_marks(token_ids),
        tools=_digest([tool.for_template() for tool in chat.tools]),
        system=_digest([dict(one.fields) for one in chat.messages[:num_system]]),
        messages=tuple(_digest(dict(one.fields)) for one in chat.messages[num_system:]),
        settings={name: _digest(value) for name, value in settings.items()},
    )


def compare(spec: GenerationSpec, new: Fingerprint, old: Fingerprint) -> Comparison:
    """Return the first difference of a request from an earlier one, and the tokens before it."""
    chat = spec.prompt
    assert isinstance(chat, Conversation), "texts have no parts to compare"
    num_same = _num_same_tokens(new, old)
    comparable_tokens = min(new.num_tokens, old.num_tokens)
    changed, path = _changed(chat, new, old)
    # A prompt that goes on with the same tokens is not changed by its settings.
    goes_on = comparable_tokens - num_same < _STRIDE_TOKENS
    if changed in new.settings and changed not in _SEPARATING and goes_on:
        changed = path = None
    if changed in _SEPARATING:
        num_same = 0
    return {
        "is_found": True,
        "changed": changed,
        "path": path,
        "reusable_tokens": num_same,
        "missed_tokens": 0 if changed is None else comparable_tokens - num_same,
    }


NOT_FOUND: Comparison = {
    "is_found": False,
    "changed": None,
    "path": None,
    "reusable_tokens": 0,
    "missed_tokens": 0,
}
#: Settings that share no pages although the tokens are the same.
_SEPARATING = ("cache_salt", "kv_policy")


def _changed(
    chat: Conversation, new: Fingerprint, old: Fingerprint
) -> tuple[str | None, str | None]:
    """Return the first part that changed, and the path of the message if it is one."""
    names = [name for name in new.settings if new.settings[name] != old.settings[name]]
    if separating := [name for name in names if name in _SEPARATING]:
        return separating[0], None
    if new.tools != old.tools:
        return "tools", "tools"
    if new.system != old.system:
        return "system", dotted(chat.messages[0].path) if chat.messages else None
    pairs = zip(new.messages, old.messages, strict=False)
    for index, (ours, theirs) in enumerate(pairs, _num_system(chat.messages)):
        if ours != theirs:
            return "messages", dotted(chat.messages[index].path)
    return (names[0] if names else None), None


def _num_system(messages: Sequence[PromptMessage]) -> int:
    roles = ("system", "developer")
    return sum(1 for _ in takewhile(lambda one: one.fields.get("role") in roles, messages))


def _num_same_tokens(new: Fingerprint, old: Fingerprint) -> int:
    ours, theirs = array("q", new.marks), array("q", old.marks)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))
    return _STRIDE_TOKENS * sum(1 for _ in same)


def _marks(token_ids: Sequence[int]) -> bytes:
    data, marks, mark = array("q", token_ids).tobytes(), array("q"), 0
    size = _STRIDE_TOKENS * array("q").itemsize
    for start in range(0, len(data) - size + 1, size):
        # Keyed by process, as digests of bytes are there.
        mark = hash((mark, data[start : start + size]))
        marks.append(mark)
    return marks.tobytes()


def _digest(value: object) -> bytes:
    text = json.dumps(value, default=str)
    return blake2b(text.encode(), digest_size=_DIGEST_BYTES).digest()


@dataclass(frozen=True, slots=True)
class _Kept:
    fingerprint: Fingerprint
    expires_at_s: float


class Fingerprints:
    """The fingerprints of the newest answers, each for its owner alone, for a time to live."""

    def __init__(self, *, max_count: int, ttl_s: float, max_bytes: int = _MAX_BYTES) -> None:
        self._max_count = max_count
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes
        self._num_bytes = 0
        # All live equally long, so the first one expires first.
        self._kept: OrderedDict[tuple[str, str], _Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, owner: str, answer_id: str, fingerprint: Fingerprint, now_s: float) -> None:
        """Keep the fingerprint of an answer, at the cost of the oldest ones."""
        self._drop(owner, answer_id)
        self._kept[owner, answer_id] = _Kept(fingerprint, now_s + self._ttl_s)
        self._num_bytes += fingerprint.num_bytes
        self.expire(now_s)
        while len(self._kept) > self._max_count or self._num_bytes > self._max_bytes:
            self._drop(*next(iter(self._kept)))

    def get(self, owner: str, answer_id: str, now_s: float) -> Fingerprint | None:
        """Return the fingerprint of an owner's answer, or None."""
        self.expire(now_s)
        kept = self._kept.get((owner, answer_id))
        return None if kept is None else kept.fingerprint

    def expire(self, now_s: float) -> None:
        """Drop the fingerprints that are too old."""
        while self._kept:
            name, oldest = next(iter(self._kept.items()))
            if oldest.expires_at_s > now_s:
                return
            self._drop(*name)

    def _drop(self, owner: str, answer_id: str) -> None:
        kept = self._kept.pop((owner, answer_id), None)
        self._num_bytes -= 0 if kept is None else kept.fingerprint.num_bytes

    def check(self) -> None:
        """Assert that the bounds hold, and that the order is that of the expiries."""
        num_bytes = sum(kept.fingerprint.num_bytes for kept in self._kept.values())
        assert num_bytes == self._num_bytes <= self._max_bytes, "bytes are miscounted"
        assert len(self._kept) <= self._max_count, "too many are kept"
        expiries = [kept.expires_at_s for kept in self._kept.values()]
        assert expiries == sorted(expiries), "the first one does not expire first"
