"""Requests and their times: the same for the same seed, and of the requested lengths."""

from __future__ import annotations

import json
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest

from loadtest.arrivals import PROCESSES
from loadtest.documents import document
from loadtest.plan import Load, Plan
from loadtest.presets import PRESETS
from loadtest.prompts import Composer, Manner, Spelling
from loadtest.repeating import ORDER_FORMAT
from loadtest.trace import TraceError, read_trace
from loadtest.words import WORDS
from loadtest.workloads import (
    DRAW_RANGE,
    RESPONSE_FORMAT,
    Conversation,
    Drawn,
    Shape,
    Turn,
    Verbatim,
    Workload,
)

_IDS = Spelling(token_ids=tuple(range(100, 400)))
_CHAT = Spelling(tokens_per_word=1.0, overhead_tokens=29.0)


def _made(name: str, seed: int, count: int = 3) -> list[Conversation]:
    lanes = PRESETS[name][1](Shape(seed=seed)).lanes
    return [lane.make(number) for lane in lanes for number in range(count)]


def _lengths(workload: Workload, lane: int = 0, count: int = 50) -> list[tuple[int, int]]:
    turns = [turn for number in range(count) for turn in workload.lanes[lane].make(number)]
    return [(len(_drawn(turn).draws), turn.max_tokens) for turn in turns]


def _drawn(turn: Turn) -> Drawn:
    assert isinstance(turn.prompt, Drawn)
    return turn.prompt


@pytest.mark.parametrize("name", PRESETS)
def test_a_seed_asks_the_same_and_another_does_not(name: str) -> None:
    assert _made(name, 7) == _made(name, 7)
    assert _made(name, 7) != _made(name, 8)


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - {"retry"}))
def test_no_prompt_comes_twice(name: str) -> None:
    prompts = [turn.prompt for conversation in _made(name, 1) for turn in conversation]
    assert len(set(map(str, prompts))) == len(prompts)


@pytest.mark.parametrize(
    ("name", "concurrency", "tokens"),
    [
        ("c1", 1, (129, 128)),
        ("c8", 8, (129, 128)),
        ("c32", 32, (129, 128)),
        ("long-prompts", 2, (1800, 32)),
    ],
)
def test_fixed_lengths(name: str, concurrency: int, tokens: tuple[int, int]) -> None:
    workload = PRESETS[name][1](Shape())
    assert workload.lanes[0].concurrency == concurrency
    assert set(_lengths(workload)) == {tokens}
    changed = PRESETS[name][1](Shape(prompt_tokens=5, max_tokens=6, concurrency=3))
    assert set(_lengths(changed)) == {(5, 6)}
    assert changed.lanes[0].concurrency == 3


def test_a_prefix_is_shared_to_the_token() -> None:
    prompts = [_drawn(turn).draws for (turn,) in _made("shared-prefix", 0)]
    assert len({prompt[:1000] for prompt in prompts}) == 1
    assert len({prompt[1000] for prompt in prompts}) == len(prompts)
    # Also where words are cut away to make room for a template.
    texts = [_CHAT.text(Drawn(prompt)).split() for prompt in prompts]
    assert {len(text) for text in texts} == {1064 - 29}
    assert len({tuple(text[:1000]) for text in texts}) == 1


def test_mixed_lengths_span_their_range() -> None:
    lengths = _lengths(PRESETS["mixed"][1](Shape()), count=400)
    prompts, answers = [one for one, _ in lengths], [one for _, one in lengths]
    assert 16 <= min(prompts) < 20
    assert 900 < max(prompts) <= 1024
    assert 8 <= min(answers) < 10
    assert 220 < max(answers) <= 256
    assert sorted(prompts)[200] < 200, "short ones are more frequent"


def test_long_prompts_have_a_lane_of_their_own() -> None:
    workload = PRESETS["long-among-decodes"][1](Shape())
    assert [(lane.name, lane.concurrency) for lane in workload.lanes] == [
        ("streams", 8),
        ("long prompts", 1),
    ]
    assert set(_lengths(workload, lane=1)) == {(1800, 1)}


@pytest.mark.parametrize(
    ("name", "form"), [("structured", RESPONSE_FORMAT), ("schema", ORDER_FORMAT)]
)
def test_a_schema_has_a_twin_that_asks_the_same(name: str, form: dict[str, Any]) -> None:
    bodies = []
    for has_schema in (True, False):
        workload = PRESETS[name][1](Shape(has_schema=has_schema))
        (turn,) = workload.lanes[0].make(0)
        bodies.append(Composer("m", workload, _CHAT, Manner(ending="none")).body(turn, []))
    with_schema, without = bodies
    assert with_schema.pop("response_format") == form
    assert with_schema == without
    assert "JSON" in without["messages"][0]["content"]


