"""An engine that crashes within a scored prompt: the next one sends only the missing scores."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from configs.schema import SchedulerSection
from model.fake import FakeRunner, fake_logprobs, fake_next_token
from model.interface import SamplingParams, StepInput
from scheduler.client import GenerateRequest, TokenOutput
from scheduler.process import ProcessClient
from waiting import TIMEOUT_S

_MARK = "OCTAVO_TEST_MARK"


class _MortalRunner(FakeRunner):
    """Dies once: the next one finds the mark it left."""

    def launch(self, step: StepInput) -> Any:
        mark = Path(os.environ[_MARK])
        if step.rows[0].position >= 64 and not mark.exists():
            mark.touch()
            os._exit(3)
        return super().launch(step)


async def _told(prompt: tuple[int, ...]) -> tuple[list[TokenOutput], int]:
    config = SchedulerSection(max_num_seqs=8, max_num_batched_tokens=32)
    client = ProcessClient(_MortalRunner, config)
    await client.start()
    try:
        async with asyncio.timeout(TIMEOUT_S):
            params = SamplingParams(max_tokens=3, ignore_eos=True, prompt_logprobs=1)
            deltas = [one async for one in client.generate(GenerateRequest(prompt, params))]
        return deltas, client.num_restarts
    finally:
        await client.close()


def test_none_is_lost_and_none_told_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_MARK, str(tmp_path / "mark"))
    known = list(range(150))
    deltas, num_restarts = asyncio.run(_told(tuple(known)))
    assert num_restarts == 1
    assert [score for delta in deltas for score in delta.prompt_logprobs] == [
        fake_logprobs(known[:i], known[i], 1) for i in range(1, 150)
    ]
    for token_id in [token_id for delta in deltas for token_id in delta.token_ids]:
        assert token_id == fake_next_token(known, 64, may_end=False)
        known.append(token_id)
    assert len(known) == 153
