"""`POST /v1/chat/completions`: the JSON of chats, whole and as a stream.

Knows nothing of how calls and reasoning are parsed (`server/tools/`) nor of how they are generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from server.answer_types import Report, StreamReport
from server.generation.answer_parser import AnswerParser, call_ids
from server.generation.chunks import Envelope
from server.generation.generate import Job
from server.generation.output import FinishWord, OutputChunk
from server.generation.prompt_logprobs import listed, logprobs_entry
from server.http import sse
from server.http.context import RequestRecord
from server.openai.response_models import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatFinishReason,
    ChatLogprobs,
    ChoiceDetails,
    MessageDelta,
    PromptDetails,
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

_DELTA = b'{"index":%d,"delta":{"content":'
_NO_LOGPROBS = b'},"logprobs":null,"finish_reason":null}'


class ChatFormat:
    """One choice of a chat's response; see `AnswerFormat`.

    A call's first delta has its name, later ones add to its arguments.
    """

    def __init__(self, service: Service, job: Job, record: RequestRecord, index: int) -> None:
        options = job.parser_options
        self._tokenizer = service.text.tokenizer
        self._id = f"chatcmpl-{record.request_id}"
        self._created_s = job.created_s
        self._model = service.model_name
        chunk = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created_s,
            "model": self._model,
        }
        self._envelope = Envelope(chunk, job, record)
        self._index = index
        self._has_logprobs = job.has_logprobs
        self._has_token_ids = job.spec.fields.return_token_ids is True
        self._num_prompt_logprobs = job.spec.fields.prompt_logprobs
        #: Of a text without details: each chunk is the same up to the text.
        self._text_head = b""
        if options is None and not self._has_logprobs and not self._has_token_ids:
            self._text_head = _DELTA % index
        self._no_delta: MessageDelta = {"content": ""} if options is None else {}
        self._is_named = options is not None and options.is_named
        self._parser = AnswerParser(options)
        self._new_call_id = call_ids(service.chance, options)
        self._num_started = 0
        #: Of the call that was started last.
        self._is_custom = False
        # The details of a chat's prompt stand beside the choices (vLLM's way), once.
        self._prompt: PromptDetails = {}
        if self._has_token_ids:
            self._prompt["prompt_token_ids"] = list(job.prompts[0])

    def opening(self) -> bytes:
        """See `AnswerFormat`."""
        choice = self._chunk_choice({"role": "assistant", "content": ""})
        return self._envelope.choice(choice, {} if self._index else self._prompt)

    def chunk(self, chunk: OutputChunk) -> bytes:
        """See `AnswerFormat`."""
        if self._text_head:
            return self._envelope.text(self._text_head, chunk.text, _NO_LOGPROBS)
        return self._chunks(self._parser.push(chunk.text), chunk)

    def closing(self, finish_reason: FinishWord, report: StreamReport) -> bytes:
        """See `AnswerFormat`."""
        rest = self._chunks(self._parser.finish(), None)
        choice = self._chunk_choice({}, self._reason(finish_reason))
        return rest + self._envelope.closing({**choice, **self._left_out()}, report)

    def ending(self) -> bytes:
        """See `AnswerFormat`."""
        return sse.DONE

    def choice(self, output: OutputChunk) -> ChatChoice:
        """See `AnswerFormat`."""
        assert output.finish_reason is not None, "the output has not ended"
        events = joined(self._parser.push(output.text) + self._parser.finish())
        if self._num_prompt_logprobs is not None:
            self._prompt["prompt_logprobs"] = listed(
                self._tokenizer, output.delta.prompt_logprobs, self._num_prompt_logprobs
            )
        return {
            "index": self._index,
            "message": self._message(events),
            "logprobs": self._logprobs(output),
            "finish_reason": self._reason(output.finish_reason),
            **self._token_ids(output),
            **self._left_out(),
        }

    def answer(self, choices: list[ChatChoice], report: Report) -> ChatCompletion:
        """See `AnswerFormat`."""
        return {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created_s,
            "model": self._model,
            "choices": choices,
            **self._prompt,
            **report,
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
        if has_details and not deltas:
            deltas = [self._no_delta]
        choices = [self._chunk_choice(delta) for delta in deltas]
        if chunk is not None and has_details:
            first: ChatChunkChoice = {**choices[0], "logprobs": self._logprobs(chunk)}
            choices[0] = {**first, **self._token_ids(chunk)}
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

    def _chunk_choice(
        self, delta: MessageDelta, finish_reason: ChatFinishReason | None = None
    ) -> ChatChunkChoice:
        return {
            "index": self._index,
            "delta": delta,
            "logprobs": None,
            "finish_reason": finish_reason,
        }

    def _logprobs(self, chunk: OutputChunk) -> ChatLogprobs | None:
        if not self._has_logprobs:
            return None
        entries = [logprobs_entry(self._tokenizer, token.logprobs) for token in chunk.tokens]
        return {"content": entries, "refusal": None}

    def _token_ids(self, chunk: OutputChunk) -> ChoiceDetails:
        return {"token_ids": list(chunk.delta.token_ids)} if self._has_token_ids else {}