@pytest.mark.parametrize("name", ["edit", "summary"])
def test_a_document_is_in_the_prompt(name: str) -> None:
    workload = PRESETS[name][1](Shape(prompt_tokens=140, max_tokens=9))
    (turn,) = workload.lanes[0].make(3)
    assert isinstance(turn.prompt, Verbatim)
    task, text = str(turn.prompt.content).split("\n\n")
    assert "text" in task
    assert text == document(140, 0, name, 3)
    sentences = text.split(". ")
    assert len(set(sentences)) == len(sentences) == 10
    assert (turn.max_tokens, workload.ends_itself, workload.endpoint) == (9, True, "chat")


def test_a_retry_sends_the_same_again() -> None:
    workload = PRESETS["retry"][1](Shape())
    composer, history = Composer("m", workload, _CHAT, Manner()), list[dict[str, Any]]()
    bodies = []
    for turn in workload.lanes[0].make(2):
        bodies.append(composer.body(turn, history))
        history = [*composer.messages(turn, history), {"role": "assistant", "content": "so"}]
    assert bodies == bodies[:1] * 4
    assert bodies[0]["seed"] == 2


# ---- agents --------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [8000, 50_000])
def test_an_agents_context_grows_to_its_size(context: int) -> None:
    workload = PRESETS["agentic"][1](Shape(prompt_tokens=context))
    (conversation, other) = _made("agentic", 0, 2)
    assert conversation[0].system == other[0].system, "agents share it"
    turns = workload.lanes[0].make(0)
    system = turns[0].system
    assert system is not None
    asked = len(system.draws) + sum(len(_drawn(turn).draws) for turn in turns)
    # Tools and the words around messages come to it.
    assert context - 500 < asked + sum(turn.max_tokens for turn in turns) <= context - 400
    assert (len(turns), workload.lanes[0].concurrency) == (20, 4)
    assert [turn.is_result for turn in turns] == [False] + [True] * 19
    assert all(0.2 <= turn.think_s <= 1.0 for turn in turns[1:])
    assert (
        min(
            len(_drawn(one).draws)
            for one in PRESETS["agentic"][1](Shape(prompt_tokens=100)).lanes[0].make(0)
        )
        == 16
    )


def test_calls_are_forced_and_free_in_turns() -> None:
    turns = PRESETS["agentic"][1](Shape()).lanes[0].make(0)
    names = [tool["function"]["name"] for tool in turns[0].fields["tools"]]
    choices = [turn.fields["tool_choice"] for turn in turns]
    assert choices[1::2] == ["auto"] * 10
    forced = [choice["function"]["name"] for choice in choices[::2]]
    assert forced == [names[number % 3] for number in range(10)]


def test_a_result_answers_the_calls_before_it() -> None:
    workload = PRESETS["agentic"][1](Shape(prompt_tokens=100))
    composer = Composer("m", workload, Spelling(), Manner(ending="none"))
    first, second, *_ = workload.lanes[0].make(0)
    opening = composer.messages(first, [])
    assert [message["role"] for message in opening] == ["system", "user"]
    called = {"role": "assistant", "content": "", "tool_calls": [{"id": "a"}, {"id": "b"}]}
    body = composer.body(second, [*opening, called])
    assert body["tools"] == second.fields["tools"]
    results = body["messages"][3:]
    assert [(one["role"], one["tool_call_id"]) for one in results] == [("tool", "a"), ("tool", "b")]
    assert results[0]["content"].startswith("Result: ")
    told = composer.messages(second, [*opening, {"role": "assistant", "content": "no"}])
    assert [message["role"] for message in told[2:]] == ["assistant", "user"]


# ---- spelling ------------------------------------------------------------------------------------


def test_token_ids_are_exact() -> None:
    (turn,) = _made("c8", 0, 1)[0]
    workload = PRESETS["c8"][1](Shape())
    body = Composer("m", workload, _IDS, Manner()).body(turn, [])
    assert len(body["prompt"]) == 129
    assert set(body["prompt"]) <= set(range(100, 400))
    assert body["stream_options"] == {"include_usage": True}
    assert (body["max_tokens"], body["temperature"], body["ignore_eos"]) == (128, 0, True)


