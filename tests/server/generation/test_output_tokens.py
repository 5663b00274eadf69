"""The tokens of an output in all APIs: each probability with its text, each count once.

The test chooses the model's output, in tokens of a byte-level vocabulary with every awkward kind:
parts of characters, tags in one token, in several and astride, special tokens.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Core

from event_streams import chunks_of, events_of
from scheduler.client import FinishReason, GenerateRequest, TokenLogprobs, TokenOutput
from server.text.load import ModelText
from server.text.template import ChatTemplate
from server.text.token_bytes import BYTE_LEVEL_ALPHABET
from server.text.tokenizer import SpecialIds, Tokenizer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
PARAMETERS = {"type": "object"}
FUNCTION = {"name": "add", "parameters": PARAMETERS}
TOOLS = {
    CHAT: [{"type": "function", "function": FUNCTION}],
    RESPONSES: [{"type": "function", **FUNCTION}],
    MESSAGES: [{"name": "add", "input_schema": PARAMETERS}],
}
_TALK = "{{ tools }}<tool_call>{% for m in messages %}{{ m.content }}{% endfor %}"
_TAGS = "{# <think> </think> #}"
#: Of models that do not reason, that may, and whose prompts begin the reasoning.
TEMPLATES = {"plain": _TALK, "may": _TALK + _TAGS, "must": _TALK + _TAGS + "<think>\n"}
CALL = ["<tool_call>", '{"name": "add", ', '"arguments": {"a": 1}}', "</tool_call>"]
WORDS = [
    *("<think>", "</think>", "<th", "ink>", "</", "think>", " <think>\n", "\n</think>\n\nY"),
    *(*CALL, ".<tool_call>\n", "<tool", "_call>", "</tool_call>Z", "\n<"),
    *("a", "ab", "c", " ", "\n", " d ", "é", "\u00a0", "\u3000", "e\u0301f"),
]
PAD, END = "<pad>", "<end>"
_BYTES = [b"\xc3", b"\xa9", b"\xe2", b"\x82", b"\xac", b"\xc2", b"\xa0", b"x"]
STOPS = ["a", "bc", "</think>", "think>", "é", "\ufffd", "d \n", "<tool", "\n\n", "Y", "ab c"]


def _vocabulary() -> tuple[Tokenizer, dict[bytes, int]]:
    """Return a tokenizer, and its ids by the tokens' texts."""
    written = [BYTE_LEVEL_ALPHABET[byte] for byte in range(256)]
    spelled = ["".join(BYTE_LEVEL_ALPHABET[byte] for byte in word.encode()) for word in WORDS]
    tokens = list(dict.fromkeys(written + spelled))
    core = Core(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(PAD, special=True), AddedToken(END, special=True)])
    tokenizer = Tokenizer(core, SpecialIds(eos_token_ids=(len(tokens) + 1,)))
    return tokenizer, {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}


TOKENIZER, IDS = _vocabulary()


@dataclass(frozen=True)
class Said:
    """An output: tokens, where the engine's deltas are cut, and how it ends.

    `ends_apart`: the reason comes behind the last tokens, not with them.
    """

    token_ids: Sequence[int] = ()
    cuts: Sequence[int] = ()
    has_end_token: bool = False
    ends_apart: bool = False

    def deltas(self) -> list[TokenOutput]:
        """Return them; the probability of token i is that of its number."""
        token_ids = (*self.token_ids, *((IDS[END.encode()],) if self.has_end_token else ()))
        scores = tuple(TokenLogprobs(token, -float(i), 1) for i, token in enumerate(token_ids))
        bounds = sorted({0, len(token_ids), *(cut % (len(token_ids) + 1) for cut in self.cuts)})
        deltas = [TokenOutput(token_ids[a:b], scores[a:b]) for a, b in pairwise(bounds)]
        if self.ends_apart or not deltas:
            deltas.append(TokenOutput())
        reason = FinishReason.STOP if self.has_end_token else FinishReason.LENGTH
        deltas[-1] = replace(deltas[-1], finish_reason=reason)
        return deltas


@pytest.fixture(scope="module")
def says() -> list[Said]:
    """The output of the next requests."""
    return [Said()]


