"""Plain text to token ids and back.

Knows nothing of chats or of what the tokens are for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from scheduler.client import EngineUnavailableError, ModelInfo
from server.http.errors import invalid, shortened
from server.http.work import LONG_CHARS, Check
from server.openai.schemas import CompletionRequest, GenerateFields
from server.service import Service
from server.text.token_bytes import TextError
from server.text.tokenizer import Tokenizer

#: OpenAI's, for completions; and what a prompt that is cut to what fits leaves room for.
DEFAULT_COMPLETION_TOKENS = 16


async def prompt_tokens(service: Service, text: str, *, add_special_tokens: bool) -> list[int]:
    """Return `text` in tokens. Raises `ApiError`."""
    [token_ids] = await _encoded(
        service, [text], add_special_tokens=add_special_tokens, param="prompt"
    )
    return token_ids


async def completion_prompts(service: Service, request: CompletionRequest) -> list[list[int]]:
    """Return each prompt's tokens. Raises `ApiError`."""
    info = service.client.info
    adds = request.add_special_tokens is not False
    encoded = await _encoded(
        service,
        request.prompt,
        add_special_tokens=adds,
        param="prompt",
        must_fit=request.truncate_prompt_tokens is None,
    )
    return [truncated(info, request, token_ids, request.max_tokens) for token_ids in encoded]


async def bad_word_tokens(
    service: Service, words: Sequence[str] | None
) -> tuple[tuple[int, ...], ...]:
    """Return each word's tokens as they are at a text's start and behind a space.

    Raises `ApiError`.
    """
    stems = [word.lstrip(" ") for word in words or ()]
    texts = [text for stem in stems for text in (stem, " " + stem) if text]
    encoded = await _encoded(service, texts, add_special_tokens=False, param="bad_words")
    return tuple(dict.fromkeys(tuple(token_ids) for token_ids in encoded if token_ids))


async def echoes(
    service: Service, request: CompletionRequest, prompts: Sequence[Sequence[int]]
) -> tuple[str, ...]:
    """Return each prompt's text: as it was given, or what its tokens say.

    With logprobs it is always the latter: they tell where in this text each token stands.
    """
    decode = service.text.tokenizer.decode
    is_decoded = request.truncate_prompt_tokens is not None or request.logprobs is not None
    skips = request.skip_special_tokens is not False

    def decode_all(_: Check) -> tuple[str, ...]:
        return tuple(
            given
            if isinstance(given, str) and not is_decoded
            else decode(token_ids, skip_special_tokens=skips)
            for given, token_ids in zip(request.prompt, prompts, strict=True)
        )

    return await service.work.run(decode_all, sum(map(len, prompts)))


def truncated(
    info: ModelInfo, request: GenerateFields, token_ids: list[int], max_tokens: int | None
) -> list[int]:
    """Return the end of the prompt that `truncate_prompt_tokens` keeps. Raises `ApiError`."""
    num_kept = request.truncate_prompt_tokens
    if num_kept is None:
        return token_ids
    if num_kept == -1:
        num_kept = max(1, info.max_model_len - (max_tokens or DEFAULT_COMPLETION_TOKENS))
    if num_kept < 1:
        message = "truncate_prompt_tokens must be at least 1, or -1 for what fits"
        raise invalid(message, "truncate_prompt_tokens")
    return token_ids[-num_kept:]


def row_notes(tokenizer: Tokenizer, num_rows: int) -> list[str]:
    """Return what to say at the start of tokens that the model has no row for."""
    num_tokens = tokenizer.vocab_size
    if num_tokens <= num_rows:
        return []
    told = f"the tokenizer has {num_tokens} tokens, the model {num_rows} rows"
    return [f"{told}: texts with the ids {num_rows} to {num_tokens - 1} are refused"]


def require_rows(
    service: Service, token_ids: Sequence[int], param_of: Callable[[str], str]
) -> None:
    """Raise `ApiError` (400) for a token of a text that the model has no row for.

    `param_of`: which field holds the token's text.
    """
    try:
        num_rows = service.client.info.vocab_size
    except EngineUnavailableError:  # the words of the model are there before its weights
        return
    if max(token_ids, default=0) >= num_rows:
        token_id = next(token_id for token_id in token_ids if token_id >= num_rows)
        text = service.text.tokenizer.token_text(token_id)
        param = param_of(text)
        told = f"token {token_id} of the tokenizer; the model has only {num_rows}"
        raise invalid(f"{param} holds {shortened(text)!r}, {told}", param)


def require_tokens(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raise `ApiError` (400) for a token id outside the vocabulary."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        index = next(i for i, token in enumerate(token_ids) if not 0 <= token < vocab_size)
        message = (
            f"{param}.{index} is no token id: the vocabulary has the ids 0 to {vocab_size - 1}"
        )
        raise invalid(message, param)


async def token_text(service: Service, token_ids: Sequence[int]) -> str:
    """Return the text of `token_ids`, special tokens and all. Raises `ApiError`."""

    def decode(_: Check) -> str:
        require_tokens(token_ids, service.client.info.vocab_size, "tokens")
        return service.text.tokenizer.decode(token_ids, skip_special_tokens=False)

    return await service.work.run(decode, len(token_ids))


async def token_texts(service: Service, token_ids: Sequence[int]) -> list[str]:
    """Return the text of each of `token_ids`."""
    text_of = service.text.tokenizer.token_text
    return await service.work.run(lambda _: [*map(text_of, token_ids)], len(token_ids))


def context_words(limit: int) -> str:
    """Return what an error says first of a text that does not fit.

    OpenAI's words: LiteLLM knows by them, and by nothing else, to try a model with more room.
    """
    return f"This model's maximum context length is {limit} tokens, prompt and answer together"


def require_room(service: Service, text: str, param: str) -> None:
    """Raise `ApiError` (400) for a text that cannot fit, however its letters make tokens."""
    limit = service.client.info.max_model_len
    if len(text) >= LONG_CHARS and (least := service.text.tokenizer.least_tokens(text)) >= limit:
        told = f"{context_words(limit)}: {param} has at least {least}"
        raise invalid(told, param, "context_length_exceeded")


async def _encoded(
    service: Service,
    prompts: Sequence[str | list[int]],
    *,
    add_special_tokens: bool,
    param: str,
    must_fit: bool = False,
) -> list[list[int]]:
    """Return the prompts in tokens, all in one go; raise `ApiError` if one is no text.

    `param`: the field they came in; `must_fit`: those that cannot are refused before they are.
    """

    def encoded(text: str, check: Check) -> list[int]:
        if must_fit:
            require_room(service, text, param)
        tokenizer = service.text.tokenizer
        token_ids = tokenizer.encode(text, add_special_tokens=add_special_tokens, check=check)
        require_rows(service, token_ids, lambda _: param)
        return token_ids

    def encode_all(check: Check) -> list[list[int]]:
        return [encoded(prompt, check) if isinstance(prompt, str) else prompt for prompt in prompts]

    try:
        num_chars = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        return await service.work.run(encode_all, num_chars)
    except TextError as error:
        raise invalid(str(error), param) from error
