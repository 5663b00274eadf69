"""Which syntax a model speaks, by what its chat template says of it. Knows no template's language.

Templates are programs; what a family writes around calls stands in them as plain text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from server.tools.marked import DEEPSEEK
from server.tools.speech import ThinkTags
from server.tools.spelled import DSML, GLM, QWEN_XML
from server.tools.syntaxes import HERMES, LLAMA, MISTRAL, CallSyntax

THINK = ThinkTags("<think>", "</think>")
MISTRAL_THINK = ThinkTags("[THINK]", "[/THINK]", is_special=True)
#: What an operator may name (vLLM's names) where the template does not tell.
SYNTAXES: Mapping[str, CallSyntax | None] = {
    "none": None,
    "hermes": HERMES,
    "llama3_json": LLAMA,
    "mistral": MISTRAL,
    "qwen3_coder": QWEN_XML,
    "qwen3_xml": QWEN_XML,
    "glm45": GLM,
    "deepseek_v3": DEEPSEEK,
    "deepseek_v31": DEEPSEEK,
    "deepseek_v32": DSML,
}
TAGS: Mapping[str, ThinkTags | None] = {
    "none": None,
    "qwen3": THINK,
    "deepseek_r1": replace(THINK, is_implied=True),
    "mistral": MISTRAL_THINK,
}
#: What stands in the templates of each, to be looked for in this order: some share a mark, and are
#: told apart by another; None: it is not read here.
_MARKS: tuple[tuple[str, CallSyntax | None], ...] = (
    ("\uff5cDSML\uff5c", DSML),
    ("tool\u2581calls\u2581begin", DEEPSEEK),
    ("<arg_key>", GLM),
    ("<function=", QWEN_XML),
    ("<invoke", None),
    ("<tool_calls>", None),
    ("<|python_start|>", None),
    ("[TOOL_CALLS]", MISTRAL),
    ("<tool_call>", HERMES),
    ("<|python_tag|>", LLAMA),
    ('{"name": function name, "parameters"', LLAMA),
)


def call_syntax(templates: Mapping[str, str], named: str = "auto") -> CallSyntax | None:
    """Return how calls are written; None if the templates know no tools or a way we cannot read.

    `templates`: sources by name; one named `tool_use` is the one that is used with tools.
    `named`: one of `SYNTAXES` instead.
    """
    if named != "auto":
        return SYNTAXES[named]
    source = templates.get("tool_use", templates.get("default", ""))
    if "tools" not in source:
        return None
    return next((syntax for mark, syntax in _MARKS if mark in source), None)


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
