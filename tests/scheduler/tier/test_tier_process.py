"""An engine's process with a disk tier: its successor is warm, and the folder is its own."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.kv_disk import KVDisk
from configs.schema import SchedulerSection
from model.fake import FakeRunner, fake_output
from model.interface import SamplingParams
from scheduler.client import GenerateRequest
from scheduler.engine_process import EngineStartError
from scheduler.process import ProcessClient
from scheduler.tier.folder import StoreError, check_is_on_disk
from waiting import TIMEOUT_S

_CONFIG = SchedulerSection(max_num_seqs=8, max_num_batched_tokens=32, debug=True)
_PROMPT = tuple(range(1, 42))


@pytest.fixture
def disk_path(tmp_path: Path) -> Iterator[Path]:
    """A folder that is not in memory, as that of temporary files may be."""
    try:
        check_is_on_disk(tmp_path)
    except StoreError:
        with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as name:
            yield Path(name)
    else:
        yield tmp_path


async def _ask(client: ProcessClient, prompt: tuple[int, ...]) -> int:
    """Serve one request, check its tokens, and return how many of the prompt were reused."""
    request = GenerateRequest(prompt, SamplingParams(max_tokens=4, ignore_eos=True))
    num_cached, tokens = 0, list[int]()
    async for delta in client.generate(request):
        tokens += delta.token_ids
        num_cached += delta.started.cached_tokens if delta.started else 0
    assert tokens == fake_output(prompt, 4)
    return num_cached


def test_the_engine_after_a_killed_one_is_warm(disk_path: Path) -> None:
    async def test() -> None:
        client = ProcessClient(FakeRunner, _CONFIG, disk=KVDisk(disk_path, 2**20))
        await client.start()
        other = ProcessClient(FakeRunner, _CONFIG, disk=KVDisk(disk_path, 2**20))
        with pytest.raises(EngineStartError, match="is in use by another engine"):
            await other.start()
        await other.close()
        assert await _ask(client, _PROMPT) == 0
        while client.stats().tier.disk_stored_pages_total < 10:
            await _ask(client, (5, 6))
        assert client.engine_pid is not None
        os.kill(client.engine_pid, signal.SIGKILL)
        while not client.num_restarts or not client.is_alive:  # noqa: ASYNC110 - no event of ours
            await asyncio.sleep(0.01)
        assert await _ask(client, _PROMPT) == 40
        assert client.stats().tier.disk_loaded_pages_total == 10
        await client.close()

    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await test()

    asyncio.run(bounded())


@pytest.mark.parametrize(
    ("size_bytes", "message"), [(100, "kv_disk_size: 100 B is too small: a page takes 200 B")]
)
def test_a_store_that_cannot_be_opened_ends_the_start(
    disk_path: Path, size_bytes: int, message: str
) -> None:
    async def test() -> None:
        client = ProcessClient(FakeRunner, _CONFIG, disk=KVDisk(disk_path, size_bytes))
        with pytest.raises(EngineStartError, match=message):
            await client.start()
        await client.close()

    asyncio.run(test())