@pytest.fixture(scope="module")
def servers(
    start_shared: Callable[..., Any], scripted_client: Callable[..., Any], says: list[Said]
) -> dict[str, Any]:
    async def script(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        for delta in says[0].deltas():
            yield delta if request.params.logprobs is not None else replace(delta, logprobs=())

    def server(template: str) -> Any:
        words = ChatTemplate(
            {"default": template}, special_tokens={}, now=lambda: datetime.now(UTC)
        )
        client = scripted_client(script)
        ends = TOKENIZER.eos_token_ids
        client.info = replace(client.info, vocab_size=TOKENIZER.vocab_size, eos_token_ids=ends)
        return start_shared(client, words=ModelText(TOKENIZER, words))

    return {name: server(template) for name, template in TEMPLATES.items()}


# ---- what an API told, in one shape


@dataclass
class Told:
    """The content of a response: entries are the numbers of the tokens with probabilities."""

    #: The text of each message, and the entries beside it.
    texts: list[str]
    entries: list[list[int]]
    reasoning: str
    num_reasoning: int | None
    num_output: int
    #: Of a completion's entries: where the text of each begins.
    starts: list[int] = field(default_factory=list)


def asked(path: str, *, has_tools: bool, is_stream: bool, **more: Any) -> dict[str, Any]:
    """Return a body for `path`."""
    body: dict[str, Any] = {"stream": is_stream, **more}
    if has_tools and path != COMPLETIONS:
        body["tools"] = TOOLS[path]
    messages = [{"role": "user", "content": "x"}]
    if path == COMPLETIONS:
        body |= {"prompt": "x", "logprobs": 0}
    elif path == CHAT:
        body |= {"messages": messages, "logprobs": True}
    elif path == RESPONSES:
        body |= {"input": "x", "include": ["message.output_text.logprobs"], "store": False}
    else:
        body |= {"messages": messages, "model": "fake", "max_tokens": 100}
        body["stop_sequences"] = body.pop("stop", [])
    if is_stream and path in {COMPLETIONS, CHAT}:
        body["stream_options"] = {"include_usage": True}
    return body


def of_openai(bodies: list[dict[str, Any]]) -> Told:
    """Read a chat or a completion, whole or in chunks."""
    choices = [choice for body in bodies for choice in body["choices"]]
    parts = [choice.get("message") or choice.get("delta") or choice for choice in choices]
    found = [choice["logprobs"] or {} for choice in choices]
    logprobs = [entry["logprob"] for one in found for entry in one.get("content") or ()]
    logprobs += [logprob for one in found for logprob in one.get("token_logprobs", ())]
    entries = [round(-logprob) for logprob in logprobs]
    starts = [start for one in found for start in one.get("text_offset", ())]
    text = "".join(part.get("content") or part.get("text") or "" for part in parts)
    reasoning = "".join(part.get("reasoning_content") or "" for part in parts)
    usage = bodies[-1]["usage"]
    details = usage.get("completion_tokens_details")
    num_reasoning = None if details is None else details["reasoning_tokens"]
    return Told([text], [entries], reasoning, num_reasoning, usage["completion_tokens"], starts)


def of_response(bodies: list[dict[str, Any]]) -> Told:
    response = bodies[-1].get("response") or bodies[-1]
    messages = [item for item in response["output"] if item["type"] == "message"]
    parts = [part for item in messages for part in item["content"]]
    for item, part in zip(messages, parts, strict=True) if len(bodies) > 1 else ():
        deltas = [body for body in bodies if body["type"] == "response.output_text.delta"]
        own = [body for body in deltas if body["item_id"] == item["id"]]
        assert part["text"] == "".join(body["delta"] for body in own)
        assert part["logprobs"] == [entry for body in own for entry in body["logprobs"]]
    thoughts = [item for item in response["output"] if item["type"] == "reasoning"]
    reasoning = "".join(part["text"] for item in thoughts for part in item["content"])
    entries = [[round(-entry["logprob"]) for entry in part["logprobs"]] for part in parts]
    usage = response["usage"]
    num_reasoning = usage["output_tokens_details"]["reasoning_tokens"]
    texts = [part["text"] for part in parts]
    return Told(texts, entries, reasoning, num_reasoning, usage["output_tokens"])


def of_message(bodies: list[dict[str, Any]]) -> Told:
    blocks = [*bodies[0].get("content", []), *(body.get("delta", {}) for body in bodies)]
    end = bodies[0] if len(bodies) == 1 else bodies[-2]
    text, reasoning = ("".join(of.get(kind, "") for of in blocks) for kind in ("text", "thinking"))
    num_reasoning = end["octavo"].get("reasoning_tokens")
    return Told([text], [], reasoning, num_reasoning, end["usage"]["output_tokens"])


READERS = {COMPLETIONS: of_openai, CHAT: of_openai, RESPONSES: of_response, MESSAGES: of_message}


def tell(live: Any, path: str, *, has_tools: bool, **more: Any) -> Told:
    """Request an answer whole and as a stream; both must be equal."""
    whole = live.post(path, **asked(path, has_tools=has_tools, is_stream=False, **more))
    assert whole.status_code == 200, whole.text
    stream = live.post(path, **asked(path, has_tools=has_tools, is_stream=True, **more))
    read_stream = chunks_of if path in {COMPLETIONS, CHAT} else events_of
    told, streamed = READERS[path]([whole.json()]), READERS[path](read_stream(stream.content))
    assert streamed == told
    return told


# ---- probabilities

_TOKENS = st.sampled_from([*(word.encode() for word in WORDS), *_BYTES, PAD.encode()])
_PHRASES = st.sampled_from(
    [
        [b"<think>", b"ab", b"</think>"],
        [PAD.encode(), b"<think>", b"a", PAD.encode(), b"</think>"],
        [b"\xc2", b"\xa0", b"<think>", b"\xc2", b"\xa0", b"c"],
        [b"</", b"think>", b" ", b"a"],
        [word.encode() for word in CALL],
        [b".<tool_call>\n", *(word.encode() for word in CALL[1:])],
        [*(word.encode() for word in CALL[:3]), b"</tool_call>Z"],
        [b"a", b" ", b"\n"],
        [b"\xe2", b"\x82", b"\xac"],
    ]
)
OUTPUTS = st.lists(st.one_of(_TOKENS.map(lambda token: [token]), _PHRASES), max_size=8).map(
    lambda parts: [IDS[token] for part in parts for token in part]
)


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "stop": st.lists(st.sampled_from(STOPS), min_size=1, max_size=2),
        "skip_special_tokens": st.booleans(),
        "include_stop_str_in_output": st.booleans(),
    },
)


