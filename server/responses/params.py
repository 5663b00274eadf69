"""What becomes of each parameter of `POST /v1/responses` that is no field of its body.

As in `server/generation/params.py`, which it begins with: the rest of the chat's table holds here
too.
"""

from __future__ import annotations

from collections.abc import Mapping

from server.generation.params import CHAT, Unsupported
from server.responses.schemas import ResponsesRequest

#: Named, for the table below holds it as a value, not as a switch.
_FALSE = False


def _refused(*neutral: object, because: str = "is not supported") -> Unsupported:
    return Unsupported(neutral, is_refused=True, reason=because)


def _warned(because: str, *neutral: object) -> Unsupported:
    return Unsupported(neutral, is_refused=False, reason=because)


_OWN = {
    "background": _refused(_FALSE, because="is not supported: a response lives with its request"),
    "background_options": _refused({}),
    "conversation": _refused(because="is not supported; use previous_response_id"),
    "prompt": _refused(because="is not supported: no prompt templates are kept here"),
    "context_management": _refused([], because="is not supported; see truncation"),
    "moderation": _refused(),
    "messages": _refused(because="is not supported; it is called input here"),
    "max_completion_tokens": _refused(
        because="is not supported; it is called max_output_tokens here"
    ),
    "logprobs": _refused(_FALSE, because="is not supported; see include"),
    "reasoning_effort": _refused(because="is not supported; it is reasoning.effort here"),
    "verbosity": _refused(because="is not supported; it is text.verbosity here"),
    "add_generation_prompt": _refused(True),  # noqa: FBT003 - a value, not a switch
    "continue_final_message": _refused(_FALSE),
    "max_tool_calls": _warned("it counts calls of built-in tools, and there are none"),
    "prompt_cache_options": _warned("prefixes are kept as long as there is room", {}),
    "client_metadata": _warned("is not used", {}),
    "access_programs": _warned("there are none", {}),
    "image": _warned("there are no pictures", {}),
}
RESPONSES: Mapping[str, Unsupported] = {
    name: known
    for name, known in (CHAT | _OWN).items()
    if name not in ResponsesRequest.model_fields
}
REASONING: Mapping[str, Unsupported] = {
    "summary": _warned("reasoning is told as it is, not summed up"),
    "generate_summary": _warned("reasoning is told as it is, not summed up"),
    "context": _warned("the model's template decides what it sees again", "auto"),
    "mode": _warned("there is one mode", "standard"),
}
#: What `include` may ask for besides log-probabilities; without effect, each for its reason.
INCLUDABLE: Mapping[str, str] = {
    "reasoning.encrypted_content": "reasoning is told as plain text",
    **dict.fromkeys(
        (
            "file_search_call.results",
            "web_search_call.results",
            "web_search_call.action.sources",
            "message.input_image.image_url",
            "computer_call_output.output.image_url",
            "code_interpreter_call.outputs",
        ),
        "there is nothing of that kind here",
    ),
}
LOGPROBS = "message.output_text.logprobs"
