"""Which drafts a server makes, from its own settings or from vLLM's `--speculative-config`."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

#: Matches of fewer tokens are chance.
MIN_MATCH_TOKENS = 3
MAX_DRAFT_TOKENS = 256

#: Before the name of a draft model.
_DRAFT_PREFIX = "draft:"

DraftTokens = Annotated[int, Field(ge=1, le=MAX_DRAFT_TOKENS)]
#: The JSON Schema lists the values by which messages and the help name them.
Speculation = Annotated[
    str,
    Field(
        pattern=rf"^(none|auto|ngram|suffix|{_DRAFT_PREFIX}\S.*)$",
        json_schema_extra={"enum": ["none", "auto", "ngram", "suffix", f"{_DRAFT_PREFIX}MODEL"]},
    ),
]


class Drafting(NamedTuple):
    """The drafts of a server."""

    #: None: by the device.
    speculation: str | None
    #: Of one draft, at most.
    max_tokens: int
    #: Of an n-gram's match, at least and at most.
    lookup_min_tokens: int = MIN_MATCH_TOKENS
    lookup_max_tokens: int | None = None

    @property
    def draft_model(self) -> str | None:
        """The folder, file or hub id of the draft model, if there is one."""
        kind = self.speculation or ""
        return kind.removeprefix(_DRAFT_PREFIX) if kind.startswith(_DRAFT_PREFIX) else None

    def kind(self, device: str) -> str:
        """Return the value of `speculation` on a device.

        On a GPU steps overlap, but not where there are drafts, and neither was measured yet.
        """
        return self.speculation or ("auto" if device == "cpu" else "none")


class _VllmConfig(BaseModel):
    """The parts of vLLM's `SpeculativeConfig` that have a meaning here; all others are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    method: Literal["ngram", "suffix", "draft_model"] | None = None
    model: Annotated[str, Field(min_length=1)] | None = None
    num_speculative_tokens: DraftTokens = 16
    prompt_lookup_min: Annotated[int, Field(ge=1)] | None = None
    prompt_lookup_max: Annotated[int, Field(ge=1)] | None = None


def drafting_of_vllm(text: str) -> Drafting:
    """Read vLLM's JSON. Raises `ValueError` that names the part at fault."""
    try:
        config = _VllmConfig.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(f"speculative_config: {_sentence(error)}") from None
    method = config.method or ("draft_model" if config.model else None)
    least, most = config.prompt_lookup_min, config.prompt_lookup_max
    if method is None:
        raise ValueError("speculative_config: method: field required")
    if method != "ngram" and (least or most):
        raise ValueError("speculative_config: prompt_lookup_min and _max are of the method ngram")
    if (method == "draft_model") != bool(config.model):
        raise ValueError("speculative_config: model and the method draft_model need each other")
    if config.model:
        return Drafting(_DRAFT_PREFIX + config.model, config.num_speculative_tokens)
    # As in vLLM: one of them alone stands for both.
    least = least or most or MIN_MATCH_TOKENS
    if most is not None and least > most:
        raise ValueError("speculative_config: prompt_lookup_min is above prompt_lookup_max")
    return Drafting(method, config.num_speculative_tokens, least, most)


def _sentence(error: ValidationError) -> str:
    fault = error.errors(include_url=False, include_context=False)[0]
    name = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return f"{name} is not supported"
    if fault["type"] == "json_invalid":
        return "must be JSON"
    message = fault["msg"][0].lower() + fault["msg"][1:]
    return f"{name}: {message}" if name else message
