"""Turns drawn prompts into requests for a certain server, as `loadtest/probe.py` found. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from loadtest.words import WORDS
from loadtest.workloads import Drawn, Turn, Workload

#: How an answer is made to be as long as asked: by this field, or not at all.
Ending: TypeAlias = Literal["ignore_eos", "min_tokens", "none"]

_PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


@dataclass(frozen=True, slots=True)
class Spelling:
    """How draws become a prompt of as many tokens.

    As token ids it is exact. As text it is as exact as `tokens_per_word`; a template or a tokenizer
    adds `overhead_tokens`.
    """

    token_ids: tuple[int, ...] | None = None
    tokens_per_word: float = 1.0
    overhead_tokens: float = 0.0

    def ids(self, prompt: Drawn) -> list[int]:
        """Return token ids. Only if there are `token_ids`."""
        assert self.token_ids is not None
        return [self.token_ids[draw % len(self.token_ids)] for draw in prompt.draws]

    def text(self, prompt: Drawn, *, is_first: bool = True) -> str:
        """Return words; after the first turn there is no overhead to make room for."""
        wanted = len(prompt.draws) - (self.overhead_tokens if is_first else 0.0)
        num_words = max(1, round(wanted / self.tokens_per_word))
        # Cut at the end: a prefix that is shared stays shared.
        return prompt.before + " ".join(
            WORDS[draw % len(WORDS)] for draw in prompt.draws[:num_words]
        )


@dataclass(frozen=True, slots=True)
class Manner:
    """How to ask a certain server so that it takes it."""

    ending: Ending = "ignore_eos"
    has_usage: bool = True
    #: Every event has the usage so far: exact counts, at some cost to the server.
    has_continuous_usage: bool = False
    #: More fields for every body, as a user gave them.
    extra: dict[str, Any] = field(default_factory=dict)

    def fields(self, max_tokens: int) -> dict[str, Any]:
        """Return the fields that all bodies share."""
        fields: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 0, "stream": True}
        if self.has_usage:
            fields["stream_options"] = {"include_usage": True}
            if self.has_continuous_usage:
                fields["stream_options"]["continuous_usage_stats"] = True
        if self.ending == "ignore_eos":
            fields["ignore_eos"] = True
        elif self.ending == "min_tokens":
            fields["min_tokens"] = max_tokens
        return fields | self.extra


@dataclass(frozen=True, slots=True)
class Composer:
    """Writes the bodies of a workload's requests for one server."""

    model: str
    workload: Workload
    spelling: Spelling
    manner: Manner

    @property
    def path(self) -> str:
        """The route of the requests."""
        return _PATHS[self.workload.endpoint]

    def body(self, turn: Turn, history: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the body of a turn; `history` holds the messages before it."""
        body = {"model": self.model, **self.manner.fields(turn.max_tokens)}
        if self.workload.response_format is not None:
            body["response_format"] = dict(self.workload.response_format)
        body |= turn.fields
        if self.workload.endpoint == "chat":
            body["messages"] = self.messages(turn, history)
        elif not isinstance(turn.prompt, Drawn):
            body["prompt"] = turn.prompt.content
        elif self.spelling.token_ids is not None and not turn.prompt.before:
            body["prompt"] = self.spelling.ids(turn.prompt)
        else:
            body["prompt"] = self.spelling.text(turn.prompt)
        return body

    def messages(self, turn: Turn, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages of a chat up to and with this turn."""
        if not isinstance(turn.prompt, Drawn):
            content = turn.prompt.content
            if isinstance(content, list):
                return [message for message in content if isinstance(message, dict)]
            return [*history, {"role": "user", "content": content}]
        text = self.spelling.text(turn.prompt, is_first=not history)
        if turn.system is not None:
            system = self.spelling.text(turn.system, is_first=False)
            history = [*history, {"role": "system", "content": system}]
        calls = history[-1].get("tool_calls", ()) if turn.is_result and history else ()
        if not calls:
            return [*history, {"role": "user", "content": text}]
        results = [{"role": "tool", "tool_call_id": one["id"], "content": text} for one in calls]
        return [*history, *results]
