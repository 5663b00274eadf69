from __future__ import annotations

import pytest

from server.tools.declared import MISTRAL_THINK, THINK, call_syntax, opens_reasoning, think_tags

# The lines of the families' own templates in which they say how calls look.
QWEN = "{% if tools %}within <tool_call></tool_call> XML tags:\n{% endif %}</think><think>"
QWEN_CODER = "{% if tools %}<tool_call>\n<function=example>{% endif %}"
LLAMA_31 = "{% if tools is not none %}{{ '<|python_tag|>' }}{% endif %}"
LLAMA_32 = (
    """{% if tools %}Respond in the format {"name": function name, "parameters": ...{% endif %}"""
)
LLAMA_4 = LLAMA_32 + "<|python_start|>"
MISTRAL_V3 = "{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]"
SMOLLM2 = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (QWEN, "hermes"),
        (QWEN_CODER, None),
        (QWEN + "<tool_calls>[...]", None),
        (LLAMA_31, "llama"),
        (LLAMA_32, "llama"),
        (LLAMA_4, None),
        (MISTRAL_V3, "mistral"),
        (SMOLLM2, None),
    ],
)
def test_syntax_by_template(template: str, name: str | None) -> None:
    syntax = call_syntax({"default": template})
    assert (syntax.name if syntax else None) == name


def test_a_template_of_its_own_for_tools_decides() -> None:
    syntax = call_syntax({"default": SMOLLM2, "tool_use": QWEN})
    assert syntax is not None
    assert syntax.name == "hermes"


def test_think_tags() -> None:
    assert think_tags({"default": QWEN}) == THINK
    assert think_tags({"default": "[THINK]x[/THINK] <think></think>"}) == MISTRAL_THINK
    assert think_tags({"default": SMOLLM2}) is None


@pytest.mark.parametrize(
    ("prompt", "opens"),
    [("user\n<think>\n", True), ("<think>\n\n</think>\n\n", False), ("hello", False)],
)
def test_whether_the_prompt_opened_the_reasoning(prompt: str, opens: bool) -> None:
    assert opens_reasoning(prompt, THINK) is opens
