"""OpenAI's `prediction`: a text that the answer is expected to repeat.

It makes an answer faster and changes none of its tokens. Knows nothing of drafts.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from server.generation.prompt_messages import MAX_PARTS, require_kind


def _as_kind(value: object) -> object:
    require_kind(value, ("text",))
    return value


def _as_parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class PredictedPart(BaseModel):
    """A piece of the expected text."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Annotated[Literal["text"], BeforeValidator(_as_kind)]
    text: str


class Prediction(BaseModel):
    """The expected text, whole or in parts."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["content"]
    content: Annotated[
        Annotated[list[PredictedPart], Field(max_length=MAX_PARTS, fail_fast=True)],
        BeforeValidator(_as_parts, json_schema_input_type=str | list[PredictedPart]),
    ]

    @property
    def text(self) -> str:
        """All its text."""
        return "".join(part.text for part in self.content)
