"""Request fields that all APIs share, and how a body becomes a request.

`server/generation/params.py` judges all other fields. Types are strict (`"5"` is not a number).
`SamplingParams` checks ranges; lengths and the vocabulary are checked where the model is known.
Lists end at their first fault, because validating millions of them would take ten seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
)

from configs.kv_policy import DEFAULT_SINK_TOKENS, Fusion, KVPolicy, PolicyType
from scheduler.client import SamplingParams
from server.generation.generation_spec import Conversation, OutputConstraint, TextPrompts
from server.generation.params import STREAM_OPTIONS, Warned, judge
from server.http.errors import ApiError, Path, dotted, from_validation, invalid
from server.http.work import Workshop
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

RequestT = TypeVar("RequestT", bound="Request")

#: More of these in one request are a mistake or an attack; each costs time and the engine memory.
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
#: The warning for a body that had to be mended.
_MENDED: Warned = {
    "param": "*",
    "message": "U+FFFD was read for each lone surrogate, and a string for each number of more than"
    f" {json_text.MAX_DIGITS} digits",
}
#: Of one body, in all its lists and objects: to read more would delay all other requests.
MAX_VALUES = 2**19


async def parse(model: type[RequestT], body: bytes, work: Workshop) -> RequestT:
    """Return the request that `body` holds. Raises `ApiError` (400) that names the fault."""
    # A parser is some ten times as fast as a tokenizer.
    return await work.run(lambda _: _parsed(model, body), len(body) // 8)


def _parsed(model: type[RequestT], body: bytes) -> RequestT:
    _require_few(body)
    notes: tuple[Warned, ...] = ()
    try:
        request = _validated(model, body)
    except ApiError as error:
        mended = json_text.mended(body) if error.code == "invalid_json" else body
        if mended == body:
            raise
        request, notes = _validated(model, mended), (_MENDED,)
    request.note_body(len(body), notes)
    return request


def _validated(model: type[RequestT], body: bytes) -> RequestT:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error, path_of=model.path_of) from error


def _require_few(body: bytes) -> None:
    """Raise `ApiError` for more values than a request needs: reading them delays all requests."""
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

    @classmethod
    def path_of(cls, location: Path) -> Path:
        """Return where in the body a fault is, given its location according to pydantic."""
        return location

    @property
    def num_bytes(self) -> int:
        """Length of the body it came in."""
        return self._num_bytes

    @property
    def notes(self) -> tuple[Warned, ...]:
        """Warnings about the body as a whole."""
        return self._notes

    def note_body(self, num_bytes: int, notes: tuple[Warned, ...]) -> None:
        """Keep the length of the body and the warnings about it."""
        self._num_bytes, self._notes = num_bytes, notes


def _as_stops(value: object) -> object:
    return [value] if isinstance(value, str) else value


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
Salt = Annotated[str, Field(min_length=1)]


def optional(description: str) -> Any:  # noqa: ANN401 - as pydantic's `Field`
    """Return the declaration of a field that a client may leave out."""
    return Field(default=None, description=description)


class StreamOptions(Request):
    """Further fields of a stream's chunks."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = optional(
        "every chunk has the usage so far, of all choices together"
    )


class KVPolicyFields(Request):
    """The keys that a query reads: all, the newest, these and the first (sinks) or the best."""

    type: PolicyType
    window: int | None = optional(
        "tokens, itself included; at least 64; with morph and h2o 16 to 256"
    )
    sinks: int | None = optional("first tokens that are always read; default 4")
    capacity: int | None = optional(
        "of morph and h2o: keys that are kept, those of the window included"
    )
    fusion: Fusion | None = optional("of morph: sum or max of the window's scores; default sum")

    def policy(self) -> KVPolicy:
        """Return the policy. Raises `ApiError` that names the field."""
        if self.window is None and self.type != "full":
            path = "kv_policy.window"
            raise invalid(f"{path} is required with type {self.type}", path)
        if self.capacity is None and self.type in {"morph", "h2o"}:
            path = "kv_policy.capacity"
            raise invalid(f"{path} is required with type {self.type}", path)
        sinks = self.sinks
        if sinks is None:
            sinks = DEFAULT_SINK_TOKENS if self.type == "sinks" else 0
        try:
            return KVPolicy(
                self.type, self.window or 0, sinks, self.capacity or 0, self.fusion or "sum"
            )
        except ValueError as error:
            name = str(error).partition(" ")[0]
            raise invalid(f"kv_policy.{error}", f"kv_policy.{name}") from error


