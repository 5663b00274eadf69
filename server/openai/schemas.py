"""The requests as OpenAI and vLLM name their fields: every field here is honoured.

What is not a field here is judged by `server/generation/params.py`. Types are strict (`"5"` is no
number); ranges are checked by `SamplingParams`, lengths and the vocabulary where the model is
known. Lists end at their first fault: a body of four million of them is not worth ten seconds.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
)

from server.generation.params import Warned
from server.http.errors import ApiError, from_validation, invalid
from server.http.work import Workshop
from server.openai.chat_messages import Message
from server.structured.schemas import (
    Grammar,
    Pattern,
    ResponseFormat,
    Schema,
    StructuredOutputs,
    Texts,
)
from server.text import json_text
from server.text.stop import MAX_STOP_CHARS, MAX_STOPS
from server.tools.schemas import Choice, Tools

RequestT = TypeVar("RequestT", bound="Request")

#: More of these in one request are a mistake or an attack; each costs time and the engine memory.
MAX_MESSAGES = 16_384
MAX_LISTED_TOKENS = 4096
MAX_TEMPLATE_VARIABLES = 64
#: Each is a row of the vocabulary's length in the engine, made anew for each answer.
MAX_ALLOWED_TOKENS = 16_384
MAX_BAD_WORDS = 64
MAX_BAD_WORD_CHARS = 128
#: Answers to one prompt, and to all prompts of one request: each is a request to the engine.
MAX_CHOICES = 16
MAX_CHOICES_IN_ALL = 64
#: A day; a client that wants to wait longer does not mean it.
MAX_TIMEOUT_S = 86_400
#: What a client is told whose body could be read only so.
_MENDED: Warned = {
    "param": "*",
    "message": "U+FFFD was read for each lone surrogate, and a string for each number of more than"
    f" {json_text.MAX_DIGITS} digits",
}
#: Of one body, in all its lists and objects: to read more would hold everybody up.
MAX_VALUES = 2**19


async def parse(model: type[RequestT], body: bytes, work: Workshop) -> RequestT:
    """Return the request that `body` holds. Raises `ApiError` (400) that names what is wrong."""
    # A parser is some ten times as fast as a tokenizer.
    return await work.run(lambda _: _parsed(model, body), len(body) // 8)


def _parsed(model: type[RequestT], body: bytes) -> RequestT:
    _require_few(body)
    try:
        request = _validated(model, body)
    except ApiError as error:
        mended = json_text.mended(body) if error.code == "invalid_json" else body
        if mended == body:
            raise
        request = _validated(model, mended)
        request.notes = (_MENDED,)
    request.num_bytes = len(body)
    return request


def _validated(model: type[RequestT], body: bytes) -> RequestT:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from error


def _require_few(body: bytes) -> None:
    """Raise `ApiError` for more values than a request needs: all else waits while they are read."""
    if body.count(b",") < MAX_VALUES:
        return
    bare = body.replace(rb"\\", b"").replace(rb"\"", b"")
    num_values = bare.count(b'"')
    if num_values < MAX_VALUES:
        num_values = sum(part.count(b",") for part in bare.split(b'"')[::2])
    if num_values >= MAX_VALUES:
        raise invalid(f"the body has more than the {MAX_VALUES} values that are allowed", None)


class Request(BaseModel):
    """Strict types; unknown fields are kept aside, for the warnings."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    _num_bytes: int = PrivateAttr(default=0)
    _notes: tuple[Warned, ...] = PrivateAttr(default=())

    @property
    def num_bytes(self) -> int:
        """Length of the body it came in, or was made from."""
        return self._num_bytes

    @num_bytes.setter
    def num_bytes(self, count: int) -> None:
        self._num_bytes = count

    @property
    def notes(self) -> tuple[Warned, ...]:
        """Warnings of how the body was read."""
        return self._notes

    @notes.setter
    def notes(self, notes: tuple[Warned, ...]) -> None:
        self._notes = notes


def _as_stops(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_prompts(value: object) -> object:
    """One prompt becomes a list of one."""
    prompts = [value]
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        prompts = value
    if len(prompts) > MAX_CHOICES_IN_ALL:
        raise ValueError(f"must be at most {MAX_CHOICES_IN_ALL} prompts")
    for prompt in prompts:
        is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
        if not is_ids and not isinstance(prompt, str):
            raise ValueError("must be a string or a list of token ids, or a list of such")
    return prompts


def _as_biases(value: object) -> object:
    """Count first: pydantic would look at every bias before it finds that they are too many."""
    if isinstance(value, dict) and len(value) > MAX_LISTED_TOKENS:
        raise ValueError(f"must have at most {MAX_LISTED_TOKENS} entries")
    return value


Stops = Annotated[
    Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
        Field(max_length=MAX_STOPS, fail_fast=True),
    ]
    | None,
    BeforeValidator(_as_stops, json_schema_input_type=str | list[str] | None),
]
Biases = Annotated[dict[str, float] | None, BeforeValidator(_as_biases)]
TemplateVariables = Annotated[dict[str, Any], Field(max_length=MAX_TEMPLATE_VARIABLES)]
StopTokens = Annotated[list[int], Field(max_length=MAX_LISTED_TOKENS, fail_fast=True)]
AllowedTokens = Annotated[
    list[int], Field(min_length=1, max_length=MAX_ALLOWED_TOKENS, fail_fast=True)
]
BadWords = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARS)]],
    Field(max_length=MAX_BAD_WORDS, fail_fast=True),
]
Choices = Annotated[int, Field(ge=1, le=MAX_CHOICES)]
Prompts = Annotated[
    Any,
    BeforeValidator(
        _as_prompts, json_schema_input_type=str | list[int] | list[str] | list[list[int]]
    ),
]


