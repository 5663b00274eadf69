"""The public fixtures of `canitoolcall`: real outputs of models and their meaning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from canitoolcall import checks, chunking, fixtures, results

from server.tools.declared import SYNTAXES, TAGS, opens_reasoning
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
from server.tools.output_parser import OutputParser, OutputSyntax, ThinkTags

#: By the start of a model's name, the first match counts: the parsers of calls and of
#: reasoning, as an operator names them.
PARSERS: Mapping[str, tuple[str, str]] = {
    "deepseek-ai/DeepSeek-V3-": ("deepseek_v3", "qwen3"),
    "deepseek-ai/DeepSeek-V3.1": ("deepseek_v31", "qwen3"),
    "deepseek-ai/": ("deepseek_v32", "qwen3"),
    "google/gemma-4": ("gemma4", "gemma4"),
    "zai-org/": ("glm45", "qwen3"),
    "openai/gpt-oss": ("openai", "openai_gptoss"),
    "moonshotai/Kimi-K3": ("kimi_k3", "kimi_k3"),
    "moonshotai/Kimi-K2": ("kimi_k2", "kimi_k2"),
    "meta-llama/Llama-3": ("llama3_json", "none"),
    "meta-llama/Llama-4": ("llama4_pythonic", "none"),
    "mistralai/Magistral-Small-2506": ("mistral", "qwen3"),
    "mistralai/": ("mistral", "mistral"),
    "Qwen/Qwen3-Coder": ("qwen3_coder", "qwen3"),
    "Qwen/Qwen3.": ("qwen3_coder", "qwen3"),
    "Qwen/Qwen3-": ("hermes", "qwen3"),
}
#: Models whose prompts open the reasoning, though the fixtures do not contain their end.
OPENED = ("zai-org/GLM-4.7", "zai-org/GLM-5", "moonshotai/Kimi-K2.6", "moonshotai/Kimi-K3")
#: Fixtures that are read otherwise, and why.
OTHERWISE = {
    "qwen3-xml/llamacpp-q35-call-inside-think": "what stands within reasoning is reasoning",
    "glm/glm47-missing-last-close-arg-value": "values may hold the tag that would end the call",
    "llama/l4-truncated-missing-close-bracket": "the first of its two calls is complete",
}
#: Right but for spaces at the end of a text.
SOFT = {
    "gemma4/vllm-text-before-call": "Gemma's are kept, as other fixtures of it ask",
    "llama/l3-sglang-text-before-python-tag": "spaces before a call are left out",
    "kimi/k3-bug-truncated-reasoning-recorded": "spaces at the end of reasoning are left out",
}
#: Fixtures whose output ends within a call. The fixtures expect no call then; our clients get one
#: that is marked as cut.
INCOMPLETE = {
    "deepseek/v3-truncated-mid-arguments",
    "deepseek/v31-truncated-mid-arguments",
    "deepseek/v32-truncated-mid-arguments",
    "deepseek/v32-truncated-second-parallel-call",
    "deepseek/v4-truncated-mid-arguments",
    "deepseek/v4-truncated-second-parallel-call",
    "deepseek/v41-truncated-mid-arguments",
    "deepseek/v41-truncated-second-parallel-call",
    "gemma4/truncated-before-close",
    "gemma4/truncated-mid-string",
    "gemma4/truncated-second-parallel-call",
    "glm/glm45-truncated-after-arg-key",
    "glm/glm47-truncated-before-close-call",
    "glm/glm47-truncated-inside-arg-value",
    "gpt-oss/harmony-truncated-in-arguments",
    "kimi/k26-truncated-inside-arguments",
    "kimi/k3-truncated-inside-argument",
    "llama/l3-truncated-inside-parameters",
    "llama/l4-truncated-missing-close-bracket",
    "mistral/v13think-truncated-in-arguments",
    "qwen3-hermes/bug-sglang-30480-truncated-mid-arguments",
    "qwen3-hermes/truncated-mid-arguments-no-thinking",
    "qwen3-hermes/truncated-mid-arguments-thinking",
    "qwen3-hermes/truncated-second-parallel-call",
    "qwen3-hermes/vllm-invalid-json-missing-brace",
    "qwen3-xml/q38-truncated-in-parameter",
    # Here the arguments stop being JSON, and here the end of the last one is missing.
    "deepseek/vllm-v3-malformed-missing-brace",
    "glm/glm47-missing-last-close-arg-value",
}
FIXTURES = fixtures.load_fixtures()
FAMILIES = fixtures.load_families()


def _syntax(fixture: Any) -> OutputSyntax:
    schemas = {
        tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in fixture.tools
    }
    calls, reasoning = next(
        parsers for name, parsers in PARSERS.items() if fixture.models[0].startswith(name)
    )
    tags = TAGS[reasoning]
    return OutputSyntax(
        SYNTAXES[calls],
        tags,
        is_thinking=tags is not None and _is_thinking(fixture, tags),
        tool_names=frozenset(schemas),
        schemas=schemas,
    )


def _is_thinking(fixture: Any, tags: ThinkTags) -> bool:
    if fixture.generation_prompt is not None:
        return opens_reasoning(fixture.generation_prompt, tags)
    return fixture.models[0].startswith(OPENED) and fixture.thinking is not False


def _events(fixture: Any, pieces: list[str]) -> list[Event]:
    parser = OutputParser(_syntax(fixture))
    return [event for piece in pieces for event in parser.push(piece)] + parser.finish()


def _parsed(fixture: Any, pieces: list[str]) -> Any:
    events = _events(fixture, pieces)
    return results.ParseResult(
        content="".join(event.text for event in events if isinstance(event, Content)),
        reasoning_content="".join(event.text for event in events if isinstance(event, Reasoning)),
        tool_calls=tuple(_calls(events)),
    )


def _calls(events: list[Event]) -> Iterator[Any]:
    """Yield the complete calls: one that is cut has no end in the stream."""
    name = arguments = ""
    for event in events:
        match event:
            case CallStarted(name):
                arguments = ""
            case ArgumentsDelta(text):
                arguments += text
            case CallEnded():
                yield results.ParsedToolCall(name, arguments)
            case Content() | Reasoning() | CutCall():
                pass


@pytest.mark.parametrize("family", FAMILIES)
def test_every_fixture(family: str) -> None:
    """Whole, and as a stream cut in several ways, each character by itself among them."""
    otherwise: set[str] = set()
    soft: set[str] = set()
    own = [fixture for fixture in FIXTURES if fixture.family == family]
    assert own
    for fixture in own:
        output = fixture.raw_output
        cuts = [chunking.ChunkStrategy("char", seed=seed) for seed in range(4)]
        streams = {cut.id: _parsed(fixture, chunking.split_text(output, cut)) for cut in cuts}
        streams["one"] = _parsed(fixture, list(output))
        seen = results.Observation(nonstream=_parsed(fixture, [output]), streams=streams)
        rows = checks.run_checks(fixture, FAMILIES[family], seen)
        status = results.worst_status(row.status for row in rows).value
        otherwise |= {fixture.id} if status not in {"pass", "soft_pass"} else set()
        soft |= {fixture.id} if status == "soft_pass" else set()
    assert otherwise == {name for name in OTHERWISE if name.startswith(family + "/")}
    assert soft == {name for name in SOFT if name.startswith(family + "/")}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_fixture_cut_at_every_place(family: str) -> None:
    """Cut an output in two, and into characters: the sum of the events stays the same."""
    for fixture in FIXTURES:
        if fixture.family == family:
            output = fixture.raw_output
            whole = joined(_events(fixture, [output]))
            assert joined(_events(fixture, list(output))) == whole, fixture.id
            # Of the long ones some: they repeat themselves.
            for cut in range(1, len(output), 1 + len(output) // 250):
                assert joined(_events(fixture, [output[:cut], output[cut:]])) == whole, fixture.id


def test_no_fixture_is_left_out() -> None:
    assert len(FIXTURES) == 469
    assert {*OTHERWISE, *SOFT} <= {fixture.id for fixture in FIXTURES}


def test_the_end_of_the_output_leaves_a_call_incomplete_and_nothing_else_does() -> None:
    incomplete: set[str] = set()
    for fixture in FIXTURES:
        events = _events(fixture, [fixture.raw_output])
        num_started = sum(isinstance(event, CallStarted) for event in events)
        num_ended = sum(isinstance(event, CallEnded) for event in events)
        assert num_started - num_ended in (0, 1)
        if num_started > num_ended:
            assert any(isinstance(event, CutCall) for event in events)
            incomplete.add(fixture.id)
    assert incomplete == INCOMPLETE
