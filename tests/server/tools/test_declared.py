from __future__ import annotations

from typing import get_args

import pytest

from configs.schema import ModelSection, ToolCallParser
from server.tools.declared import (
    GEMMA_THOUGHT,
    HARMONY_ANALYSIS,
    KIMI_K3_THINK,
    MISTRAL_THINK,
    SYNTAXES,
    TAGS,
    THINK,
    call_syntax,
    opens_reasoning,
    think_tags,
)

# The lines of the families' own templates that describe the syntax of calls.
QWEN = "{% if tools %}within <tool_call></tool_call> XML tags:\n{% endif %}</think><think>"
QWEN_CODER = "{% if tools %}<tool_call>\n<function=example>{% endif %}"
LLAMA_31 = "{% if tools is not none %}{{ '<|python_tag|>' }}{% endif %}"
LLAMA_32 = (
    """{% if tools %}Respond in the format {"name": function name, "parameters": ...{% endif %}"""
)
LLAMA_4 = LLAMA_32 + "<|python_start|>"
KIMI_K2 = "{{ tools }}<|tool_calls_section_begin|></think><think>"
KIMI_K3 = "{{ tools }}<|open|>think<|sep|>"
GEMMA_4 = "{{ tools }}<|tool_call>call:<|channel>thought"
GPT_OSS = "{{ tools }}<|start|>assistant to=functions.<|channel|>commentary json<|message|>"
GLM_45 = "{% if tools %}<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>{% endif %}"
DEEPSEEK_V3 = "{{ tools }}{{'<\uff5ctool\u2581calls\u2581begin\uff5c>'}}"
DEEPSEEK_V32 = '{{ tools }}{% set dsml_token = "\uff5cDSML\uff5c" %}'
MINIMAX = '{{ tools }}<invoke name="tool-name-1">'
MISTRAL_V3 = "{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]"
SMOLLM2 = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (QWEN, "hermes"),
        (QWEN_CODER, "qwen3_xml"),
        (GLM_45, "glm45"),
        (DEEPSEEK_V3, "deepseek_v3"),
        (DEEPSEEK_V3.replace("{{ tools }}", ""), None),
        (DEEPSEEK_V32, "deepseek_v32"),
        (MINIMAX, None),
        (QWEN + "<tool_calls>[...]", None),
        (LLAMA_31, "llama"),
        (LLAMA_32, "llama"),
        (LLAMA_4, "pythonic"),
        (KIMI_K2, "kimi_k2"),
        (KIMI_K3, "kimi_k3"),
        (GEMMA_4, "gemma4"),
        (GPT_OSS, "openai"),
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
    assert think_tags({"default": KIMI_K2}) == THINK
    assert think_tags({"default": KIMI_K3}) == KIMI_K3_THINK
    assert think_tags({"default": GEMMA_4}) == GEMMA_THOUGHT
    assert think_tags({"default": GPT_OSS}) == HARMONY_ANALYSIS


@pytest.mark.parametrize(
    ("prompt", "opens"),
    [("user\n<think>\n", True), ("<think>\n\n</think>\n\n", False), ("hello", False)],
)
def test_whether_the_prompt_opened_the_reasoning(prompt: str, opens: bool) -> None:
    assert opens_reasoning(prompt, THINK) is opens


def test_every_parser_an_operator_may_name_is_there() -> None:
    assert {*get_args(ToolCallParser)} == {"auto", *SYNTAXES}
    named = get_args(ModelSection.model_fields["reasoning_parser"].annotation)
    assert {*named} == {"auto", *TAGS}
    for name, syntax in SYNTAXES.items():
        assert call_syntax({"default": QWEN}, name) is syntax
    for name, tags in TAGS.items():
        assert think_tags({"default": SMOLLM2}, name) is tags