def require_spelled(
    token_ids: Sequence[int], text: str, entries: list[int], *, skips: bool
) -> None:
    """Assert that the entries are the very tokens that `text` came of."""
    assert entries == list(range(entries[0], entries[-1] + 1)) if entries else not text
    hidden = TOKENIZER.special_token_ids if skips else ()
    shown = [i for i in entries if token_ids[i] not in hidden]
    pieces = [TOKENIZER.token_bytes(token_ids[i]) for i in shown]
    spelled = b"".join(pieces).decode(errors="replace")
    if not text:
        assert not shown, f"{spelled!r} is told, and no text"
        return
    first, last = (len(pieces[at].decode(errors="replace")) for at in (0, -1))
    # A token may stand astride where the text begins or ends, but is at least in part of it.
    places = [at for at in range(first) if spelled.startswith(text, at)]
    assert any(len(spelled) - (at + len(text)) < last for at in places), (
        f"{spelled!r} is told beside {text!r}"
    )


def reasoning_in(completion: Told, *, is_thinking: bool, num_hidden: int) -> int:
    """Count the tokens between the tags; those hidden stand behind the whole text."""
    [text] = completion.texts
    opener = re.match(r"\s*<think>", text)
    if opener is None and not is_thinking:
        return 0
    first = opener.end() if opener is not None else 0
    end = text.find("</think>", first)
    if end < 0:
        return sum(start >= first for start in completion.starts) + num_hidden
    return sum(first <= start < end for start in completion.starts)


@pytest.mark.parametrize("mode", TEMPLATES)
@settings(max_examples=100)
@given(
    said=st.builds(
        Said,
        token_ids=OUTPUTS,
        cuts=st.lists(st.integers(0, 30), max_size=8),
        has_end_token=st.booleans(),
        ends_apart=st.booleans(),
    ),
    options=OPTIONS,
    has_tools=st.booleans(),
)
# The stop string is complete when the output ends within a character.
@example(
    said=Said((IDS[b"ab"], IDS[b"\xc3"]), cuts=(1,), ends_apart=True),
    options={"stop": ["b\ufffd"]},
    has_tools=False,
)
def test_probabilities_belong_to_the_text_beside_them(
    servers: dict[str, Any],
    says: list[Said],
    mode: str,
    said: Said,
    options: dict[str, Any],
    has_tools: bool,
) -> None:
    live, says[0] = servers[mode], said
    token_ids = [*said.token_ids, IDS[END.encode()]]
    skips = options.get("skip_special_tokens", True)
    completion = tell(live, COMPLETIONS, has_tools=False, **options)
    chat = tell(live, CHAT, has_tools=has_tools, **options)
    response = tell(live, RESPONSES, has_tools=has_tools, **options)
    for text, entries in zip(response.texts, response.entries, strict=True):
        require_spelled(token_ids, text, entries, skips=skips)
    # A chat reports all tokens, those of reasoning and calls too.
    assert chat.entries == completion.entries
    told = [entry for entries in response.entries for entry in entries]
    assert told == sorted(set(told) & set(chat.entries[0]))
    assert "".join(response.texts) == chat.texts[0]
    if mode == "plain" and not has_tools:
        assert (response.texts, response.entries) == (chat.texts, chat.entries)
        assert chat.texts == completion.texts
    # One count in all places.
    assert chat.num_reasoning == (None if mode == "plain" else response.num_reasoning)
    assert (chat.num_output, chat.reasoning) == (response.num_output, response.reasoning)
    if mode != "plain" and "stop" not in options:
        num_hidden = chat.num_output - len(chat.entries[0])
        expected = reasoning_in(completion, is_thinking=mode == "must", num_hidden=num_hidden)
        assert chat.num_reasoning == expected


