"""A chat's choice that is more than text: reasoning and calls, whole and as a stream.

Knows nothing of how they are told apart (`server/tools/`) nor of how they are generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from server.answer_types import StreamReport
from server.generation.answer_parser import AnswerParser, call_ids
from server.generation.generate import Job
from server.generation.output import FinishWord, OutputChunk
from server.generation.tooling import ParserOptions
from server.http.context import RequestRecord
from server.openai.chat import ChatFormat
from server.openai.response_models import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatFinishReason,
    ChoiceDetails,
    MessageDelta,
    ToolCall,
    ToolCallDelta,
)
from server.service import Service
from server.tools.events import (
    ArgumentsDelta,
    CallEnded,
    CallStarted,
    Content,
    CutCall,
    Event,
    Reasoning,
    joined,
)


class ParsedChatFormat(ChatFormat):
<<<<<<< tmpmoves
    """See `AnswerFormat`. A call's first delta has its name, the others its arguments."""
=======
    """See `AnswerFormat`. A call's first delta has its name, later ones add to its arguments."""
>>>>>>> m-ans

    def __init__(
        self,
        service: Service,
        job: Job,
        record: RequestRecord,
        index: int,
        parser_options: ParserOptions,
    ) -> None:
        super().__init__(service, job, record, index)
        self._is_named = parser_options.is_named
        self._parser = AnswerParser(parser_options)
        self._new_call_id = call_ids(service.chance, parser_options)
        self._num_started = 0
        #: Of the call that was started last.
        self._is_custom = False

    def chunk(self, chunk: OutputChunk) -> bytes:
        """See `AnswerFormat`."""
        return self._chunks(self._parser.push(chunk.text), chunk)

    def closing(self, finish_reason: FinishWord, report: StreamReport) -> bytes:
        """See `AnswerFormat`."""
        rest = self._chunks(self._parser.finish(), None)
        choice = self._chunk_choice({}, self._reason(finish_reason))
        return rest + self._envelope.closing({**choice, **self._left_out()}, report)

    def choice(self, output: OutputChunk) -> ChatChoice:
        """See `AnswerFormat`."""
        assert output.finish_reason is not None, "the output has not ended"
        events = joined(self._parser.push(output.text) + self._parser.finish())
        self._add_prompt_logprobs(output)
        return {
            "index": self._index,
            "message": self._message(events),
            "logprobs": self._logprobs(output),
            "finish_reason": self._reason(output.finish_reason),
            **self._token_ids(output),
            **self._left_out(),
        }

    def _message(self, events: Sequence[Event]) -> AssistantMessage:
        message: AssistantMessage = {"role": "assistant", "content": None, "refusal": None}
        calls: list[ToolCall] = []
        for event in events:
            match event:
                case Content(text):
                    message["content"] = (message["content"] or "") + text
                case Reasoning(text):
                    message["reasoning_content"] = message.get("reasoning_content", "") + text
                case CallStarted(name, is_custom):
                    calls.append(self._called(name, is_custom=is_custom))
                    message["tool_calls"] = calls
                case ArgumentsDelta(text) if "custom" in calls[-1]:
                    calls[-1]["custom"]["input"] += text
                case ArgumentsDelta(text):
                    calls[-1]["function"]["arguments"] += text
                case CallEnded() | CutCall():
                    pass
        if not calls:
            message["content"] = message["content"] or ""
        return message

    def _called(self, name: str, *, is_custom: bool) -> ToolCall:
        call_id = self._new_call_id()
        if is_custom:
            return {"id": call_id, "type": "custom", "custom": {"name": name, "input": ""}}
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}

    def _chunks(self, events: Sequence[Event], chunk: OutputChunk | None) -> bytes:
        """Return a chunk for each event; the details of the tokens are in the first."""
        deltas = [delta for event in events if (delta := self._delta_of(event)) is not None]
        has_details = chunk is not None and (self._has_logprobs or self._has_token_ids)
        choices: list[ChatChunkChoice] = [
            self._chunk_choice(delta) for delta in (deltas or [{}] if has_details else deltas)
        ]
        if chunk is not None and has_details:
            choices[0]["logprobs"] = self._logprobs(chunk)
            if self._has_token_ids:
                choices[0]["token_ids"] = list(chunk.token_ids)
        return b"".join(self._envelope.choice(choice, {}) for choice in choices)

    def _delta_of(self, event: Event) -> MessageDelta | None:
        match event:
            case Content(text):
                return {"content": text}
            case Reasoning(text):
                return {"reasoning_content": text}
            case CallStarted(name, is_custom):
                self._is_custom = is_custom
                self._num_started += 1
                called = self._called(name, is_custom=is_custom)
                started = {"index": self._num_started - 1, **called}
                return {"tool_calls": [cast("ToolCallDelta", started)]}
            case ArgumentsDelta(text):
                return {"tool_calls": [self._added(text)]}
            case CallEnded() | CutCall():
                return None

    def _added(self, text: str) -> ToolCallDelta:
        index = self._num_started - 1
        if self._is_custom:
            return {"index": index, "custom": {"input": text}}
        return {"index": index, "function": {"arguments": text}}

    def _reason(self, reason: FinishWord) -> ChatFinishReason:
        has_called = self._parser.num_calls > 0 and reason == "stop" and not self._is_named
        return "tool_calls" if has_called else reason

    def _left_out(self) -> ChoiceDetails:
        left_out = self._parser.left_out
        return {"octavo": {"left_out": left_out}} if left_out else {}
