"""The syntax of a model's calls and reasoning, found by marks in its chat template.

Templates are programs; the marks that a family writes around calls stand in them as plain text.
Knows nothing of the templates' language.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from server.tools.harmony import HARMONY
from server.tools.notation import GEMMA, PYTHONIC
from server.tools.output_parser import ThinkTags
from server.tools.spelled import DSML, GLM, KIMI_K3, QWEN_XML
from server.tools.syntaxes import DEEPSEEK, HERMES, KIMI_K2, LLAMA, MISTRAL, CallSyntax

THINK = ThinkTags("<think>", "</think>")
MISTRAL_THINK = ThinkTags("[THINK]", "[/THINK]", is_special=True)
GEMMA_THOUGHT = ThinkTags("<|channel>thought", "<channel|>", is_special=True)
KIMI_K3_THINK = ThinkTags(
    "<|open|>think<|sep|>",
    "<|close|>think<|sep|>",
    is_special=True,
    other_closers=("<|open|>response<|sep|>",),
    frame=(
        *(f"<|{tag}|>{name}<|sep|>" for tag in ("open", "close") for name in ("response", "tools")),
        "<|close|>message<|sep|>",
    ),
)
#: Its closer begins the next message, as the end of a prompt does.
HARMONY_ANALYSIS = ThinkTags(
    "<|channel|>analysis<|message|>",
    "<|end|><|start|>assistant",
    is_special=True,
    has_messages=True,
)
#: By the names that an operator may set (vLLM's), where the template has no mark.
SYNTAXES: Mapping[str, CallSyntax | None] = {
    "none": None,
    "hermes": HERMES,
    "llama3_json": LLAMA,
    "llama4_json": PYTHONIC,
    "llama4_pythonic": PYTHONIC,
    "pythonic": PYTHONIC,
    "mistral": MISTRAL,
    "qwen3_coder": QWEN_XML,
    "qwen3_xml": QWEN_XML,
    "glm45": GLM,
    "glm47": GLM,
    "deepseek_v3": DEEPSEEK,
    "deepseek_v31": DEEPSEEK,
    "deepseek_v32": DSML,
    "kimi_k2": KIMI_K2,
    "kimi_k3": KIMI_K3,
    "gemma4": GEMMA,
    "openai": HARMONY,
}
TAGS: Mapping[str, ThinkTags | None] = {
    "none": None,
    "qwen3": THINK,
    "deepseek_r1": replace(THINK, is_implied=True),
    "mistral": MISTRAL_THINK,
    "kimi_k2": THINK,
    "kimi_k3": KIMI_K3_THINK,
    "gemma4": GEMMA_THOUGHT,
    "openai_gptoss": HARMONY_ANALYSIS,
}
#: Marks in the templates of each, in the order of the search: templates that share a mark differ in
#: an earlier one. None: a syntax that is not supported.
_MARKS: tuple[tuple[str, CallSyntax | None], ...] = (
    ("\uff5cDSML\uff5c", DSML),
    ("tool\u2581calls\u2581begin", DEEPSEEK),
    ("<|tool_calls_section_begin|>", KIMI_K2),
    ("<|open|>", KIMI_K3),
    ("<|tool_call>", GEMMA),
    ("<|channel|>", HARMONY),
    ("<arg_key>", GLM),
    ("<function=", QWEN_XML),
    ("<invoke", None),
    ("<tool_calls>", None),
    ("<|python_start|>", PYTHONIC),
    ("[TOOL_CALLS]", MISTRAL),
    ("<tool_call>", HERMES),
    ("<|python_tag|>", LLAMA),
    ('{"name": function name, "parameters"', LLAMA),
)
#: Marks in a template, in the order of the search, and the tags around the model's reasoning.
_THINK_MARKS: tuple[tuple[tuple[str, ...], ThinkTags], ...] = (
    (("[THINK]", "[/THINK]"), MISTRAL_THINK),
    (("<|open|>",), KIMI_K3_THINK),
    (("<|channel>",), GEMMA_THOUGHT),
    (("<|channel|>",), HARMONY_ANALYSIS),
    (("<think>", "</think>"), THINK),
)


def call_syntax(templates: Mapping[str, str], named: str = "auto") -> CallSyntax | None:
    """Return the syntax of calls; None if the templates have no tools or an unsupported syntax.

    `templates`: sources by name; the one named `tool_use`, if any, is used with tools.
    `named`: one of `SYNTAXES` instead.
    """
    if named != "auto":
        return SYNTAXES[named]
    source = templates.get("tool_use", templates.get("default", ""))
    if "tools" not in source:
        return None
    return next((syntax for mark, syntax in _MARKS if mark in source), None)


def think_tags(templates: Mapping[str, str], named: str = "auto") -> ThinkTags | None:
    """Return the tags around reasoning; None if the templates have none.

    `named`: one of `TAGS` instead.
    """
    if named != "auto":
        return TAGS[named]
    for marks, tags in _THINK_MARKS:
        if any(mark in source for source in templates.values() for mark in marks):
            return tags
    return None


def opens_reasoning(prompt: str, tags: ThinkTags) -> bool:
    """Return whether the prompt ends within reasoning, so that the output begins there."""
    end = prompt.rstrip()
    return end.endswith(tags.opener) or (tags.is_implied and not end.endswith(tags.closer))
