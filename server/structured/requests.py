"""What a request says of the form of its answer, as one grammar. Knows nothing of engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from server.generation.params import Warned
from server.generation.tooling import (
    ParserOptions,
    forced_tools,
    is_forced,
    numbered,
    prompt_end,
    tools_are_text,
)
from server.http.errors import ApiError, invalid
from server.http.work import LONG_CHARS
from server.openai.schemas import ChatRequest, GenerateFields
from server.service import Service
from server.structured.calls import arguments_rule, call_rules
from server.structured.grammar import (
    Form,
    Thinking,
    choice_form,
    json_form,
    json_rule,
    lark_form,
    literal,
    regex_form,
    special,
    whole,
)
from server.structured.schemas import ResponseFormat, StructuredOutputs
from server.tools.forms import call_form
from server.tools.schemas import Tool, ToolFunction

#: Of the whole grammar. What is larger takes the library too long to refuse.
MAX_GRAMMAR_BYTES = 512 * 1024
_ANY_OBJECT: dict[str, Any] = {"type": "object"}
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class _Asked:
    """A form and the field it was asked for in."""

    form: Form
    param: str


async def completion_grammar(
    service: Service, request: GenerateFields
) -> tuple[str | None, list[Warned]]:
    """Return the grammar of a completion, and what of it is not enforced. Raises `ApiError`."""
    asked = await _asked(service, request)
    if asked is None:
        return None, []
    return await _judged(service, request, whole(asked.form), asked.param)


async def chat_grammar(
    service: Service,
    request: ChatRequest,
    tools: Sequence[Tool],
    parser_options: ParserOptions | None,
    prompt: Sequence[int],
) -> tuple[str | None, list[Warned]]:
    """Return the grammar of a chat's answer, and what of it is not enforced. Raises `ApiError`.

    `tools`: the callable ones. With a form and tools to choose from, the answer is either; where
    `tool_choice` forces a call, it is a call.
    """
    asked, has_calls = await _asked(service, request), is_forced(request)
    if asked is None and not has_calls:
        return None, []
    warnings: list[Warned] = []
    if asked is not None and has_calls:
        warnings, asked = [_without_effect(asked)], None
    thinking = None if parser_options is None else _thinking(service, parser_options, prompt)
    form = None if asked is None else asked.form
    calls, fields = "", dict[str, str]()
    if parser_options is not None and tools:
        calls, fields = _calls(service, request, tools, parser_options)
    param = "tools" if len(fields) > 1 else "".join(fields.values())
    grammar = whole(form, thinking=thinking, calls=calls)
    param = asked.param if asked else param
    grammar, relaxed = await _judged(service, request, grammar, param, fields)
    return grammar, warnings + relaxed


def _without_effect(asked: _Asked) -> Warned:
    """Return the warning for a form beside a forced call."""
    param = asked.param.partition(".")[0]
    return {"param": param, "message": f"{param} was ignored: tool_choice forces a call"}


async def _asked(service: Service, request: GenerateFields) -> _Asked | None:
    """Return the one form that is asked for, if there is one."""
    named = _readers(request)
    if not named:
        return None
    if len(named) > 1:
        first, second, *_ = named
        raise invalid(f"{first} and {second} exclude each other", second)
    [(name, read)] = named.items()
    try:
        return await service.work.run(lambda _: read(), _num_chars(request))
    except ValueError as error:
        raise _unusable(name, error) from error


def _readers(request: GenerateFields) -> dict[str, Callable[[], _Asked]]:
    """Return by field what reads it, of those that are given."""
    readers: dict[str, Callable[[], _Asked]] = {}
    if request.response_format is not None and request.response_format.type != "text":
        readers["response_format"] = partial(_response_format, request.response_format)
    if request.structured_outputs is not None:
        readers["structured_outputs"] = partial(_structured_outputs, request.structured_outputs)
    for name in ("json", "regex", "choice", "grammar"):
        value = getattr(request, f"guided_{name}")
        if value is not None:
            # What vLLM called it before.
            alias = StructuredOutputs.model_validate({name: value})
            readers[f"guided_{name}"] = partial(_structured_outputs, alias, f"guided_{name}")
    return readers


def _num_chars(request: GenerateFields) -> int:
    """Return how long it takes to read, as `Workshop` counts: grammars of llama.cpp take long."""
    outputs = request.structured_outputs
    grammar = request.guided_grammar or (outputs.grammar if outputs is not None else None)
    is_slow = grammar is not None and "::=" in grammar
    return max(request.num_bytes, LONG_CHARS * is_slow)


def _response_format(wanted: ResponseFormat) -> _Asked:
    named = wanted.json_schema
    if named is None:
        return _Asked(_json(_ANY_OBJECT), "response_format")
    schema = _ANY_OBJECT if named.given is None else named.given
    form = _json(schema, is_lenient=named.strict is not True)
    return _Asked(form, "response_format.json_schema.schema")


def _structured_outputs(wanted: StructuredOutputs, alias: str | None = None) -> _Asked:
    """Read it; `alias`: the field it came in, if it was an older one."""
    if wanted.regex is not None:
        name, form = "regex", regex_form(wanted.regex)
    elif wanted.choice is not None:
        name, form = "choice", choice_form(wanted.choice)
    elif wanted.grammar is not None:
        name, form = "grammar", _lark(wanted.grammar)
    else:
        name = "json_object" if wanted.given is None else "json"
        form = _json(
            _ANY_OBJECT if wanted.given is None else wanted.given,
            whitespace=wanted.whitespace_pattern,
            is_compact=wanted.disable_any_whitespace is True,
        )
    return _Asked(form, alias or f"structured_outputs.{name}")


def _json(
    schema: dict[str, Any],
    *,
    is_lenient: bool = False,
    whitespace: str | None = None,
    is_compact: bool = False,
) -> Form:
    if "x-guidance" in schema:
        raise ValueError("has the key x-guidance, which is the server's own")
    return json_form(schema, is_lenient=is_lenient, whitespace=whitespace, is_compact=is_compact)


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
    service: Service, request: ChatRequest, tools: Sequence[Tool], parser_options: ParserOptions
) -> tuple[str, dict[str, str]]:
    """Return the rules of the calls, and the field that each line about arguments comes from."""
    syntax, template = parser_options.syntax.calls, service.text.template
    assert syntax is not None, "callable tools, and no way to call them"
    assert template is not None, "a chat was rendered without a template"
    forced = {tool.function.name for tool in forced_tools(request, tools)}
    shown: list[tuple[str, str]] = []
    fields: dict[str, str] = {}
    for index, tool in numbered(request, tools):
        if tool.function.name in forced:
            param = f"tools.{index}.{tool.schema_field}"
            rule = _arguments(tool.function, param, arguments_rule(len(shown)))
            shown.append((tool.function.name, rule))
            fields[rule] = param
    rules = call_rules(
        call_form(syntax, template.sources),
        shown,
        is_single=parser_options.is_named or not _may_repeat(service, request),
        mark=lambda text: _mark(service, text),
    )
    return rules, fields


def _may_repeat(service: Service, request: ChatRequest) -> bool:
    """Whether a forced call may be followed by others.

    Where tools are shown as text, only on request: that text asks for one call, and models without
    a format of their own seldom know when to stop.
    """
    if request.parallel_tool_calls is None:
        return not tools_are_text(service)
    return request.parallel_tool_calls


def _arguments(function: ToolFunction, param: str, rule: str) -> str:
    """Return the rule for a tool's arguments, which are an object whatever its schema says."""
    schema = _NO_ARGUMENTS if function.parameters is None else function.parameters
    if "x-guidance" in schema:
        raise invalid(f"{param} has the key x-guidance, which is the server's own", param)
    kinds = schema.get("type", "object")
    if kinds != "object" and not (isinstance(kinds, list) and "object" in kinds):
        raise invalid(f"{param} must be of the type object", param)
    schema = {**schema, "type": "object"}
    try:
        return json_rule(rule, schema, is_lenient=function.strict is not True)
    except ValueError as error:
        raise _unusable(param, error) from error


