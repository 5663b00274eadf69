"""docs/api.md, made from the schemas and from the table of what is not honoured: it cannot drift.

`python -m server.api_table > docs/api.md`. Knows of other servers only what is written here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

import orjson
from pydantic import BaseModel

from server import params, schemas
from server.params import Unsupported

_HEAD = """\
# Parameters

Made by `python -m server.api_table > docs/api.md` from `server/schemas.py` and `server/params.py`;
a test keeps it equal to what they say.

- **honoured**: it does what its documentation says; a wrong value is a 400 that names it.
- **refused**: any value but a neutral one is a 400 that names it, never silence.
- **warned**: the request is served, and `octavo.warnings` in the answer names the parameter.
- **-**: not a parameter of this route; if it is sent all the same, it is warned of, like every
  name nobody knows.

The columns of vLLM and SGLang are there for those who come from them, and were written from
memory of their 2025 versions: *yes* means taken and acted upon, *no* unknown, refused or without
effect, *?* that we are not sure.

Several answers (`n`, `best_of`, a list of prompts) are at most 16 to a prompt and 64 to a request.
The prompt is computed once and counted once in `usage`; its completion tokens are those of all
answers, `best_of`'s unseen ones too. Answer `k` of a prompt has a seed made from (`seed`, `k`), and
the first has `seed` itself, so it is the answer that `n: 1` gives. `index` is prompt * n + k.

A prompt's own probabilities come in two shapes: `prompt_logprobs` (vLLM's; of a completion in each
choice, of a chat beside the choices) and, of completions, `echo` with `logprobs` (OpenAI's older
one, which evaluation harnesses use: `max_tokens` 0 or 1, also as a stream). Such a prompt is
computed from its first token on, once for each answer, whatever is cached of it
(`octavo.cache.miss_reason` says `limited`); what it computes is cached for others. An answer holds
at most 1,048,576 of these probabilities.

`bad_words` are compared as tokens, written with a space before them and without: the same letters
in other tokens are not found. `allowed_token_ids` goes before them, and before `min_tokens`: where
both would leave nothing to sample, the allowed tokens are sampled.
"""

#: What vLLM does with a parameter, and SGLang.
PEERS: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(
        (
            *("model", "messages", "prompt", "n", "max_tokens", "max_completion_tokens"),
            *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
            *("repetition_penalty", "logit_bias", "stop", "stop_token_ids", "skip_special_tokens"),
            *("min_tokens", "ignore_eos", "stream", "stream_options", "logprobs", "top_logprobs"),
            *("tools", "tool_choice", "continue_final_message", "chat_template_kwargs"),
            *("stream_options.include_usage", "stream_options.continuous_usage_stats"),
            *("response_format", "reasoning_effort", "echo", "priority"),
        ),
        ("yes", "yes"),
    ),
    "seed": ("yes", "?"),
    "best_of": ("?", "?"),
    "parallel_tool_calls": ("yes", "?"),
    "include_stop_str_in_output": ("yes", "no"),
    "cache_salt": ("yes", "?"),
    "add_special_tokens": ("yes", "?"),
    "add_generation_prompt": ("yes", "no"),
    "truncate_prompt_tokens": ("yes", "?"),
    "return_token_ids": ("yes", "?"),
    "include_reasoning": ("yes", "no"),
    "use_beam_search": ("yes", "no"),
    "length_penalty": ("yes", "no"),
    "early_stopping": ("?", "no"),
    "bad_words": ("yes", "no"),
    "allowed_token_ids": ("yes", "no"),
    "prompt_logprobs": ("yes", "no"),
    "logits_processors": ("?", "no"),
    "guided_json": ("?", "no"),
    "guided_regex": ("?", "no"),
    "guided_choice": ("?", "no"),
    "guided_grammar": ("?", "no"),
    "structured_outputs": ("yes", "no"),
    "kv_transfer_params": ("yes", "no"),
    "return_tokens_as_token_ids": ("yes", "no"),
    "spaces_between_special_tokens": ("yes", "?"),
    "detokenize": ("?", "no"),
    "user": ("no", "no"),
    "metadata": ("no", "?"),
    "store": ("no", "no"),
    "service_tier": ("no", "no"),
    "safety_identifier": ("no", "no"),
    "prompt_cache_key": ("no", "no"),
    "prompt_cache_retention": ("no", "no"),
    "request_id": ("yes", "no"),
    "functions": ("no", "no"),
    "function_call": ("no", "no"),
    "audio": ("no", "no"),
    "modalities": ("no", "?"),
    "web_search_options": ("no", "no"),
    "chat_template": ("yes", "no"),
    "documents": ("yes", "no"),
    "mm_processor_kwargs": ("yes", "?"),
    "prediction": ("no", "no"),
    "verbosity": ("no", "no"),
    "suffix": ("?", "?"),
    "prompt_embeds": ("yes", "?"),
    "stream_options.include_obfuscation": ("no", "no"),
}
_UNSURE = ("?", "?")
_NOT_HERE = "-"


def page() -> str:
    """Return the whole document."""
    rows = [
        "| parameter | chat | completions | vLLM | SGLang | |",
        "|---|---|---|---|---|---|",
    ]
    for name, chat, completion, note in entries():
        vllm, sglang = PEERS.get(name, _UNSURE)
        rows.append(f"| `{name}` | {chat} | {completion} | {vllm} | {sglang} | {note} |")
    return _HEAD + "\n" + "\n".join(rows) + "\n"


def entries() -> Iterator[tuple[str, str, str, str]]:
    """Yield (name, what chats do with it, what completions do, a note): honoured ones first."""
    options = _said(schemas.StreamOptions, params.STREAM_OPTIONS)
    nested = {f"stream_options.{name}": said for name, said in options.items()}
    chat = _said(schemas.ChatRequest, params.CHAT) | nested
    completion = _said(schemas.CompletionRequest, params.COMPLETION) | nested
    found = []
    for name in dict.fromkeys((*chat, *completion)):
        in_chat, in_completion = (said.get(name, (_NOT_HERE, "")) for said in (chat, completion))
        found.append((name, in_chat[0], in_completion[0], _note(in_chat, in_completion)))
    order = ("honoured", "refused", "warned", _NOT_HERE)
    yield from sorted(found, key=lambda entry: min(map(order.index, entry[1:3])))


def _said(request: type[BaseModel], table: Mapping[str, Unsupported]) -> dict[str, tuple[str, str]]:
    """Return what becomes of each parameter of one route, and why."""
    said = {
        name: ("honoured", field.description or "") for name, field in request.model_fields.items()
    }
    for name, known in table.items():
        neutral = ", ".join(f"`{_as_json(value)}`" for value in known.neutral)
        note = f"{known.reason}; neutral: {neutral}" if neutral else known.reason
        said[name] = ("refused" if known.is_refused else "warned", note)
    return said


def _note(in_chat: tuple[str, str], in_completion: tuple[str, str]) -> str:
    """Return what there is to add, apart where the two routes differ."""
    notes = dict.fromkeys((in_chat[1], in_completion[1]))
    if len(notes) > 1 and _NOT_HERE not in {in_chat[0], in_completion[0]}:
        named = (("chat", in_chat[1]), ("completions", in_completion[1]))
        notes = dict.fromkeys(f"{route}: {note}" for route, note in named if note)
    return "; ".join(filter(None, notes)).replace("|", "\\|")


def _as_json(value: object) -> str:
    return orjson.dumps(value).decode()


if __name__ == "__main__":
    sys.stdout.write(page())
