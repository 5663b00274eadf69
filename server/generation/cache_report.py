"""The `octavo.cache` object of an answer: the reused tokens, and why no more were.

A client sees its own text alone: the reasons are those of its namespace, the words of its prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from scheduler.cache_story import CacheStory
from server.answer_types import CacheReport
from server.http.errors import Path, dotted
from server.text.tokenizer import Tokenizer

#: Tokens of the prompt in the report, before the first one that differs and from it on.
_SHOWN_TOKENS = 8


def cache_report(
    tokenizer: Tokenizer,
    story: CacheStory,
    prompt: Sequence[int],
    path_at: Callable[[int], Path],
) -> CacheReport:
    """Return the report of a prompt; `path_at`: gives the field that has a token."""
    report: CacheReport = {
        "reused_tokens": story.reused_tokens,
        "miss_reason": story.reason,
        "missed_tokens": story.missed_by_reason(),
    }
    if story.diverged_at is not None:
        token = story.diverged_at
        before = prompt[max(0, token - _SHOWN_TOKENS) : token]
        after = prompt[token : token + _SHOWN_TOKENS]
        report["diverged_at"] = {
            "token": token,
            "path": dotted(path_at(token)),
            "before": tokenizer.decode(before, skip_special_tokens=False),
            "after": tokenizer.decode(after, skip_special_tokens=False),
        }
    if story.eviction_cause:
        age_s = round(story.evicted_age_s, 3)
        report["evicted"] = {"cause": story.eviction_cause, "age_s": age_s}
    return report
