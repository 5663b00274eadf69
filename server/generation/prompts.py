"""Plain text to token ids and back.

Knows nothing of chats or of what the tokens are for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from scheduler.client import EngineUnavailableError
from server.generation.generation_spec import TextPrompts
from server.generation.request_fields import GenerationSpec
from server.http.errors import Path, dotted, invalid, shortened
from server.http.work import LONG_CHARS, Check
from server.service import Service
from server.text.token_bytes import TextError
from server.text.tokenizer import Tokenizer

#: OpenAI's default for completions; also the room that a prompt cut to fit leaves for the answer.
DEFAULT_COMPLETION_TOKENS = 16


async def bad_word_tokens(service: Service, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Return each word's tokens at a text's start and behind a space. Raises `ApiError`."""
    stems = [word.lstrip(" ") for word in words]
    texts = [text for stem in stems for text in (stem, " " + stem) if text]
    encoded = await tokens_of(service, texts, add_special_tokens=False, field="bad_words")
    return tuple(dict.fromkeys(tuple(token_ids) for token_ids in encoded if token_ids))


async def echoes(
    service: Service, spec: GenerationSpec, texts: TextPrompts, prompts: Sequence[Sequence[int]]
) -> tuple[str, ...]:
    """Return each prompt's text: as it was given, or the text of its tokens.

    With logprobs it is always the latter, because their offsets point into this text.
    """
    decode = service.text.tokenizer.decode
    is_decoded = spec.fields.truncate_prompt_tokens is not None or spec.logprobs is not None

    def decode_all(_: Check) -> tuple[str, ...]:
        return tuple(
            given
            if isinstance(given, str) and not is_decoded
            else decode(token_ids, skip_special_tokens=spec.fields.skip_special_tokens is not False)
            for given, token_ids in zip(texts.prompts, prompts, strict=True)
        )

    return await service.work.run(decode_all, sum(map(len, prompts)))


def truncated(limit: int, spec: GenerationSpec, token_ids: list[int]) -> list[int]:
    """Return the end of the prompt that `truncate_prompt_tokens` keeps. Raises `ApiError`.

    `limit`: tokens of prompt and answer together.
    """
    num_kept = spec.fields.truncate_prompt_tokens
    if num_kept is None:
        return token_ids
    if num_kept == -1:
        num_kept = max(1, limit - (spec.fields.max_tokens or DEFAULT_COMPLETION_TOKENS))
    if num_kept < 1:
        message = "truncate_prompt_tokens must be at least 1, or -1 for what fits"
        raise invalid(message, "truncate_prompt_tokens")
    return token_ids[-num_kept:]


def row_notes(tokenizer: Tokenizer, num_rows: int) -> list[str]:
    """Return a note for the start about tokens that the model has no row for."""
    num_tokens = tokenizer.vocab_size
    if num_tokens <= num_rows:
        return []
    sizes = f"the tokenizer has {num_tokens} tokens, the model {num_rows} rows"
    return [f"{sizes}: texts with the ids {num_rows} to {num_tokens - 1} are refused"]


def require_rows(
    service: Service, token_ids: Sequence[int], path_of: Callable[[str], Path]
) -> None:
    """Raise `ApiError` (400) for a token of a text that the model has no row for.

    `path_of`: gives the field that holds the token's text.
    """
    try:
        num_rows = service.client.info.vocab_size
    except EngineUnavailableError:  # the tokenizer is loaded before the weights
        return
    if max(token_ids, default=0) >= num_rows:
        token_id = next(token_id for token_id in token_ids if token_id >= num_rows)
        text = service.text.tokenizer.token_text(token_id)
        path = path_of(text)
        reason = f"token {token_id} of the tokenizer; the model has only {num_rows}"
        raise invalid(f"{dotted(path)} holds {shortened(text)!r}, {reason}", path)


def require_tokens(token_ids: Sequence[int], vocab_size: int, path: Path) -> None:
    """Raise `ApiError` (400) for a token id outside the vocabulary."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        index = next(i for i, token in enumerate(token_ids) if not 0 <= token < vocab_size)
        message = (
            f"{dotted(path)}.{index} is no token id:"
            f" the vocabulary has the ids 0 to {vocab_size - 1}"
        )
        raise invalid(message, path)


async def token_text(service: Service, token_ids: Sequence[int]) -> str:
    """Return the text of `token_ids`, special tokens and all. Raises `ApiError`."""

    def decode(_: Check) -> str:
        require_tokens(token_ids, service.client.info.vocab_size, ("tokens",))
        return service.text.tokenizer.decode(token_ids, skip_special_tokens=False)

    return await service.work.run(decode, len(token_ids))


def context_words(limit: int) -> str:
    """Return the first words of the error for a text that does not fit.

    They are OpenAI's: LiteLLM matches on them alone before it tries a model with more room.
    """
    return f"This model's maximum context length is {limit} tokens, prompt and answer together"


def require_room(service: Service, text: str, path: Path) -> None:
    """Raise `ApiError` (400) for a text that cannot fit, however its letters make tokens."""
    limit = service.client.info.max_model_len
    if len(text) >= LONG_CHARS and (least := service.text.tokenizer.least_tokens(text)) >= limit:
        message = f"{context_words(limit)}: {dotted(path)} has at least {least}"
        raise invalid(message, path, "context_length_exceeded")


async def tokens_of(
    service: Service,
    prompts: Sequence[str | list[int]],
    *,
    add_special_tokens: bool,
    field: str = "prompt",
    must_fit: bool = False,
) -> list[list[int]]:
    """Return the tokens of each prompt. Raises `ApiError`.

    `field`: the one they came in; `must_fit`: a prompt that is too long is refused unencoded.
    """

    def encoded(text: str, check: Check) -> list[int]:
        if must_fit:
            require_room(service, text, (field,))
        tokenizer = service.text.tokenizer
        token_ids = tokenizer.encode(text, add_special_tokens=add_special_tokens, check=check)
        require_rows(service, token_ids, lambda _: (field,))
        return token_ids

    def encode_all(check: Check) -> list[list[int]]:
        return [encoded(prompt, check) if isinstance(prompt, str) else prompt for prompt in prompts]

    try:
        num_chars = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        return await service.work.run(encode_all, num_chars)
    except TextError as error:
        raise invalid(str(error), field) from error
