"""docs/api.md, made from the schemas and the tables of parameters, so it cannot drift.

`python -m tools.api_table > docs/api.md`. Knows nothing of other servers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

import orjson
from pydantic import BaseModel

from server.generation import params, request_fields
from server.generation.params import Unsupported
from server.messages import params as message_params
from server.messages.schemas import MessagesRequest
from server.openai import schemas
from server.responses import params as responses_params
from server.responses import schemas as responses_schemas

_HEAD = """\
# Parameters

Made by `python -m tools.api_table > docs/api.md` from `server/openai/schemas.py`,
`server/generation/request_fields.py` and `server/generation/params.py`;
a test keeps it equal to them.

- **honoured**: it works as documented; a wrong value is a 400 that names it.
- **refused**: any value but a neutral one is a 400 that names it, never silence.
- **warned**: the request is served, and `octavo.warnings` in the answer names the parameter.
- **-**: not a parameter of this route; if it is sent all the same, it is warned of, like every
  unknown name.

The tests of this page send each parameter that it calls refused or warned of, and look at the
answer.

Several answers (`n`, `best_of`, a list of prompts) are at most 16 to a prompt and 64 to a request.
The prompt is computed once and counted once in `usage`; its completion tokens are those of all
answers, `best_of`'s unseen ones too. Answer `k` of a prompt has a seed made from (`seed`, `k`), and
the first has `seed` itself, so it is the answer that `n: 1` gives. `index` is prompt * n + k.

A prompt's own probabilities come in two shapes. `prompt_logprobs` is vLLM's: of a completion in
each choice, of a chat beside the choices. `echo` with `logprobs` is OpenAI's older one, for
completions only (evaluation harnesses use it: `max_tokens` 0 or 1, also as a stream). Such a prompt
is computed from its first token on, once for each answer, even if it is cached
(`octavo.cache.miss_reason` is `limited`); its pages are cached for others. An answer holds
at most 1,048,576 of these probabilities. Of an answer's tokens, a chat has those of reasoning and
calls too, a response those of its text alone; a token that is sent in part is among them.

`bad_words` are compared as tokens, written with a space before them and without: the same letters
in other tokens are not found. `allowed_token_ids` goes before them, and before `min_tokens`: where
both would leave nothing to sample, the allowed tokens are sampled.
"""

_MESSAGES = """
## Anthropic's Messages

`POST /v1/messages` and `POST /v1/messages/count_tokens` (which takes the fields that make the
prompt, and also counts prompts that do not fit). Templates, samplers and parsers are the same. The
differences:

- A field named in an error or a warning is named as here, by its path: `messages.2.content.0`.
- Content is text, `tool_use`, `tool_result` (of text), `thinking` and `redacted_thinking` (warned
  of: only its maker can read it). Pictures and documents are refused.
- Neighbours of one role become one message, their blocks joined by a line break. A last message
  of the assistant is gone on with.
- The result of a failed tool (`is_error`) is rendered behind a line `Error:`.
- `thinking` of the types `enabled` and `disabled`, and `output_config.effort`, set
  `enable_thinking` and `reasoning_effort` of the model's template. Where it has no such switch,
  they are warned of, and `thinking.budget_tokens` always. Reasoning comes as a
  `thinking` block, whose signature is empty; with the `display` `omitted` the block is too.
- `max_tokens` above the room in the context is cut, with a warning; an answer that reaches
  the context's end has the `stop_reason` `model_context_window_exceeded`.
- `usage`: `cache_read_input_tokens` were found in the cache; `cache_creation_input_tokens` were
  computed up to the last `cache_control`, by lifetime in `cache_creation`; `input_tokens` are the
  rest. Together they are the prompt. Without a `cache_control` all whole pages count as created.
- `max_tokens` 0 caches the prompt and writes nothing: `content` is empty, the `stop_reason`
  `max_tokens`. As at Anthropic it is refused with `stream`, with `thinking` enabled, with
  `output_config.format` and with a forced tool.
- A call's input is streamed as it is written, in `input_json_delta`s. If the limit cuts a call,
  `octavo.left_out.cut_tool_call` is there, and a whole answer's `input` holds the complete members.
- Errors are `{"type": "error", "error": {...}, "request_id": ...}`, with `param` and `code` in
  `error`; the header `request-id` has the id too. `octavo` stands in the message, and in a
  stream in `message_delta`.

| parameter | | |
|---|---|---|
"""
_RESPONSES_HEAD = """\
## Responses

`POST /v1/responses` is the chat behind other names: the rules above hold here too.
Made from `server/responses/schemas.py` and `server/responses/params.py`.

- `input`: a string, or items of the types `message` (parts `input_text`, `output_text`, `refusal`),
  `function_call`, `function_call_output`, `reasoning` and `item_reference`. Any other type of item,
  part or tool is a 400 that names it.
- `output`: items of the types `reasoning` (as `reasoning_text`), `message` and `function_call`.
- A stream ends with `response.completed`, or with `response.incomplete` where `max_output_tokens`
  or the context cut it; there is no `[DONE]`. One that fails ends with `response.failed` and an
  `error` event, at which OpenAI's client raises.
