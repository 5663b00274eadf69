"""Parameters of `POST /v1/responses` that are not fields of its body.

The chat's table in `server/generation/params.py` applies too, where this one has no entry.
"""

from __future__ import annotations

from collections.abc import Mapping

from server.generation.params import CHAT, Unsupported, refused, warned
from server.responses.schemas import ResponsesRequest

#: Named, for the table below holds it as a value, not as a switch.
_FALSE = False


_OWN = {
    "background": refused(_FALSE, because="is not supported: a response lives with its request"),
    "background_options": refused({}),
    "conversation": refused(because="is not supported; use previous_response_id"),
    "prompt": refused(because="is not supported: no prompt templates are kept here"),
    "context_management": refused([], because="is not supported; see truncation"),
    "moderation": refused(),
    "messages": refused(because="is not supported; it is called input here"),
    "max_completion_tokens": refused(
        because="is not supported; it is called max_output_tokens here"
    ),
    "logprobs": refused(_FALSE, because="is not supported; see include"),
    "reasoning_effort": refused(because="is not supported; it is reasoning.effort here"),
    "verbosity": refused(because="is not supported; it is text.verbosity here"),
    "add_generation_prompt": refused(True),  # noqa: FBT003 - a value, not a switch
    "continue_final_message": refused(_FALSE),
    "max_tool_calls": warned("it counts calls of built-in tools, and there are none"),
    "client_metadata": warned("is not used", {}),
    "access_programs": warned("there are none", {}),
    "image": warned("there are no pictures", {}),
    "prediction": warned("it is a field of chats"),
}
RESPONSES: Mapping[str, Unsupported] = {
    name: known
    for name, known in (CHAT | _OWN).items()
    if name not in ResponsesRequest.model_fields
}
REASONING: Mapping[str, Unsupported] = {
    "summary": warned("reasoning is sent unchanged, without a summary"),
    "generate_summary": warned("reasoning is sent unchanged, without a summary"),
    "context": warned("the model's template decides what it sees again", "auto"),
    "mode": warned("there is one mode", "standard"),
}
#: Values of `include` besides log-probabilities. They have no effect, each for its reason.
INCLUDABLE: Mapping[str, str] = {
    "reasoning.encrypted_content": "reasoning is sent as plain text",
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
