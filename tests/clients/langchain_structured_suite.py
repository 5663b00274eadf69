"""langchain-openai: answers of a given form."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict

QUESTION = "It snows in Oslo. Tell the weather as JSON."


class Weather(BaseModel):
    """The weather in a city."""

    # Else a model of this size may go on with keys of its own for as long as there is room.
    model_config = ConfigDict(extra="forbid")

    city: Literal["Oslo", "Rome"]
    sky: Literal["sunny", "rainy", "snowy"]
    is_cold: bool


def _chat(server: Any) -> Any:
    return ChatOpenAI(
        base_url=server.base_url,
        api_key=server.key,
        model=server.model,
        temperature=1,
        max_retries=0,
    )


@pytest.mark.parametrize("strict", [None, True])
def test_by_response_format(served: Any, *, strict: bool | None) -> None:
    model = _chat(served).with_structured_output(Weather, method="json_schema", strict=strict)
    assert isinstance(model.invoke(QUESTION), Weather)
    *_, last = model.stream(QUESTION)
    assert isinstance(last, Weather)


def test_by_a_tool(guarded: Any) -> None:
    model = _chat(guarded).with_structured_output(Weather, method="function_calling")
    assert isinstance(model.invoke(QUESTION), Weather)


def test_a_tool_that_must_be_called(guarded: Any) -> None:
    bound = {"tool_choice": "any", "parallel_tool_calls": False}
    model = _chat(guarded).bind_tools([Weather], **bound)
    [call] = model.invoke(QUESTION).tool_calls
    Weather.model_validate(call["args"])