- `GET` and `DELETE /v1/responses/{id}` and `GET /v1/responses/{id}/input_items` know the responses
  that are stored: those of the API key in use, until the memory for them is needed, they were not
  used for a day, or the server restarts ([operations](operations.md)). One that failed, or whose
  client left, is not stored. A deleted one may have been gone on from: that keeps its text.
- `input_items` are those of the whole conversation.
- `usage.input_tokens_details.cache_write_tokens` are the computed tokens before the last breakpoint
  where the request has caching options, else all computed ones. With
  `prompt_cache_options.prewarm` the response is `completed` without output.

| parameter | | |
|---|---|---|
"""

_NOT_HERE = "-"


def page() -> str:
    """Return the whole document."""
    rows = [
        "| parameter | chat | completions | |",
        "|---|---|---|---|",
    ]
    for name, chat, completion, note in entries():
        rows.append(f"| `{name}` | {chat} | {completion} | {note} |")
    rows_of_messages = [f"| `{name}` | {said} | {note} |" for name, said, note in message_entries()]
    messages = _MESSAGES + "\n".join(rows_of_messages) + "\n"
    return _HEAD + "\n" + "\n".join(rows) + "\n" + messages + "\n" + _responses_section()


def responses_entries() -> Iterator[tuple[str, str, str]]:
    """Yield (name, its treatment by `/v1/responses`, a note): honoured ones first."""
    request = responses_schemas.ResponsesRequest
    chat = _said(schemas.ChatRequest, params.CHAT)
    said = _said(request, responses_params.RESPONSES)
    for name, reason in responses_schemas.WITHOUT_MEANING.items():
        said[name] = ("refused", reason)
    for name in ("text", "reasoning"):
        del said[name]
    said |= {
        "text.format": ("honoured", "as `response_format` of a chat"),
        "text.verbosity": chat["verbosity"],
        "reasoning.effort": chat["reasoning_effort"],
    }
    for name, known in responses_params.REASONING.items():
        said[f"reasoning.{name}"] = ("warned", known.reason)
    order = ("honoured", "refused", "warned")
    for name, (what, note) in sorted(said.items(), key=lambda item: order.index(item[1][0])):
        yield name, what, note.replace("|", "\\|")


def _responses_section() -> str:
    rows = [f"| `{name}` | {what} | {note} |" for name, what, note in responses_entries()]
    return _RESPONSES_HEAD + "\n".join(rows) + "\n"


def entries() -> Iterator[tuple[str, str, str, str]]:
    """Yield (name, its treatment by chats, by completions, a note): honoured ones first."""
    options = _said(request_fields.StreamOptions, params.STREAM_OPTIONS)
    nested = {f"stream_options.{name}": said for name, said in options.items()}
    chat = _said(schemas.ChatRequest, params.CHAT) | nested
    completion = _said(schemas.CompletionRequest, params.COMPLETION) | nested
    found = []
    for name in dict.fromkeys((*chat, *completion)):
        in_chat, in_completion = (said.get(name, (_NOT_HERE, "")) for said in (chat, completion))
        found.append((name, in_chat[0], in_completion[0], _note(in_chat, in_completion)))
    order = ("honoured", "refused", "warned", _NOT_HERE)
    yield from sorted(found, key=lambda entry: min(map(order.index, entry[1:3])))


def message_entries() -> Iterator[tuple[str, str, str]]:
    """Yield (name, its treatment by Messages, a note): honoured ones first."""
    said = _said(MessagesRequest, message_params.MESSAGES)
    passed = dict.fromkeys(message_params.PASSED, ("honoured", "as in chats"))
    order = ("honoured", "refused", "warned")
    entries = [(name, what, note) for name, (what, note) in (said | passed).items()]
    yield from sorted(entries, key=lambda entry: order.index(entry[1]))


def _said(request: type[BaseModel], table: Mapping[str, Unsupported]) -> dict[str, tuple[str, str]]:
    """Return the treatment of each parameter of one route, and the reason."""
    said = {
        name: ("honoured", field.description or "") for name, field in request.model_fields.items()
    }
    for name, known in table.items():
        neutral = ", ".join(f"`{_as_json(value)}`" for value in known.neutral)
        note = f"{known.reason}; neutral: {neutral}" if neutral else known.reason
        said[name] = ("refused" if known.is_refused else "warned", note)
    return said


def _note(in_chat: tuple[str, str], in_completion: tuple[str, str]) -> str:
    """Return the note, one for each route where they differ."""
    notes = dict.fromkeys((in_chat[1], in_completion[1]))
    if len(notes) > 1 and _NOT_HERE not in {in_chat[0], in_completion[0]}:
        named = (("chat", in_chat[1]), ("completions", in_completion[1]))
        notes = dict.fromkeys(f"{route}: {note}" for route, note in named if note)
    return "; ".join(filter(None, notes)).replace("|", "\\|")


def _as_json(value: object) -> str:
    return orjson.dumps(value).decode()


if __name__ == "__main__":
    sys.stdout.write(page())
