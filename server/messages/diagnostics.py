"""Anthropic's `diagnostics`: why a message could not reuse the prompt of an earlier one."""

from __future__ import annotations

from server.answer_types import Comparison
from server.messages.response_models import CacheMissReason, CacheMissType, Diagnostics

#: By changed part, as `Comparison` names it.
_TYPES: dict[str, CacheMissType] = {
    "kv_policy": "model_changed",
    "system": "system_changed",
    "tools": "tools_changed",
    "messages": "messages_changed",
}


def diagnostics_of(comparison: Comparison | None) -> Diagnostics | None:
    """Return the field of the answer; None: nothing was compared, or nothing changed."""
    if comparison is None:
        return None
    if not comparison["is_found"]:
        return {"cache_miss_reason": {"type": "previous_message_not_found"}}
    changed = comparison["changed"]
    if changed is None:
        return None
    if changed not in _TYPES:
        return {"cache_miss_reason": {"type": "unavailable"}}
    reason: CacheMissReason = {
        "type": _TYPES[changed],
        "cache_missed_input_tokens": comparison["missed_tokens"],
    }
    return {"cache_miss_reason": reason}
