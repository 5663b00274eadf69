"""Renders chat messages to the text of a prompt, with the model's own Jinja template.

The environment is that of `transformers`, so that every template written for it works. Templates
come with the model and run in a sandbox; requests are only data. Knows nothing of tokens or of
HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn, TypeVar, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from server.text.json_text import read_value, with_escapes, without_surrogates
from server.text.quoting import with_marks
from server.text.sandbox import BoundedEnvironment, LimitError

ValueT = TypeVar("ValueT")

#: Exceptions that a template, being a program, may raise on unexpected messages.
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
_PROBE = "octavo"
_PROBE_LIMIT_S = 0.05
#: The longest possible chat takes a fifth of it.
LIMIT_S = 2.0
#: The end of a final message to be continued: private characters, and a tab that trimming removes.
_MARK, _MARK_SPACE = "\ue000octavo\ue001", "\t"


class _RefusedError(jinja2.TemplateError):
    """The template called `raise_exception` with a message for the client."""


class TemplateError(ValueError):
    """Messages that the template refuses, in its own words, or a template that is not Jinja."""

    def __init__(self, message: str, message_index: int | None = None) -> None:
        super().__init__(message)
        #: Position of the message at fault, if known.
        self.message_index = message_index


class SlowTemplateError(TemplateError):
    """A render that takes longer than it may."""


class ChatTemplate:
    """A model's chat template, compiled once. Immutable; may be used from any thread.

    A message's content may be a string or a list of text parts. Most templates read only strings:
    they get the parts' texts joined by a newline (as in vLLM). Templates that only read parts get a
    string as one text part. Arguments of calls are a string of JSON, which most templates need as
    an object. One trial render finds the kind of a template.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        *,
        special_tokens: Mapping[str, str],
        now: Callable[[], datetime],
    ) -> None:
        """Compile `sources`: one is named `default`; `tool_use`, if any, is for calls with tools.

        `special_tokens`: variables such as `bos_token`. Raises `TemplateError` with the template's
        name and line if one is not valid Jinja.
        """
        #: By name.
        self.sources = dict(sources)
        self._environment = environment = _environment(now)
        environment.globals.update(special_tokens)
        self._templates = {
            name: _compile(environment, name, source) for name, source in sources.items()
        }
        if "default" not in self._templates:
            names = ", ".join(sorted(sources))
            raise TemplateError(f"there is no chat_template named default among: {names}")
        self._wants_parts = {name: self._reads_only_parts(name) for name in self._templates}
        self._wants_json = {name: self._reads_only_json(name) for name in self._templates}
        #: Whether the template shows tools to the model.
        self.shows_tools = "tools" in sources.get("tool_use", sources["default"])
        #: Whether the template shows system messages to the model.
        self.shows_system = self._reads_system()

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        /,
        *,
        add_generation_prompt: bool = True,
        continues_final: bool = False,
        tools: Sequence[Mapping[str, object]] | None = None,
        quote: Callable[[str], str] | None = None,
        limit_s: float = LIMIT_S,
        **kwargs: object,
    ) -> str:
        """Return the prompt, to be encoded without adding special tokens: it has its own.

        `continues_final`: end it with the last message's content, to be continued, and without a
        generation prompt (`continue_final_message` in transformers). `quote` is applied to each
        text in the messages, tools and `kwargs`. `limit_s`: processor time. `kwargs`: further
        variables for the template. Raises `TemplateError` for messages that the template refuses
        or a part of content that is not text, `SlowTemplateError` after `limit_s`.
        """
        if continues_final:
            messages = [*messages[:-1], _marked(messages[-1])]
            add_generation_prompt = False
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        wants_parts = self._wants_parts[name]
        reading = _Reading()
        tracked = [
            _Message(
                _quoted(
                    _prepared(
                        message, index, wants_parts=wants_parts, wants_json=self._wants_json[name]
                    ),
                    quote,
                ),
                index,
                reading,
            )
            for index, message in enumerate(messages)
        ]
        try:
            with self._environment.limited(limit_s):
                text = self._templates[name].render(
                    {"documents": None, **_quoted(kwargs, quote)},
                    messages=tracked,
                    tools=_quoted(tools, quote),
                    add_generation_prompt=add_generation_prompt,
                )
        except LimitError as error:
            kind = SlowTemplateError if error.is_slow else TemplateError
            raise kind(str(error), reading.index) from error
        except _RefusedError as error:
            raise TemplateError(str(error), reading.index) from error
        except _TEMPLATE_FAULTS as error:
            message = f"the chat template failed: {type(error).__name__}: {error}"
            raise TemplateError(message, reading.index) from error
        text = without_surrogates(text)
        return _up_to_mark(text, len(messages) - 1) if continues_final else text

    def _reads_system(self) -> bool:
        probes = [{"role": "system", "content": _PROBE}, {"role": "user", "content": ""}]
        wants_parts = self._wants_parts["default"]
        return self._shows(
            "default",
            *(_prepared(one, 0, wants_parts=wants_parts, wants_json=True) for one in probes),
        )

    def _reads_only_parts(self, name: str) -> bool:
        """Return whether content is shown as a list of parts, but not as a string."""

        def shows(content: object) -> bool:
            return self._shows(name, {"role": "user", "content": content})

        return not shows(_PROBE) and shows([{"type": "text", "text": _PROBE}])

    def _reads_only_json(self, name: str) -> bool:
        """Return whether a call's arguments are shown as a string of JSON, but not as an object."""

        def shows(arguments: object) -> bool:
            function = {"name": "f", "arguments": arguments}
            call = {"id": "call12345", "type": "function", "function": function}
            message = {"role": "assistant", "content": "", "tool_calls": [call]}
            return self._shows(name, {"role": "user", "content": ""}, message)

        return not shows({"a": _PROBE}) and shows(json.dumps({"a": _PROBE}))

    def _shows(self, name: str, *messages: Mapping[str, object]) -> bool:
        try:
            with self._environment.limited(_PROBE_LIMIT_S):
                text = self._templates[name].render(
                    messages=[*messages], add_generation_prompt=True
                )
        except _TEMPLATE_FAULTS:
            return False
        return _PROBE in text


