"""The tokens before a breakpoint, for templates that write blocks in their own ways."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, normalizers, pre_tokenizers

from server.generation.breakpoints import num_chars_before, num_tokens_before
from server.generation.generation_spec import Breakpoint
from server.text.template import ChatTemplate, SlowTemplateError, TemplateError
from server.text.token_bytes import BYTE_LEVEL_ALPHABET
from server.text.tokenizer import SpecialIds, Tokenizer

CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {}}} for name in ("add", "take")
]
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": [{"type": "text", "text": one} for one in ("Be brief.", "Sum.")]},
    {"role": "user", "content": "  1+1?  "},
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "2"},
    {"role": "user", "content": "Thanks."},
]
#: Tools first, and all that there is.
PLAIN = """\
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- for m in messages %}[{{ m.role }}]{{ m.content }}
{%- for call in m.tool_calls or [] %}<{{ call.function.name }}({{ call.function.arguments.a }})>
{%- endfor %}{% endfor %}
{%- if add_generation_prompt %}[answer]{% endif %}"""
#: The system prompt before the tools, as Qwen's.
TOOLS_SECOND = PLAIN.replace(
    "{%- if tools %}{{ tools | tojson }}{% endif %}",
    "{{- messages[0].content }}{% if tools %}{{ tools | tojson }}{% endif %}",
).replace("in messages", "in messages[1:]")
#: Spaces around texts are lost, as in Llama's.
TRIMMED = PLAIN.replace("{{ m.content }}", "{{ m.content | trim }}")


def _text_before(template: str, at: Breakpoint) -> str | None:
    made = ChatTemplate({"default": template}, special_tokens={}, now=lambda: datetime.now(tz=UTC))

    def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
        return made.render(messages, tools=tools)

    text = render(MESSAGES, TOOLS)
    num_chars = num_chars_before(at, text, MESSAGES, TOOLS, render)
    return None if num_chars is None else text[:num_chars]


@pytest.mark.parametrize(
    ("template", "at", "end"),
    [
        (PLAIN, {"tool": "take"}, '"take", "parameters": {}}}'),
        (PLAIN, {"message": 0, "part": 0}, "[system]Be brief."),
        (PLAIN, {"message": 0, "part": 1}, "[system]Be brief.\nSum."),
        (PLAIN, {"message": 1}, "[user]  1+1?  "),
        # The sign with which any next call begins is there, too.
        (PLAIN, {"message": 2, "call": 0}, "[assistant]<add(1)><"),
        (PLAIN, {"message": 2, "call": 1}, "[assistant]<add(1)><add(1)>"),
        (PLAIN, {"message": 3}, "[tool]2"),
        (PLAIN, {}, "[user]Thanks."),
        (TOOLS_SECOND, {"message": 0, "part": 1}, "Be brief.\nSum."),
        (TOOLS_SECOND, {"tool": "take"}, '"take", "parameters": {}}}'),
        (TRIMMED, {"message": 1}, "[user]1+1?"),
        (TRIMMED, {"message": 3}, "[tool]2"),
    ],
)
def test_the_prompt_up_to_a_block_ends_with_it(template: str, at: dict[str, Any], end: str) -> None:
    text = _text_before(template, Breakpoint((), "5m", **at))
    assert text is not None
    assert text.endswith(end)


def test_the_prompt_up_to_a_tool_has_no_other_tool_behind_it() -> None:
    text = _text_before(PLAIN, Breakpoint((), "5m", tool="add"))
    assert text is not None
    assert '"add", "parameters": {}}}' in text
    assert "take" not in text


@pytest.mark.parametrize(
    "at", [{"tool": "unknown"}, {"tool": "add"}, {"message": 2, "call": 0}, {"message": 1}]
)
def test_a_block_that_the_template_does_not_show_has_no_place(at: dict[str, Any]) -> None:
    assert _text_before("{{ messages[0].content }}", Breakpoint((), "5m", **at)) is None


def test_a_template_that_refuses_the_changed_text_gives_no_place() -> None:
    def refuse(_messages: object, _tools: object) -> str:
        raise TemplateError("no")

    assert num_chars_before(Breakpoint((), "5m"), "", MESSAGES, TOOLS, refuse) is None


def test_a_slow_template_is_rendered_again_elsewhere() -> None:
    def delay(_messages: object, _tools: object) -> str:
        raise SlowTemplateError("slow")

    with pytest.raises(SlowTemplateError):
        num_chars_before(Breakpoint((), "5m"), "", MESSAGES, TOOLS, delay)


def _tokenizer(normalizer: Any = None) -> Tokenizer:
    """Return a tokenizer of bytes, of which some pairs are one token."""
    merges = [("a", "b"), ("c", "d"), ("\u00c3", "\u00a9")]
    tokens = [*BYTE_LEVEL_ALPHABET, *("".join(pair) for pair in merges)]
    core = Core(models.BPE(vocab={one: i for i, one in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    if normalizer is not None:
        core.normalizer = normalizer
    return Tokenizer(core, SpecialIds())


@pytest.fixture(params=[None, normalizers.Lowercase()], ids=["exact", "normalized"])
def tokens_before(request: pytest.FixtureRequest) -> Callable[[str, int], tuple[int, int]]:
    """Return the tokens before a place in a text, and all of them."""
    tokenizer = _tokenizer(request.param)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def count(text: str, num_chars: int) -> tuple[int, int]:
        token_ids = encode(text)
        found = num_tokens_before(tokenizer, text, token_ids, num_chars, encode)
        return found, len(token_ids)

    return count


@pytest.mark.parametrize(
    ("text", "num_chars", "expected"),
    [
        ("xxabcd", 4, (3, 4)),
        ("xxabcd", 6, (4, 4)),
        ("xxabcd", 0, (0, 4)),
        # Within the token "cd".
        ("xxabcd", 5, (3, 4)),
        ("\u00e9x", 1, (1, 2)),
        ("XXab\u00e9cd", 4, (3, 5)),
    ],
)
def test_a_token_that_goes_on_behind_the_block_does_not_count(
    tokens_before: Callable[[str, int], tuple[int, int]],
    text: str,
    num_chars: int,
    expected: tuple[int, int],
) -> None:
    assert tokens_before(text, num_chars) == expected
