"""OpenAI's `prompt_cache_diagnostics`: why a response could not reuse the prompt of another."""

from __future__ import annotations

from server.answer_types import Comparison
from server.responses.response_models import CacheDiagnostics, CacheMissReason

#: By changed part, as `Comparison` names it.
_REASONS: dict[str, CacheMissReason] = {
    "kv_policy": "model_changed",
    "tools": "tools_changed",
    "system": "input_changed",
    "messages": "input_changed",
    "reasoning_effort": "reasoning_effort_changed",
}


def diagnostics_of(comparison: Comparison, num_prompt_tokens: int) -> CacheDiagnostics:
    """Return the field of the response."""
    changed = comparison["changed"]
    if not comparison["is_found"]:
        return {"type": "comparison_response_not_found"}
    if changed is None:
        return {"type": "cache_hit"}
    if changed not in _REASONS:
        return {"type": "unavailable"}
    return {
        "type": "cache_miss",
        "reason": _REASONS[changed],
        "cache_missed_tokens": num_prompt_tokens - comparison["reusable_tokens"],
        "comparison_reusable_tokens": comparison["reusable_tokens"],
    }