class _Reading:
    """The message that the template read last: the one at fault if it stops."""

    def __init__(self) -> None:
        self.index: int | None = None


class _Message(dict[str, object]):
    """A message that records each access by the template."""

    def __init__(self, message: Mapping[str, object], index: int, reading: _Reading) -> None:
        super().__init__(message)
        self._index = index
        self._reading = reading

    def __getitem__(self, key: str) -> object:
        self._reading.index = self._index
        return super().__getitem__(key)

    def get(self, key: str, default: object = None) -> object:
        self._reading.index = self._index
        return super().get(key, default)


class _Generation(Extension):
    """`{% generation %}`, which marks text for training and changes nothing here."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(now: Callable[[], datetime]) -> BoundedEnvironment:
    environment = BoundedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        extensions=[_Generation, loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.guard_filters()
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: now().strftime(layout)
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - the filter's signature in transformers
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002 - likewise
) -> str:
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return with_marks(text) if ensure_ascii else with_escapes(text)


def _compile(environment: jinja2.Environment, name: str, source: str) -> jinja2.Template:
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"template {name}, line {error.lineno}: {error}") from error


def _prepared(
    message: Mapping[str, object], index: int, *, wants_parts: bool, wants_json: bool
) -> Mapping[str, object]:
    """Return `message` with content and arguments of calls in the kind that the template reads."""
    prepared = dict(message)
    content = message.get("content")
    if isinstance(content, str) and wants_parts:
        prepared["content"] = [{"type": "text", "text": content}]
    elif isinstance(content, list):
        texts = [_part_text(part, index) for part in content]
        joined = "\n".join(texts)
        parts = [{"type": "text", "text": text} for text in texts]
        prepared["content"] = parts if wants_parts else joined
    calls = message.get("tool_calls")
    if isinstance(calls, list) and not wants_json:
        prepared["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
    return prepared


def _quoted(value: ValueT, quote: Callable[[str], str] | None) -> ValueT:
    """Return `value`, which came as JSON, with each text and key in it quoted."""
    if quote is None:
        return value
    quoted: Any = value
    if isinstance(value, str):
        quoted = quote(value)
    elif isinstance(value, dict):
        quoted = {quote(key): _quoted(inner, quote) for key, inner in value.items()}
    elif isinstance(value, list):
        quoted = [_quoted(inner, quote) for inner in value]
    return cast("ValueT", quoted)


def _marked(message: Mapping[str, object]) -> Mapping[str, object]:
    """Return `message` with the mark behind its content."""
    content, mark = message.get("content"), _MARK + _MARK_SPACE
    if isinstance(content, list) and content and isinstance(content[-1], Mapping):
        last = content[-1]
        return {**message, "content": [*content[:-1], {**last, "text": f"{last['text']}{mark}"}]}
    return {**message, "content": f"{content or ''}{mark}"}


def _up_to_mark(text: str, index: int) -> str:
    """Cut the text at the mark; a template that trims text also trims the content before it."""
    before, mark, behind = text.rpartition(_MARK)
    if not mark:
        raise TemplateError(
            "the template leaves this message out, so it cannot be continued", index
        )
    return before if behind.startswith(_MARK_SPACE) else before.rstrip()


def _part_text(part: object, index: int) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind != "text" or not isinstance(text, str):
        shown = kind if isinstance(kind, str) else type(part).__name__
        raise TemplateError(f"content part {shown!r} is not supported; only 'text' is", index)
    return text


def _with_parsed_arguments(call: object) -> object:
    """Return a call with its arguments, a string of JSON, parsed for templates.

    Invalid JSON stays a string, which most templates accept.
    """
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        return call
    try:
        arguments = read_value(function.get("arguments", ""))
    except (TypeError, ValueError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}
