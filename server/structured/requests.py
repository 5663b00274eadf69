"""The grammar for the output of a request. Knows nothing of engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from server.generation.generation_spec import Conversation, OutputConstraint, ToolSpec
from server.generation.params import Warned, ignored, warning
from server.generation.request_fields import GenerationSpec
from server.generation.tooling import (
    ParserOptions,
    forced_tools,
    is_forced,
    prompt_end,
    tools_are_text,
)
from server.http.errors import ApiError, Path, dotted, invalid
from server.http.work import LONG_CHARS
from server.service import Service
from server.structured.grammar import (
    Form,
    Thinking,
    arguments_rule,
    call_rules,
    choice_form,
    json_form,
    json_rule,
    lark_form,
    literal,
    regex_form,
    special,
    whole,
)

#: Of the whole grammar. The library takes too long to refuse a larger one.
MAX_GRAMMAR_BYTES = 512 * 1024
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


async def text_grammar(service: Service, spec: GenerationSpec) -> tuple[str | None, list[Warned]]:
    """Return the grammar of a completion, with warnings for unenforced parts. Raises `ApiError`."""
    wanted = spec.constraint
    if wanted is None:
        return None, []
    form = await _read(service, wanted, spec.num_bytes)
    return await _judged(service, spec, whole(form), wanted.value_path)


async def chat_grammar(
    service: Service,
    spec: GenerationSpec,
    chat: Conversation,
    tools: Sequence[ToolSpec],
    parser_options: ParserOptions | None,
    prompt: Sequence[int],
) -> tuple[str | None, list[Warned]]:
    """Return the grammar of a chat's answer, with warnings for unenforced parts. Raises `ApiError`.

    `tools`: the callable ones. With a constraint and optional tools, the answer is either; where
    `tool_choice` forces a call, it is a call.
    """
    wanted, warnings = spec.constraint, list[Warned]()
    if wanted is None and not is_forced(chat):
        return None, []
    form = None if wanted is None else await _read(service, wanted, spec.num_bytes)
    if wanted is not None and is_forced(chat):
        warnings = [ignored(wanted.path, "tool_choice forces a call")]
        wanted = form = None
    thinking = None if parser_options is None else _thinking(service, parser_options, prompt)
    calls, paths = "", dict[str, Path]()
    if parser_options is not None and tools:
        calls, paths = _calls(service, chat, tools, parser_options)
    path: Path = ("tools",) if len(paths) > 1 else next(iter(paths.values()), ())
    if wanted is not None:
        path = wanted.value_path
    grammar = whole(form, thinking=thinking, calls=calls)
    grammar, relaxed = await _judged(service, spec, grammar, path, paths)
    return grammar, warnings + relaxed


async def _read(service: Service, wanted: OutputConstraint, num_bytes: int) -> Form:
    """Return the form of a constraint from a body of `num_bytes`. Raises `ApiError`."""
    # Grammars of llama.cpp take long.
    is_slow = wanted.kind == "grammar" and "::=" in wanted.value
    try:
        return await service.work.run(lambda _: _form(wanted), max(num_bytes, LONG_CHARS * is_slow))
    except ValueError as error:
        raise _unusable(wanted.path, error) from error


def _form(wanted: OutputConstraint) -> Form:
    match wanted.kind:
        case "regex":
            return regex_form(wanted.value)
        case "choice":
            return choice_form(wanted.value)
        case "grammar":
            return _lark(wanted.value)
        case "json":
            if "x-guidance" in wanted.value:
                raise ValueError("has the key x-guidance, which is the server's own")
            return json_form(
                wanted.value,
                is_lenient=wanted.is_lenient,
                whitespace=wanted.whitespace,
                is_compact=wanted.is_compact,
            )


def _lark(grammar: str) -> Form:
    if "%llguidance" in grammar:
        raise ValueError("says %llguidance, which is the server's own")
    if "::=" not in grammar:
        return lark_form(grammar)
    from llguidance.gbnf_to_lark import gbnf_to_lark  # noqa: PLC0415 - 20 ms that few need

    try:
        return lark_form(gbnf_to_lark(grammar))
    except Exception as error:
        raise ValueError(f"is no grammar of llama.cpp's kind: {error}") from error


def _thinking(
    service: Service, parser_options: ParserOptions, prompt: Sequence[int]
) -> Thinking | None:
    tags = parser_options.syntax.tags
    if tags is None or prompt_end(service, prompt).rstrip().endswith(tags.closer):
        return None
    closer = _mark(service, tags.closer)
    return Thinking(
        _mark(service, tags.opener),
        closer,
        tags.closer if closer == literal(tags.closer) else None,
        is_open=parser_options.syntax.is_thinking,
    )


def _mark(service: Service, text: str) -> str:
    """Return the term for a mark: its special token, if it is one."""
    tokenizer = service.text.tokenizer
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    if len(token_ids) == 1 and token_ids[0] in tokenizer.special_token_ids:
        return special(token_ids[0])
    return literal(text)


def _calls(
    service: Service, chat: Conversation, tools: Sequence[ToolSpec], parser_options: ParserOptions
) -> tuple[str, dict[str, Path]]:
    """Return the rules of the calls, and the field that each line about arguments comes from."""
    syntax, template = parser_options.syntax.calls, service.text.template
    assert syntax is not None, "callable tools, and no way to call them"
    assert template is not None, "a chat was rendered without a template"
    shown: list[tuple[str, str]] = []
    paths: dict[str, Path] = {}
    for index, tool in enumerate(forced_tools(chat, tools)):
        rule = _arguments(tool, arguments_rule(index))
        shown.append((tool.name, rule))
        paths[rule] = tool.schema_path
    # Tools as text ask for one call, and models without a format of their own seldom stop by
    # themselves: there only a request for several calls allows them.
    may_repeat = chat.has_parallel_calls
    if may_repeat is None:
        may_repeat = not tools_are_text(service)
    rules = call_rules(
        syntax.form_in(template.sources),
        shown,
        is_single=parser_options.is_named or not may_repeat,
        mark=lambda text: _mark(service, text),
    )
    return rules, paths


def _arguments(tool: ToolSpec, rule: str) -> str:
    """Return the rule for a tool's arguments, which are always an object."""
    schema, path = _NO_ARGUMENTS if tool.parameters is None else tool.parameters, tool.schema_path
    param = dotted(path)
    if "x-guidance" in schema:
        raise invalid(f"{param} has the key x-guidance, which is the server's own", path)
    kinds = schema.get("type", "object")
    if kinds != "object" and not (isinstance(kinds, list) and "object" in kinds):
        raise invalid(f"{param} must be of the type object", path)
    schema = {**schema, "type": "object"}
    try:
        return json_rule(rule, schema, is_lenient=not tool.is_strict)
    except ValueError as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: ValueError) -> ApiError:
    """Return the error for a form that cannot be read; the log does not get its text."""
    param = dotted(path)
    return invalid(f"{param} {error}", path, log_reason=f"{param} cannot be used")


