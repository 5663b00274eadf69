"""LiteLLM: answers of a given form."""

from __future__ import annotations

from typing import Any, Literal

import litellm
import pytest
from pydantic import BaseModel

QUESTION = [{"role": "user", "content": "It snows in Oslo. Tell the weather as JSON."}]


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Oslo", "Rome"]
    sky: Literal["sunny", "rainy", "snowy"]
    is_cold: bool


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_by_response_format(served: Any, provider: str) -> None:
    asked = {
        "model": f"{provider}/{served.model}",
        "api_base": served.base_url,
        "api_key": served.key,
        "messages": QUESTION,
        "response_format": Weather,
        "temperature": 1,
    }
    whole = litellm.completion(**asked)
    Weather.model_validate_json(whole.choices[0].message.content)
    chunks = list(litellm.completion(**asked, stream=True))
    rebuilt = litellm.stream_chunk_builder(chunks, messages=QUESTION)
    Weather.model_validate_json(rebuilt.choices[0].message.content)