def _unusable(param: str, error: ValueError) -> ApiError:
    """Return the error for a form that cannot be read; the log does not get its text."""
    return invalid(f"{param} {error}", param, log_reason=f"{param} cannot be used")


async def _judged(
    service: Service,
    request: GenerateFields,
    grammar: str,
    param: str,
    fields: Mapping[str, str] = MappingProxyType({}),
) -> tuple[str, list[Warned]]:
    """Return the grammar as the engine takes it, and what of it is not enforced. Raises `ApiError`.

    `param`: the field that asked for it; `fields`: those that single lines of it come from.
    """
    if request.ignore_eos:
        message = f"ignore_eos cannot be had together with {param}: a form has an end"
        raise invalid(message, "ignore_eos")
    info = service.client.info
    if not info.eos_token_ids:
        raise invalid(f"{param}: this model has no token that ends a text", param)
    if len(grammar) > MAX_GRAMMAR_BYTES:
        message = f"{param} is too large: {len(grammar)} characters of at most {MAX_GRAMMAR_BYTES}"
        raise invalid(message, param)
    verdict = await service.grammars.judge(grammar, service.client, service.text.tokenizer)
    if verdict.error:
        # An error without a line asks for the one before the first: there is none.
        line = "".join(grammar.split("\n")[verdict.error_line - 1 : verdict.error_line])
        param = fields.get(line, param)
        reason = f"{param} cannot be enforced"
        raise invalid(f"{reason}: {verdict.error}", param, log_reason=reason)
    told = "is enforced but for this: "
    return verdict.grammar, [
        {"param": param, "message": f"{param} {told}{warning}"} for warning in verdict.warnings
    ]