async def _judged(
    service: Service,
    spec: GenerationSpec,
    grammar: str,
    path: Path,
    paths: Mapping[str, Path] = MappingProxyType({}),
) -> tuple[str, list[Warned]]:
    """Return the engine's grammar, with warnings for unenforced parts. Raises `ApiError`.

    `path`: the field that asked for it; `paths`: the fields that single lines of it come from.
    """
    param = dotted(path)
    if spec.fields.ignore_eos:
        message = f"ignore_eos cannot be had together with {param}: a form has an end"
        raise invalid(message, "ignore_eos")
    if not service.client.info.eos_token_ids:
        raise invalid(f"{param}: this model has no token that ends a text", path)
    if len(grammar) > MAX_GRAMMAR_BYTES:
        message = f"{param} is too large: {len(grammar)} characters of at most {MAX_GRAMMAR_BYTES}"
        raise invalid(message, path)
    verdict = await service.grammars.judge(grammar, service.client, service.text.tokenizer)
    if verdict.error:
        # An error without a line asks for the one before the first: there is none.
        line = "".join(grammar.split("\n")[verdict.error_line - 1 : verdict.error_line])
        path = paths.get(line, path)
        reason = f"{dotted(path)} cannot be enforced"
        raise invalid(f"{reason}: {verdict.error}", path, log_reason=reason)
    relaxed = [warning(param, f"is enforced but for this: {part}") for part in verdict.warnings]
    return verdict.grammar, relaxed
