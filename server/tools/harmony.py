"""The messages that gpt-oss writes (OpenAI's harmony format): headers and recipients.

A header has the channel of its message, and the recipient if that is a tool:
`<|start|>assistant to=functions.NAME<|channel|>commentary <|constrain|>json<|message|>`. The
recipient may also stand behind the channel. Knows nothing of content and reasoning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from server.tools.call_writer import CallWriter
from server.tools.source import MismatchError, Reading, Source
from server.tools.syntaxes import CallForm, CallSyntax, read_closer, read_named

#: The ends of a message. Text of reasoning may contain all but the first.
MESSAGE_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_BODY = "<|message|>"
_HEADER_STARTS = ("<|start|>", "<|channel|>", "<|constrain|>", _BODY, "to=")
#: A longer text is not a header.
_MAX_HEADER_CHARS = 1000
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_FUNCTIONS = "functions."


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a message."""

    channel: str
    #: Empty for the user.
    recipient: str
    #: The position of its message.
    end: int

    @property
    def is_call(self) -> bool:
        """Whether the message is the arguments of a call."""
        return self.recipient.startswith(_FUNCTIONS)

    @property
    def is_for_others(self) -> bool:
        """Whether the message is for a tool that was built into the model's environment."""
        return self.recipient not in {"", "assistant", "user", "all"}


def read_header(source: Source, at: int) -> Reading[Header]:
    """Return the header at `at`. Raises `MismatchError` if there is none."""
    at = yield from source.space(at)
    yield from source.word(at, *_HEADER_STARTS)
    while (end := source.text.find(_BODY, at)) < 0:
        if len(source.text) - at > _MAX_HEADER_CHARS:
            raise MismatchError
        yield from source.more()
    if end - at > _MAX_HEADER_CHARS - len(_BODY):
        raise MismatchError
    text = source.text[at:end]
    channels, recipients = _CHANNEL.findall(text), _RECIPIENT.findall(text)
    return Header(
        channels[-1] if channels else "",
        recipients[-1] if recipients else "",
        end + len(_BODY),
    )


def _read_call(source: Source, at: int, out: CallWriter) -> Reading[None]:
    """Read the call whose header is at `at`."""
    header = yield from read_header(source, at)
    name = header.recipient.removeprefix(_FUNCTIONS)
    at = yield from read_named(source, header.end, name, out)
    yield from read_closer(source, at, *MESSAGE_ENDS)


_FORM = CallForm(
    between=("<|start|>", "assistant"),
    before_name=("<|channel|>", "commentary to=functions."),
    before_arguments=(" ", "<|constrain|>", "json", "<|message|>"),
    after_arguments=("<|end|>",),
)
#: Its calls are found by their messages' headers.
HARMONY = CallSyntax("openai", (), _read_call, has_special_marks=True, form=_FORM)