# ---- counts


@dataclass(frozen=True)
class Thought:
    """An output, the request, and the number of reasoning tokens."""

    words: Sequence[str]
    count: int
    mode: str = "must"
    options: dict[str, Any] = field(default_factory=dict)
    has_end_token: bool = True
    has_tools: bool = False


OPENED = ["<think>", "a", "ab", "</think>", "c"]
CALLING = ["a", " ", "ab", "\n", "</", "think>", *CALL]
THOUGHTS = {
    "opened by the prompt": Thought(["a", "ab", "</think>", "c"], 2),
    "opened by the model": Thought(OPENED, 2, mode="may"),
    "opened by both": Thought(OPENED, 2),
    "not opened": Thought(["a", "</think>", "c"], 0, mode="may"),
    "never closed": Thought(["a", "ab", "c"], 3, has_end_token=False),
    "opened, never closed": Thought(["<th", "ink>", "a"], 1, mode="may", has_end_token=False),
    "closed in part": Thought(["a", "ab", "</", "ink>"], 4, has_end_token=False),
    "empty": Thought(["</think>", "c"], 0),
    "empty, opened by the model": Thought(["<think>", "</think>", "c"], 0, mode="may"),
    "blank": Thought(["\n", "\n", "</think>", "c"], 2),
    "nothing at all": Thought([], 0, has_end_token=False),
    "tags in parts": Thought(["<th", "ink>", "a", "</", "think>", "c"], 1, mode="may"),
    "tags astride": Thought([" <think>\n", "a", "\n</think>\n\nY"], 2, mode="may"),
    "with tools": Thought(CALLING, 4, has_tools=True),
    "with a stop string in it": Thought(["a", "ab", "c", "</think>"], 2, options={"stop": ["b"]}),
    "with a stop string behind it": Thought(["a", "</think>", "c"], 1, options={"stop": ["c"]}),
    "ended by its closing tag": Thought(["a", "</think>"], 1, options={"stop": ["</think>"]}),
    "cut by max_tokens": Thought(["a", "b", "c"], 3, has_end_token=False),
    "not shown": Thought(OPENED, 2, mode="may", options={"include_reasoning": False}),
    "with a special token in it": Thought([PAD, "a", PAD, "ab", "</think>", "c"], 4),
    "of a model that does not": Thought(OPENED, 0, mode="plain"),
}


@pytest.mark.parametrize("width", [1, 2, 100])
@pytest.mark.parametrize("name", THOUGHTS)
def test_all_apis_count_the_same_tokens_of_reasoning(
    servers: dict[str, Any], says: list[Said], name: str, width: int
) -> None:
    thought = THOUGHTS[name]
    token_ids = [IDS[word.encode()] for word in thought.words]
    says[0] = Said(token_ids, range(0, len(token_ids), width), thought.has_end_token)
    live = servers[thought.mode]
    counts = {}
    for path in (CHAT, RESPONSES, MESSAGES):
        options = {} if "include_reasoning" in thought.options else thought.options
        options = options if path == MESSAGES else thought.options
        told = tell(live, path, has_tools=thought.has_tools, **options)
        counts[path] = told.num_reasoning or 0
    assert counts == dict.fromkeys((CHAT, RESPONSES, MESSAGES), thought.count)


def test_the_counts_of_several_answers_add_up(servers: dict[str, Any], says: list[Said]) -> None:
    says[0] = Said([IDS[word.encode()] for word in OPENED])
    body = servers["may"].chat(n=3).json()
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 6}