class GenerateFields(Request):
    """The fields that all routes for generation have in common."""

    model: str | None = optional("default: the one that is served")
    n: Choices | None = optional("answers to each prompt; default 1")
    max_tokens: int | None = None
    temperature: float | None = optional("0 to 2; default 1")
    top_p: float | None = optional("above 0, at most 1; default 1")
    top_k: int | None = optional("-1, 0 and null: no limit")
    min_p: float | None = None
    seed: int | None = optional("default: drawn for each request")
    presence_penalty: float | None = optional("-2 to 2; default 0")
    frequency_penalty: float | None = optional("-2 to 2; default 0")
    repetition_penalty: float | None = None
    logit_bias: Biases = optional("token id (in a string) to -100 ... 100")
    allowed_token_ids: AllowedTokens | None = optional("no other tokens are sampled, ends neither")
    bad_words: BadWords | None = optional(
        "texts whose tokens, with a space before them or without, are not completed;"
        " the same text in other tokens is"
    )
    stop: Stops = None
    stop_token_ids: StopTokens | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = optional("default true")
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Salt | None = optional(
        "prefixes are shared by equal salts only, in the key's namespace"
    )
    speculation: bool | None = optional(
        "false: no drafts are verified for it; the answer is the same"
    )
    kv_policy: KVPolicyFields | None = optional(
        "keys that the answer reads, such as {type: sinks, window: 1020, sinks: 4}; see"
        " operations.md; default: the server's"
    )
    priority: int | None = optional("smaller goes first; default 0")
    add_special_tokens: bool | None = optional(
        "default: false for chats (the template has them), else true"
    )
    truncate_prompt_tokens: int | None = optional(
        "keep as many from the prompt's end; -1: what fits"
    )
    prompt_logprobs: int | None = optional(
        "0 to 20: log-probabilities of the prompt's tokens and of this many others;"
        " not with stream; the prompt is computed anew"
    )
    return_token_ids: bool | None = optional(
        "return the ids of the prompt's and the answer's tokens too"
    )
    timeout: Annotated[float, Field(gt=0, le=MAX_TIMEOUT_S)] | None = optional(
        "seconds from its arrival until the request is ended with a 408"
    )

    response_format: ResponseFormat | None = optional(
        "text, json_object or json_schema; see operations.md"
    )
    structured_outputs: StructuredOutputs | None = optional(
        "one of json, regex, choice, grammar, json_object"
    )
    guided_json: Schema | None = optional("as structured_outputs.json")
    guided_regex: Pattern | None = optional("as structured_outputs.regex")
    guided_choice: Texts | None = optional("as structured_outputs.choice")
    guided_grammar: Grammar | None = optional("as structured_outputs.grammar")

    @field_validator("priority")
    @classmethod
    def _fits_a_machine_word(cls, value: int | None) -> int | None:
        if value is not None and not -(2**31) <= value < 2**31:
            raise ValueError("must fit 32 bits")
        return value

    def as_spec(
        self,
        prompt: Conversation | TextPrompts,
        warnings: list[Warned],
        constraint: OutputConstraint | None = None,
    ) -> GenerationSpec:
        """Return the spec of a request with these fields. Raises `ApiError`.

        `constraint`: from a field that is not among these.
        """
        options = self.stream_options
        if options is not None:
            if not self.stream:
                raise invalid("stream_options needs stream to be true", "stream_options")
            warnings = warnings + judge(options.model_extra, STREAM_OPTIONS, "stream_options.")
        policy = self.kv_policy
        if policy is not None:
            warnings = warnings + judge(policy.model_extra, {}, "kv_policy.")
        return GenerationSpec(
            fields=self,
            prompt=prompt,
            num_bytes=self.num_bytes,
            constraint=self._the_constraint(constraint),
            num_choices=self.n or 1,
            num_tries=self.n or 1,
            has_usage_chunk=options is not None and options.include_usage is True,
            warnings=tuple(warnings),
            kv_policy=None if policy is None else policy.policy(),
        )

    def sampling(self) -> Mapping[str, Any]:
        """Return the given values by the names of fields of `SamplingParams`."""
        names = {field.name for field in fields(SamplingParams)} & set(GenerateFields.model_fields)
        # Both depend on the prompt.
        names -= {"max_tokens", "prompt_logprobs"}
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def _the_constraint(self, own: OutputConstraint | None) -> OutputConstraint | None:
        """Return the constraint, if there is one. Raises `ApiError` for several."""
        found = [] if own is None else [own]
        if self.response_format is not None:
            asked = self.response_format.constraint(("response_format",))
            found += [] if asked is None else [asked]
        if self.structured_outputs is not None:
            found.append(self.structured_outputs.constraint("structured_outputs"))
        for name in ("json", "regex", "choice", "grammar"):
            value = getattr(self, f"guided_{name}")
            if value is not None:
                # vLLM's older names.
                alias = StructuredOutputs.model_validate({name: value})
                found.append(alias.constraint(f"guided_{name}", is_alias=True))
        if len(found) > 1:
            first, second = found[0].path, found[1].path
            raise invalid(f"{dotted(first)} and {dotted(second)} exclude each other", second)
        return found[0] if found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSpec:
    """One request, valid in itself. `server/generation/prepare.py` checks it against the model."""

    #: Those of all APIs. An API sets the ones that it has under another name.
    fields: GenerateFields
    prompt: Conversation | TextPrompts
    #: Of the request: a measure of the time to convert.
    num_bytes: int
    constraint: OutputConstraint | None = None
    max_tokens_path: Path = ("max_tokens",)
    #: More than the context has room for is cut, with a warning, instead of refused.
    cuts_max_tokens: bool = False
    #: Alternatives listed for each token of the answer; None: no logprobs.
    logprobs: int | None = None
    logprobs_path: Path = ("logprobs",)
    #: Answers to each prompt, and how many are generated to choose them from.
    num_choices: int = 1
    num_tries: int = 1
    has_usage_chunk: bool = False
    #: Text that the answer is expected to repeat.
    prediction: str = ""
    #: None: the server's default.
    kv_policy: KVPolicy | None = None
    #: Of fields without effect.
    warnings: tuple[Warned, ...] = ()

    @property
    def is_prewarming(self) -> bool:
        """Whether the prompt is computed and cached, and no answer written."""
        return isinstance(self.prompt, Conversation) and self.prompt.caching.is_prewarming

    @property
    def is_echoed(self) -> bool:
        """Whether the answer repeats the prompt."""
        return isinstance(self.prompt, TextPrompts) and self.prompt.is_echoed


Effort: TypeAlias = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
