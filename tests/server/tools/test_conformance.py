"""The public fixtures of `canitoolcall`: real outputs of models and what they mean."""

from __future__ import annotations

from collections import Counter
from typing import Any

from canitoolcall import checks, chunking, fixtures, results

from server.tools.declared import MISTRAL_THINK, THINK, opens_reasoning
from server.tools.events import Call, Content, Reasoning
from server.tools.speech import Speech, SpeechParser
from server.tools.syntaxes import HERMES, LLAMA, MISTRAL

#: The ones that need spaces at the end of a text which we leave out, as most of them ask.
NUM_SOFT = 1


def _speech(fixture: Any) -> Speech:
    if fixture.family == "llama":
        names = frozenset(tool["function"]["name"] for tool in fixture.tools)
        return Speech(LLAMA, tool_names=names)
    if fixture.family == "mistral":
        is_old = "Magistral-Small-2506" in fixture.models[0]
        return Speech(MISTRAL, THINK if is_old else MISTRAL_THINK)
    return Speech(HERMES, THINK, is_thinking=opens_reasoning(fixture.generation_prompt, THINK))


def _parsed(fixture: Any, pieces: list[str]) -> Any:
    parser = SpeechParser(_speech(fixture))
    events = [event for piece in pieces for event in parser.push(piece)] + parser.finish()
    return results.ParseResult(
        content="".join(event.text for event in events if isinstance(event, Content)),
        reasoning_content="".join(event.text for event in events if isinstance(event, Reasoning)),
        tool_calls=tuple(
            results.ParsedToolCall(event.name, event.arguments)
            for event in events
            if isinstance(event, Call)
        ),
    )


def test_every_fixture_of_the_supported_families() -> None:
    families = fixtures.load_families()
    statuses: Counter[str] = Counter()
    for fixture in fixtures.load_fixtures(families=["qwen3-hermes", "llama", "mistral"]):
        if "Llama-4" in fixture.models[0]:
            continue  # another syntax, which is not read
        output = fixture.raw_output
        cuts = [chunking.ChunkStrategy("char", seed=seed) for seed in range(4)]
        streams = {cut.id: _parsed(fixture, chunking.split_text(output, cut)) for cut in cuts}
        seen = results.Observation(nonstream=_parsed(fixture, [output]), streams=streams)
        rows = checks.run_checks(fixture, families[fixture.family], seen)
        status = results.worst_status(row.status for row in rows).value
        assert status in {"pass", "soft_pass"}, (fixture.id, rows)
        statuses[status] += 1
    assert statuses.total() > 100
    assert statuses["soft_pass"] <= NUM_SOFT
