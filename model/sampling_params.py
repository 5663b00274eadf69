"""The sampling parameters of a request: plain data, checked when it is made. No torch."""

from __future__ import annotations

from dataclasses import dataclass

MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request's tokens are chosen, and when it has enough of them.

    Randomness is a function of `(seed, position)` alone, so the same request gives the same tokens
    in every batch. Raises `ValueError` whose message begins with the field's name.
    """

    #: 0: nothing is sampled, the prompt alone is computed.
    max_tokens: int
    temperature: float = 1.0
    #: 0 means no limit.
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    #: The only tokens allowed; None: all. They take precedence: where bans (`bad_words`, ends
    #: before `min_tokens`) leave none of them, the bans do not apply.
    allowed_token_ids: tuple[int, ...] | None = None
    #: Sequences of tokens that the output must not contain.
    bad_words: tuple[tuple[int, ...], ...] = ()
    seed: int = 0
    #: None: not requested; 0: of the sampled token alone; n: also of the n likeliest.
    logprobs: int | None = None
    #: The same of the prompt's tokens, each after those before it; of the first there is nothing.
    prompt_logprobs: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    #: The output's grammar in llguidance's format (Lark, with JSON Schemas in it); None: free.
    #: It may end before `min_tokens`, where the grammar allows nothing else.
    grammar: str | None = None

    def __post_init__(self) -> None:
        tops = f"between 0 and {MAX_TOP_LOGPROBS}"
        for name, holds, allowed in (
            ("max_tokens", self.max_tokens >= 0, "at least 0"),
            ("temperature", 0.0 <= self.temperature <= 2.0, "between 0 and 2"),
            ("top_k", self.top_k >= 0, "0 (no limit) or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "between -2 and 2"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "between -2 and 2"),
            ("repetition_penalty", 0.0 < self.repetition_penalty <= 10.0, "above 0, at most 10"),
            ("seed", 0 <= self.seed < 2**64, "an unsigned 64-bit number"),
            ("logprobs", 0 <= (self.logprobs or 0) <= MAX_TOP_LOGPROBS, tops),
            ("prompt_logprobs", 0 <= (self.prompt_logprobs or 0) <= MAX_TOP_LOGPROBS, tops),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "between 0 and max_tokens"),
            (
                "logit_bias",
                all(-100.0 <= bias <= 100.0 for _, bias in self.logit_bias),
                "between -100 and 100 for each token",
            ),
            ("allowed_token_ids", self.allowed_token_ids != (), "null or not empty"),
            ("bad_words", all(self.bad_words), "of one token or more each"),
        ):
            if not holds:
                message = f"{name} must be {allowed}, got {getattr(self, name)!r}"
                raise ValueError(message)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0 or self.top_k == 1
