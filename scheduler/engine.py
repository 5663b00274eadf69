"""The engine: a scheduler, a model and a clock, and a step that joins them.

Knows nothing of processes or pipes (`scheduler/process.py`), of HTTP or of text.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace

from configs.schema import SchedulerSection
from model.interface import Constraint, InFlightStep, ModelRunner
from scheduler.cache_story import story_of
from scheduler.caches import build_cache
from scheduler.drafters.choice import build_drafters
from scheduler.drafters.grammar import GrammarDrafter
from scheduler.messages import (
    Begun,
    CacheAnswer,
    CacheCommand,
    Cancel,
    ExplainPrefix,
    PinPrefix,
    Prepared,
    Rejected,
    RejectKind,
    ResetCache,
    SetVocabulary,
    Started,
    StepResult,
    Submit,
    UnpinPrefix,
)
from scheduler.pin_deadlines import PinDeadlines
from scheduler.plan import StepPlan
from scheduler.scheduler import Scheduler
from scheduler.stats import EngineStats

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Launched:
    plan: StepPlan
    in_flight_step: InFlightStep
    began_s: float


class Engine:
    """Takes messages between steps; each step gives one message back.

    Where the runner can have several steps under way, the next step is launched before the tokens
    of the last one are known. So the device never waits for the host.

    A request with a grammar is held back from the scheduler until the grammar is ready.
    """

    def __init__(
        self,
        runner: ModelRunner,
        config: SchedulerSection,
        clock_s: Callable[[], float],
        post: Callable[[Prepared], None],
        announce: Callable[[Begun], None] = lambda _: None,
    ) -> None:
        """`post`: brings a message from any thread to `handle`, in the engine's own.

        `announce`: called with requests before the first work on them, which may crash the process.
        """
        info = runner.info
        self.runner = runner
        self._clock_s = clock_s
        self._post = post
        self._announce = announce
        self._is_debug = config.debug
        self.cache = build_cache(info, config)
        self._pins = PinDeadlines(self.cache)
        drafting = config.drafting
        drafter = build_drafters(
            drafting.kind(info.device),
            self.cache,
            further=[GrammarDrafter(runner.forced_tokens)],
            lookup_min_tokens=drafting.lookup_min_tokens,
            lookup_max_tokens=drafting.lookup_max_tokens,
        )
        self._scheduler = Scheduler(self.cache, config, info, drafter)
        #: Requests whose grammars are being made ready.
        self._preparing: dict[int, tuple[Submit, Future[Constraint]]] = {}
        #: When each request that waits for its first admission arrived.
        self._arrived_s: dict[int, float] = {}
        #: Steps under way, the oldest first.
        self._launched: deque[_Launched] = deque()
        #: When the last completed step ended.
        self._completed_s = 0.0
        #: For the next message, and whether there must be one.
        self._news = StepResult()
        self._has_news = False

    @property
    def has_work(self) -> bool:
        """Whether `step` has work or news."""
        return self._has_news or self._scheduler.has_work or bool(self._launched)

    @property
    def prompt_token_s(self) -> float | None:
        """Return the time that a further token of a prompt takes; None: not measured yet."""
        return self._scheduler.pacing.token_s

    def handle(self, message: Submit | Cancel | SetVocabulary | CacheCommand | Prepared) -> None:
        """Take in one message; refusals are in the result of the next step."""
        if isinstance(message, SetVocabulary):
            self.runner.set_vocabulary(message.vocabulary)
            return
        self._has_news = True
        if isinstance(message, Submit):
            self._arrived_s[message.request_id] = self._clock_s()
            self._pins.expect(message.request_id, message.request)
            grammar = message.request.params.grammar
            if grammar is None:
                self._submit(message)
            else:
                self._prepare(message, grammar)
        elif isinstance(message, Prepared):
            # It may have been cancelled meanwhile.
            if found := self._preparing.pop(message.request_id, None):
                self._submit_prepared(*found)
        elif isinstance(message, ResetCache | ExplainPrefix | PinPrefix | UnpinPrefix):
            self._news.cache_answers.append(self._answer(message))
        else:
            self._pins.forget(message.request_id)
            self._arrived_s.pop(message.request_id, None)
            if self._preparing.pop(message.request_id, None) is None:
                self._scheduler.cancel(message.request_id)

    def _answer(self, command: CacheCommand) -> CacheAnswer:
        now_s = self._clock_s()
        if isinstance(command, ResetCache):
            self.cache.set_time(now_s)
            return self.cache.reset()
        if isinstance(command, ExplainPrefix):
            return story_of(self.cache.explain(command.token_ids, command.namespace), now_s)
        return self._pins.answer(command, now_s)

    def _prepare(self, submit: Submit, grammar: str) -> None:
        self._announce(Begun((submit.request_id,)))
        try:
            preparation = self.runner.prepare(grammar)
        except Exception as fault:  # noqa: BLE001 - reported like a later one
            preparation = Future()
            preparation.set_exception(fault)
        if preparation.done():
            self._submit_prepared(submit, preparation)
            return
        self._preparing[submit.request_id] = submit, preparation
        preparation.add_done_callback(lambda _: self._post(Prepared(submit.request_id)))

    def _submit_prepared(self, submit: Submit, preparation: Future[Constraint]) -> None:
        try:
            constraint = preparation.result()
        except ValueError as error:
            message = f"the grammar cannot be used: {error}"
            self._reject(Rejected(submit.request_id, RejectKind.INVALID, message, "grammar"))
        except Exception as fault:  # noqa: BLE001 - a bug that is to harm this request alone
            _log.exception("the grammar of request %d failed", submit.request_id)
            self._arrived_s.pop(submit.request_id, None)
            self._pins.forget(submit.request_id)
            message = f"the grammar failed: {type(fault).__name__}"
            self._news.failed.append((submit.request_id, message))
        else:
            self._submit(submit, constraint)

    def _submit(self, submit: Submit, constraint: Constraint | None = None) -> None:
        for rejected in self._scheduler.submit(submit, constraint):
            self._reject(rejected)

    def _reject(self, rejected: Rejected) -> None:
        self._arrived_s.pop(rejected.request_id, None)
        self._pins.forget(rejected.request_id)
        self._news.rejected.append(rejected)

    def idle(self) -> bool:
        """Use some milliseconds without work; return whether further ones would be of use."""
        return self.runner.idle()

    def step(self) -> StepResult:
        """Launch steps, wait for the oldest one if there is any, and return all news.

        The requests of a step that raises run again one at a time. Only a request whose step raises
        again ends with an error. Raises `ModelFaultError` if the model computes nothing.
        """
        now_s = self._clock_s()
        self.cache.set_time(now_s)
        self._pins.advance(now_s)
        while len(self._launched) < self._max_steps_in_flight:
            plan = self._scheduler.plan()
            if plan is None or not self._launch(plan):
                break
        result = self._complete(self._launched.popleft()) if self._launched else self._report()
        if self._is_debug:
            self._scheduler.check()
        return result

    @property
    def _max_steps_in_flight(self) -> int:
        """Steps that may be under way now.

        A grammar needs the last token before it gives the next mask, and so does a drafter. With
        two steps under way their sequences would be in every other step, and the batch would run in
        two halves.
        """
        return 1 if self._scheduler.awaits_tokens else self.runner.max_steps_in_flight

    def _launch(self, plan: StepPlan) -> bool:
        began_s = self._clock_s()
        begun = tuple(
            Started(
                id_,
                began_s - self._arrived_s.pop(id_),
                misses.num_reused_tokens,
                story_of(misses, began_s),
            )
            for id_, misses in plan.started
        )
        if begun:
            self._news.started.extend(begun)
            self._announce(Begun(tuple(one.request_id for one in begun)))
        try:
            in_flight_step = self.runner.launch(plan.step)
        except Exception as fault:  # noqa: BLE001 - a fault of one request or of the model
            self._fail(plan, fault)
            return False
        self._launched.append(_Launched(plan, in_flight_step, began_s))
        return True

    def _complete(self, launched: _Launched) -> StepResult:
        plan = launched.plan
        try:
            output = launched.in_flight_step.wait()
        except Exception as fault:  # noqa: BLE001 - as in `_launch`
            self._fail(plan, fault)
            return self._report()
        # A step that was launched early began when the one before it was over.
        began_s, self._completed_s = max(launched.began_s, self._completed_s), self._clock_s()
        result = self._scheduler.apply(plan, output, self._completed_s - began_s)
        self._pins.land(result, self._completed_s)
        return self._report(result, plan.num_tokens)

    def _fail(self, plan: StepPlan, fault: Exception) -> None:
        ids = [sequence.request_id for sequence in plan.sequences]
        _log.error("a step of the requests %s failed; each is run alone", ids, exc_info=fault)
        self._scheduler.fail(plan, f"the model failed: {type(fault).__name__}")

    def _report(self, result: StepResult | None = None, num_step_tokens: int = 0) -> StepResult:
        news, self._news, self._has_news = self._news, StepResult(), False
        result = result or StepResult()
        return replace(
            result,
            stats=self.stats(),
            started=news.started,
            rejected=news.rejected,
            failed=[*news.failed, *result.failed],
            cache_answers=news.cache_answers,
            num_step_tokens=num_step_tokens,
        )

    def stats(self) -> EngineStats:
        """Return a snapshot of scheduler and cache together."""
        return EngineStats(self._scheduler.stats(), self.cache.stats(), len(self._preparing))

    def check(self) -> None:
        """Assert every invariant below."""
        self._scheduler.check()
        self._pins.check()
        is_bounded = len(self._arrived_s) <= self.stats().num_waiting
        assert is_bounded, "the arrival time of a request that is gone"

    def close(self) -> None:
        """Release the memory of the model."""
        self.runner.close()
