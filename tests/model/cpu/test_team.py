"""The number of threads follows the cores that other processes leave free."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from configs.schema import CacheSection, ModelSection, OctavoConfig, SchedulerSection
from model import build, device
from model.cpu.team import Team, TeamSize, read_waits_s
from model.interface import SamplingParams
from scheduler.engine import Engine
from scheduler.messages import GenerateRequest, Submit

_WINDOW_S = 0.1


def _waiting(num_threads: int, num_cores: int, num_busy: int) -> float:
    """Return how many threads wait on average where other processes keep some cores busy.

    A thread beyond the free cores takes turns with a busy process. Measured on two cores: 0.7 to
    1.0 with one of them busy, 0.9 to 1.1 with both, 0.5 for a lone thread where both are.
    """
    num_sharing = max(0, num_threads - (num_cores - num_busy))
    return min(num_threads * 0.5, 0.75 * num_sharing)


def _run(size: TeamSize, num_cores: int, num_busy: int, seconds: float) -> list[int]:
    sizes = []
    for _ in range(round(seconds / _WINDOW_S)):
        sizes.append(size.num_threads)
        size.observe(_WINDOW_S, _WINDOW_S * _waiting(size.num_threads, num_cores, num_busy))
        size.check()
    return sizes


def test_alone_the_team_is_full() -> None:
    assert set(_run(TeamSize(8), 8, 0, 10.0)) == {8}


@pytest.mark.parametrize(
    ("num_cores", "num_busy", "expected"),
    [(2, 1, 1), (4, 1, 3), (8, 1, 7), (8, 3, 5), (16, 1, 15), (64, 8, 56)],
)
def test_the_team_leaves_busy_cores_and_comes_back(
    num_cores: int, num_busy: int, expected: int
) -> None:
    size = TeamSize(num_cores)
    sizes = _run(size, num_cores, num_busy, 60.0)
    assert sizes[5] < num_cores, "half a second is enough to notice"
    settled = sizes[200:]
    assert min(settled) == expected
    # A larger team is tried from time to time, and costs a window.
    assert settled.count(expected) > 0.9 * len(settled)
    assert max(settled) <= expected + 1
    back = _run(size, num_cores, 0, 30.0)
    assert back[-1] == num_cores
    assert back.index(num_cores) * _WINDOW_S < 4.5 + num_busy * 2 * _WINDOW_S


@pytest.mark.parametrize("num_cores", [4, 16, 64])
def test_the_team_stays_full_where_every_core_is_busy(num_cores: int) -> None:
    """A smaller team would get a smaller share of the cores, and wait all the same."""
    sizes = _run(TeamSize(num_cores), num_cores, num_cores, 60.0)
    assert sizes.count(num_cores) > 0.5 * len(sizes)


def test_a_short_disturbance_does_not_shrink_the_team() -> None:
    size = TeamSize(2)
    for waiting in (0.2, 0.9, 0.2, 0.3, 0.8, 0.1):
        size.observe(_WINDOW_S, waiting * _WINDOW_S)
        assert size.num_threads == 2


@given(
    st.integers(1, 64),
    st.lists(st.tuples(st.floats(0.001, 10.0), st.floats(0.0, 2.0)), max_size=200),
)
def test_any_waits_leave_the_size_within_its_bounds(
    max_threads: int, windows: list[tuple[float, float]]
) -> None:
    size = TeamSize(max_threads)
    for computing_s, share in windows:
        before = size.num_threads
        size.observe(computing_s, share * before * computing_s)
        size.check()
        assert size.num_threads in {before + 1, max_threads} or size.num_threads <= before


class _Waits:
    """Threads whose waits a test sets."""

    def __init__(self) -> None:
        self.waits_s = {"1": 5.0, "2": 7.0}
        self.reads = 0

    def __call__(self) -> dict[str, float]:
        self.reads += 1
        return dict(self.waits_s)


def test_a_team_sets_the_number_and_reads_the_waits_once_a_window(
    caplog: pytest.LogCaptureFixture,
) -> None:
    waits, numbers = _Waits(), list[int]()
    team = Team(2, waits, numbers.append)
    with caplog.at_level(logging.DEBUG, "model.cpu.team"):
        for _ in range(8):
            waits.waits_s["2"] += 0.06
            team.observe(0.0625)
    assert numbers == [1]
    assert waits.reads == 5
    assert "1 of 2 threads" in caplog.text
    # The first time is worth a line for an operator.
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_a_thread_that_ended_or_began_is_no_wait() -> None:
    waits, numbers = _Waits(), list[int]()
    team = Team(2, waits, numbers.append)
    for _ in range(100):
        waits.waits_s = {} if waits.reads % 2 else {"9": 0.001}
        team.observe(0.05)
    assert numbers == []


def test_without_counts_of_the_kernel_the_number_stays() -> None:
    numbers = list[int]()
    team = Team(2, dict, numbers.append)
    for _ in range(100):
        team.observe(1.0)
    assert numbers == []


def test_the_waits_of_this_process_are_read(tmp_path: Path) -> None:
    assert read_waits_s(str(tmp_path / "absent")) == {}
    (tmp_path / "7").mkdir()
    (tmp_path / "8").mkdir()
    (tmp_path / "9").mkdir()
    (tmp_path / "7" / "schedstat").write_text("123 2500000000 4\n")
    (tmp_path / "8" / "schedstat").write_text("\n")
    assert read_waits_s(str(tmp_path)) == {"7": 2.5}
    if Path("/proc/self/schedstat").exists():
        assert str(os.getpid()) in read_waits_s()


@pytest.fixture
def keep_threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _answers(config: OctavoConfig, threads_of: Callable[[int], int]) -> list[object]:
    engine = Engine(
        build.make_runner(build.resolve_source(config.model.model), config),
        config.scheduler,
        lambda: 0.0,
        lambda _: None,
    )
    kinds = [
        SamplingParams(12, temperature=0.0, ignore_eos=True, logprobs=3),
        SamplingParams(12, temperature=1.0, seed=3, ignore_eos=True),
        SamplingParams(12, temperature=0.8, top_p=0.9, seed=4, ignore_eos=True, logprobs=1),
        SamplingParams(12, temperature=1.2, top_k=20, min_p=0.02, seed=5, ignore_eos=True),
        SamplingParams(12, temperature=1.0, seed=6, repetition_penalty=1.2, prompt_logprobs=1),
    ]
    for number, params in enumerate(kinds):
        prompt = tuple(range(3 + number, 3 + number + 40 * (number + 1)))
        engine.handle(Submit(number, GenerateRequest(prompt, params)))
    found: list[object] = []
    step = 0
    while engine.has_work:
        torch.set_num_threads(threads_of(step))
        step += 1
        result = engine.step()
        assert not result.failed
        found.append((result.request_ids, result.token_ids, repr(result.logprobs)))
        found.append(repr(result.prompt_logprobs))
    engine.close()
    return found


@pytest.mark.usefixtures("keep_threads")
@pytest.mark.parametrize("quantization", ["fp16", "bf16", "int8"])
def test_tokens_and_logprobs_do_not_depend_on_the_threads(
    tmp_path: Path, quantization: Literal["fp16", "bf16", "int8"]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(
        '{"model_type": "llama", "vocab_size": 4096, "hidden_size": 192,'
        ' "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 6,'
        ' "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,'
        ' "tie_word_embeddings": true, "initializer_range": 0.1}'
    )
    config = OctavoConfig(
        model=ModelSection(model=f"dummy:{path}", quantization=quantization, threads=1),
        cache=CacheSection(kv_cache_memory=16 * 2**20),
        scheduler=SchedulerSection(max_num_seqs=8, max_num_batched_tokens=128),
    )
    one = _answers(config, lambda _: 1)
    assert _answers(config, lambda step: 1 + step % 3) == one


@pytest.mark.parametrize(
    ("threads", "quota", "expected", "note"),
    [
        (None, None, 4, ""),
        (None, 1.5, 2, "2 threads for 4 cores: the control group's CPU quota is 1.5 cores"),
        (None, 64.0, 4, ""),
        (3, 1.5, 3, ""),
    ],
)
def test_threads_follow_the_setting_else_the_quota_else_the_cores(
    monkeypatch: pytest.MonkeyPatch,
    threads: int | None,
    quota: float | None,
    expected: int,
    note: str,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(device, "quota_cores", lambda: quota)
    found = device.choose_threads(ModelSection(threads=threads))
    assert found.number == expected
    assert found.may_shrink == (threads is None)
    assert "".join(found.notes) == note