class StreamOptions(Request):
    """What a stream tells besides its text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(
        default=None, description="every chunk tells the usage so far, of all choices together"
    )


class GenerateFields(Request):
    """What both ways of asking for tokens have in common."""

    model: str | None = Field(default=None, description="default: the one that is served")
    n: Choices | None = Field(default=None, description="answers to each prompt; default 1")
    max_tokens: int | None = None
    temperature: float | None = Field(default=None, description="0 to 2; default 1")
    top_p: float | None = Field(default=None, description="above 0, at most 1; default 1")
    top_k: int | None = Field(default=None, description="-1, 0 and null: no limit")
    min_p: float | None = None
    seed: int | None = Field(default=None, description="default: drawn for each request")
    presence_penalty: float | None = Field(default=None, description="-2 to 2; default 0")
    frequency_penalty: float | None = Field(default=None, description="-2 to 2; default 0")
    repetition_penalty: float | None = None
    logit_bias: Biases = Field(default=None, description="token id (in a string) to -100 ... 100")
    allowed_token_ids: AllowedTokens | None = Field(
        default=None, description="no other tokens are sampled, ends neither"
    )
    bad_words: BadWords | None = Field(
        default=None,
        description="texts whose tokens, with a space before them or without, are not completed;"
        " the same text in other tokens is",
    )
    stop: Stops = None
    stop_token_ids: StopTokens | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = Field(default=None, description="default true")
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="prefixes are shared by equal salts only, in the key's namespace"
    )
    priority: int | None = Field(default=None, description="smaller goes first; default 0")
    add_special_tokens: bool | None = Field(
        default=None, description="default: false for chats (the template has them), else true"
    )
    truncate_prompt_tokens: int | None = Field(
        default=None, description="keep as many from the prompt's end; -1: what fits"
    )
    prompt_logprobs: int | None = Field(
        default=None,
        description="0 to 20: tell how probable the prompt's tokens were, and so many others;"
        " not with stream; the prompt is computed anew",
    )
    return_token_ids: bool | None = Field(
        default=None, description="tell the prompt's and the answer's tokens too"
    )
    timeout: Annotated[float, Field(gt=0, le=MAX_TIMEOUT_S)] | None = Field(
        default=None, description="seconds from its arrival until the request is ended with a 408"
    )

    response_format: ResponseFormat | None = Field(
        default=None, description="text, json_object or json_schema; see operations.md"
    )
    structured_outputs: StructuredOutputs | None = Field(
        default=None, description="one of json, regex, choice, grammar, json_object"
    )
    guided_json: Schema | None = Field(default=None, description="as structured_outputs.json")
    guided_regex: Pattern | None = Field(default=None, description="as structured_outputs.regex")
    guided_choice: Texts | None = Field(default=None, description="as structured_outputs.choice")
    guided_grammar: Grammar | None = Field(
        default=None, description="as structured_outputs.grammar"
    )

    @field_validator("priority")
    @classmethod
    def _fits_a_machine_word(cls, value: int | None) -> int | None:
        if value is not None and not -(2**31) <= value < 2**31:
            raise ValueError("must fit 32 bits")
        return value


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatRequest(GenerateFields):
    """Body of `POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: int | None = Field(
        default=None, description="default: as many as the context has room for"
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, description="0 to 20; needs logprobs")
    add_generation_prompt: bool | None = Field(
        default=None, description="default true, or false with continue_final_message"
    )
    continue_final_message: bool | None = Field(
        default=None, description="go on with the last message instead of answering it"
    )
    chat_template_kwargs: TemplateVariables | None = None
    tools: Tools | None = None
    tool_choice: Choice | None = Field(
        default=None,
        description="none, auto, required, one by name, allowed_tools; default auto",
    )
    parallel_tool_calls: bool | None = Field(
        default=None, description="false: only the first call is told; default true"
    )
    include_reasoning: bool | None = Field(default=None, description="default true")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        Field(default=None, description="for models whose template knows it; else it is warned of")
    )


class CompletionRequest(GenerateFields):
    """Body of `POST /v1/completions`."""

    prompt: Prompts
    best_of: Choices | None = Field(
        default=None, description="generate as many, give the n likeliest (by mean logprob)"
    )
    logprobs: int | None = Field(default=None, description="0 to 20")
    echo: bool | None = Field(
        default=None,
        description="put the prompt before the answer, its logprobs before the answer's;"
        " max_tokens may be 0 then",
    )


class TokenizeRequest(Request):
    """Body of `POST /tokenize`: either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = Field(default=None, description="llama-server's name of prompt")
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    tools: Tools | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Request):
    """Body of `POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[list[int], Field(fail_fast=True)]
