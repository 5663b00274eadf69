"""Which syntax a model speaks, by what its chat template says of it. Knows no template's language.

Templates are programs; what a family writes around calls stands in them as plain text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from server.tools.speech import ThinkTags
from server.tools.syntaxes import HERMES, LLAMA, MISTRAL, CallSyntax

THINK = ThinkTags("<think>", "</think>")
MISTRAL_THINK = ThinkTags("[THINK]", "[/THINK]", is_special=True)
#: What an operator may name (vLLM's names) where the template does not tell.
SYNTAXES: Mapping[str, CallSyntax | None] = {
    "none": None,
    "hermes": HERMES,
    "llama3_json": LLAMA,
    "mistral": MISTRAL,
}
TAGS: Mapping[str, ThinkTags | None] = {
    "none": None,
    "qwen3": THINK,
    "deepseek_r1": replace(THINK, is_implied=True),
    "mistral": MISTRAL_THINK,
}
#: Families that share a mark with one we read and write something else behind it.
_UNREAD_MARKS = (
    "<function=",
    "<invoke",
    "<tool_calls>",
    "<arg_key>",
    "<|python_start|>",
    "\uff5cDSML\uff5c",
)
_LLAMA_MARKS = ("<|python_tag|>", '{"name": function name, "parameters"')


def call_syntax(templates: Mapping[str, str], named: str = "auto") -> CallSyntax | None:
    """Return how calls are written; None if the templates know no tools or a way we cannot read.

    `templates`: sources by name; one named `tool_use` is the one that is used with tools.
    `named`: one of `SYNTAXES` instead.
    """
    if named != "auto":
        return SYNTAXES[named]
    source = templates.get("tool_use", templates.get("default", ""))
    if "tools" not in source or _has(source, _UNREAD_MARKS):
        return None
    if "[TOOL_CALLS]" in source:
        return MISTRAL
    if "<tool_call>" in source:
        return HERMES
    return LLAMA if _has(source, _LLAMA_MARKS) else None


def think_tags(templates: Mapping[str, str], named: str = "auto") -> ThinkTags | None:
    """Return what stands around reasoning; None if the templates know none.

    `named`: one of `TAGS` instead.
    """
    if named != "auto":
        return TAGS[named]
    for tags in (MISTRAL_THINK, THINK):
        if any(_has(source, (tags.opener, tags.closer)) for source in templates.values()):
            return tags
    return None


def opens_reasoning(prompt: str, tags: ThinkTags) -> bool:
    """Whether the prompt ends within reasoning, so that the output begins there."""
    end = prompt.rstrip()
    return end.endswith(tags.opener) or (tags.is_implied and not end.endswith(tags.closer))


def _has(source: str, marks: Iterable[str]) -> bool:
    return any(mark in source for mark in marks)
