"""Prompt caching by request: OpenAI's fields, the tokens to pin, and the tokens that were written.

Knows nothing of how the engine keeps pins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from scheduler.client import LIFETIMES_S, GenerateRequest, PrefixPin
from server.answer_types import ParamWarning
from server.generation.generation_spec import Breakpoint, CachingWish
from server.generation.params import Warned, ignored, judge, warning
from server.generation.request_fields import GenerateFields, Request, optional
from server.http.context import RequestRecord
from server.http.errors import Path, dotted, invalid

#: Both vendors' limit of breakpoints that one request may write.
MAX_BREAKPOINTS = 4
_DEFAULT_LIFETIME = "30m"
OpenAILifetime: TypeAlias = Literal["30m", "12h"]


def _as_retention(value: object) -> object:
    # As older clients write it.
    return "in_memory" if value == "in-memory" else value


class PromptCacheBreakpoint(Request):
    """The end of a beginning of the prompt that is to be kept."""

    mode: Literal["explicit"]
    ttl: OpenAILifetime | None = optional("default: that of prompt_cache_options")


class PromptCacheOptions(Request):
    """How long the prompt is kept, and which part of it."""

    mode: Literal["implicit", "explicit"] | None = optional(
        "explicit: nothing behind the last prompt_cache_breakpoint stays cached, and nothing at all"
        " without one; default implicit: the last message ends with a breakpoint"
    )
    ttl: OpenAILifetime | None = optional("without use, at least; default 30m")
    prewarm: bool | None = optional("true: compute and keep the prompt, and write no answer")
    comparison_response_id: Annotated[str, Field(max_length=256)] | None = optional(
        "names an earlier response: the answer has the part of the request that changed since"
    )


class CachingFields(GenerateFields):
    """The fields of OpenAI's chats and responses about the prompt cache."""

    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None = optional(
        "a label for the log line; cache_salt keeps prefixes apart"
    )
    prompt_cache_options: PromptCacheOptions | None = optional(
        "pins the prompt softly: it is evicted after all that is not pinned; see operations.md"
    )
    prompt_cache_retention: (
        Annotated[Literal["in_memory", "24h"], BeforeValidator(_as_retention)] | None
    ) = optional("24h: pins the prompt for so long; not with prompt_cache_options")


def openai_caching(
    fields: CachingFields, marked: Sequence[tuple[Breakpoint, PromptCacheBreakpoint]]
) -> tuple[CachingWish, list[Warned]]:
    """Return the wish of a request, and warnings of parts without effect. Raises `ApiError`.

    `marked`: the blocks with a breakpoint, in the prompt's order; their lifetimes are set here.
    """
    options, retention = fields.prompt_cache_options or PromptCacheOptions(), None
    if fields.prompt_cache_retention is not None:
        retention = fields.prompt_cache_retention
        if fields.prompt_cache_options is not None:
            path = "prompt_cache_retention"
            raise invalid(f"{path} and prompt_cache_options exclude each other", path)
    warnings = judge(options.model_extra, {}, "prompt_cache_options.")
    lifetime, is_explicit = options.ttl or _DEFAULT_LIFETIME, options.mode == "explicit"
    found = [replace(at, lifetime=asked.ttl or lifetime) for at, asked in marked]
    asks = bool(found) or options.mode is not None or options.ttl is not None or options.prewarm
    implicit: list[Breakpoint] = []
    if retention == "24h":
        implicit = [Breakpoint(("prompt_cache_retention",), retention)]
        warnings.append(warning("prompt_cache_retention", "(24h) ends with this process"))
    elif asks and not is_explicit:
        implicit = [Breakpoint(("prompt_cache_options",), lifetime)]
    num_left_out = max(0, len(found) + len(implicit) - MAX_BREAKPOINTS)
    if num_left_out:
        because = f"the latest {MAX_BREAKPOINTS - len(implicit)} are written, as by OpenAI"
        warnings.append(ignored(found[num_left_out - 1].path, because))
    return (
        CachingWish(
            (*found[num_left_out:], *implicit),
            is_explicit,
            options.prewarm is True,
            fields.prompt_cache_key or "",
        ),
        warnings,
    )


@dataclass(frozen=True, slots=True)
class Caching:
    """The beginnings of a prompt that are pinned, the shortest first."""

    pins: tuple[PrefixPin, ...] = ()
    is_explicit: bool = False
    #: Of the field that asks for the last one.
    path: Path = ()

    def applied_to(self, request: GenerateRequest) -> GenerateRequest:
        """Return the request to the engine with its pins."""
        store_up_to = self.num_kept_tokens if self.is_explicit else None
        return replace(request, pins=self.pins, store_up_to=store_up_to)

    @property
    def num_kept_tokens(self) -> int:
        """Tokens up to the last breakpoint."""
        return max((pin.num_tokens for pin in self.pins), default=0)

    def written_tokens(self, num_cached_tokens: int) -> dict[str, int]:
        """Return by lifetime the tokens before breakpoints that were not in the cache."""
        written = dict.fromkeys(LIFETIMES_S, 0)
        start = num_cached_tokens
        for pin in self.pins:
            written[pin.lifetime] += max(0, pin.num_tokens - start)
            start = max(start, pin.num_tokens)
        return written


def caching_of(
    wish: CachingWish, ends: Sequence[int | None], num_cut_tokens: int, warnings: list[Warned]
) -> Caching | None:
    """Return the caching of a prompt; None where the request asks for none.

    `ends`: tokens before each breakpoint, None where the template does not show its block.
    `num_cut_tokens`: of these, how many the prompt has lost at its beginning.
    """
    if not wish.breakpoints and not wish.is_explicit:
        return None
    placed: list[tuple[PrefixPin, Path]] = []
    for at, end in zip(wish.breakpoints, ends, strict=True):
        if end is None:
            warnings.append(ignored(at.path, "the model's template does not show its block"))
        elif end > num_cut_tokens:
            placed.append((PrefixPin(end - num_cut_tokens, at.lifetime), at.path))
    placed.sort(key=lambda one: one[0].num_tokens)
    pins = tuple(pin for pin, _ in placed)
    return Caching(pins, wish.is_explicit, placed[-1][1] if placed else ())


def pin_warnings(caching: Caching | None, record: RequestRecord) -> list[ParamWarning]:
    """Return the warnings of pins that do not hold, of this request and of earlier ones."""
    if caching is None:
        return []
    param, warnings = dotted(caching.path), list[ParamWarning]()
    because = "more would be pinned than the server allows (--cache-pin-share)"
    if record.num_refused_pins:
        warnings.append(warning(param, f"was cached, but not pinned: {because}"))
    if record.num_displaced_pins:
        ended = f"ended {record.num_displaced_pins} older pins of the key with the most"
        warnings.append(warning(param, f"{ended}: {because}"))
    return warnings