@pytest.mark.parametrize(
    ("manner", "there", "absent"),
    [
        (Manner(ending="min_tokens"), {"min_tokens": 128}, "ignore_eos"),
        (Manner(has_usage=False), {"ignore_eos": True}, "stream_options"),
        (
            Manner(has_continuous_usage=True),
            {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
            "min_tokens",
        ),
        (Manner(ending="none", extra={"temperature": 1}), {"temperature": 1}, "ignore_eos"),
    ],
)
def test_manners(manner: Manner, there: dict[str, Any], absent: str) -> None:
    fields = manner.fields(128)
    assert fields | there == fields
    assert absent not in fields


def test_words_are_counted_as_they_were_measured() -> None:
    prompt = Drawn(tuple(range(100)))
    assert len(Spelling(tokens_per_word=2.0, overhead_tokens=10.0).text(prompt).split()) == 45
    assert len(_CHAT.text(prompt, is_first=False).split()) == 100
    assert len(_CHAT.text(Drawn((1, 2))).split()) == 1, "never none"


def test_a_history_comes_before_the_turn() -> None:
    workload = PRESETS["multi-turn"][1](Shape())
    first, second, *_ = workload.lanes[0].make(0)
    composer = Composer("m", workload, _CHAT, Manner())
    history = [*composer.messages(first, []), {"role": "assistant", "content": "so"}]
    messages = composer.body(second, history)["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[:2] == history


def test_words_are_plain_and_different() -> None:
    assert len(set(WORDS)) == len(WORDS) > 500
    assert all(word.isascii() and word.isalpha() and word.islower() for word in WORDS)
    assert len(WORDS) < DRAW_RANGE


# ---- arrivals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROCESSES)
def test_arrivals_ascend_keep_their_rate_and_repeat(name: str) -> None:
    moments = list(islice(PROCESSES[name](5.0, 3, 4), 4000))
    assert moments == list(islice(PROCESSES[name](5.0, 3, 4), 4000))
    assert all(before <= after for before, after in pairwise(moments))
    assert moments[-1] == pytest.approx(800.0, rel=0.08)


def test_a_burst_comes_at_one_moment() -> None:
    moments = list(islice(PROCESSES["burst"](5.0, 3, 4), 400))
    assert all(len(set(moments[i : i + 4])) == 1 for i in range(0, 400, 4))
    assert len(set(moments)) == 100


def test_poisson_gaps_vary_as_they_should() -> None:
    moments = list(islice(PROCESSES["poisson"](1.0, 0, 1), 4000))
    gaps = [after - before for before, after in pairwise(moments)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation / mean == pytest.approx(1.0, abs=0.1)


# ---- traces --------------------------------------------------------------------------------------


def _trace(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n")
    return path


def test_a_trace_is_played_in_time(tmp_path: Path) -> None:
    path = _trace(
        tmp_path / "t.jsonl",
        {"at_s": 12, "prompt": "second", "max_tokens": 3},
        "",
        {"at_s": 10, "prompt": [5, 6], "max_tokens": 2},
        {"at_s": 13.5, "prompt_tokens": 40, "max_tokens": 1},
    )
    workload = read_trace(path, Shape(), speed=2.0)
    assert workload.due_s == (0.0, 1.0, 1.75)
    turns = [workload.lanes[0].make(number)[0] for number in range(3)]
    assert turns[:2] == [Turn(Verbatim([5, 6]), 2), Turn(Verbatim("second"), 3)]
    assert len(_drawn(turns[2]).draws) == 40
    assert Composer("m", workload, _IDS, Manner()).body(turns[0], [])["prompt"] == [5, 6]
    plan = Plan(trace=path)
    assert list(plan.due_s(plan.make_workload()) or ()) == [0.0, 2.0, 3.5]
    assert Plan(trace=path, load=Load(concurrency=2)).due_s(workload) is None


def test_a_trace_of_chats(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hello"}]
    path = _trace(tmp_path / "t.jsonl", {"at_s": 0, "messages": messages})
    workload = read_trace(path, Shape(max_tokens=9))
    (turn,) = workload.lanes[0].make(0)
    body = Composer("m", workload, _CHAT, Manner()).body(turn, [])
    assert (workload.endpoint, body["messages"], body["max_tokens"]) == ("chat", messages, 9)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"t.jsonl:2: "),
        ([1], "must be an object"),
        ({"at_s": 1}, "one of prompt, messages and prompt_tokens"),
        ({"at_s": 1, "prompt": "a", "prompt_tokens": 4}, "one of prompt"),
        ({"prompt": "a"}, "at_s must be a number"),
        ({"at_s": True, "prompt": "a"}, "at_s must be a number"),
        ({"at_s": 1, "prompt": "a", "max_tokens": 0}, "max_tokens must be"),
        ({"at_s": 1, "prompt_tokens": "4"}, "prompt_tokens must be"),
        ({"at_s": 1, "prompt": []}, "prompt must be"),
        ({"at_s": 1, "prompt": ["a"]}, "prompt must be"),
        ({"at_s": 1, "messages": []}, "messages must be"),
        ({"at_s": 1, "prompt": "a", "temprature": 1}, "temprature is unknown"),
        ({"at_s": 1, "messages": [{"role": "user"}]}, "mixes prompts with messages"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    path = _trace(tmp_path / "t.jsonl", {"at_s": 0, "prompt": "fine"}, line)
    with pytest.raises(TraceError, match=message):
        read_trace(path, Shape())


def test_a_trace_must_hold_something(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no request"):
        read_trace(_trace(tmp_path / "t.jsonl"), Shape())
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "none.jsonl", Shape())
