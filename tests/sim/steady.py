"""A long steady load on one worker with a simulated pipeline, by itself: how full its stages are.

`python -m tests.sim.steady` prints throughput and the share of bubbles at 1, 2 and 4 stages against the ideal.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tandem.config import SchedulerConfig
from tandem.core.messages.plans import Plan, PlanResolved
from tandem.core.messages.requests import Ended, Submit
from tandem.core.messages.sampling import SamplingParams
from tandem.core.roles import loop_of
from tandem.core.scheduler import Scheduler
from tandem.core.settings import SchedulerSettings
from tandem.core.token_ids import pack
from tests.sim.device import HashDevice

PAGE_TOKENS, NUM_PAGES = 16, 4000
SECONDS_PER_TOKEN = 0.001


@dataclass(frozen=True, kw_only=True)
class Load:
    """So many requests at once; whoever ends makes room for the next. Lengths are drawn from 1 up."""

    concurrency: int = 32
    prompt_tokens: int = 64
    max_tokens: int = 64
    seconds: float = 6.0  # measured, after a tenth of it in which the load begins
    jitter: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Steady:
    """What came of it. Tokens are those of prompts and answers. `bubbles`: by stage, its share of time with nothing."""

    tokens_per_second: float
    bubbles: tuple[float, ...]
    most_in_flight: int
    plan_costs: tuple[int, ...]  # tokens of each plan


class _Driver:
    """The loop's three steps over a virtual clock."""

    def __init__(self, stages: int, load: Load) -> None:
        self.random = Random(stages)
        self.load = load
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        loop = loop_of("unified", "pipelined", stages)
        self.depth = loop.depth
        settings = SchedulerSettings(
            role="unified",
            chain=loop.chain,
            stages=loop.stages,
            num_pages=NUM_PAGES,
            page_tokens=PAGE_TOKENS,
            max_context_tokens=load.prompt_tokens + load.max_tokens + 1,
            vocab_size=97,
            prefix_cache=False,
            scheduler=SchedulerConfig(step_seconds_max=0.0, microbatch_tokens_min=8),
        )
        self.scheduler = Scheduler(settings, lambda: bytes(16))
        pool = [[0] * PAGE_TOKENS for _ in range(NUM_PAGES)]
        self.device = HashDevice(
            self.random, self.scheduler, pool, self.later, self.event, SECONDS_PER_TOKEN, stages, load.jitter
        )
        self.most_in_flight = 0
        self.plan_costs: list[int] = []
        self.rows: dict[int, int] = {}  # decode rows in flight, by request
        self._next_id = 0

    def later(self, delay: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (self.now + delay, self._count, action))

    def run_until(self, moment: float) -> None:
        while self._heap and self._heap[0][0] <= moment:
            self.now, _, action = heapq.heappop(self._heap)
            action()
        self.now = moment

    def submit(self) -> None:
        self._next_id += 1
        prompt = [self.random.randrange(97) for _ in range(self.random.randint(1, self.load.prompt_tokens))]
        sampling = SamplingParams(max_tokens=self.random.randint(1, self.load.max_tokens), ignore_eos=True)
        self.event(Submit(request_id=self._next_id, prompt_token_ids=pack(prompt), sampling=sampling))

    def event(self, event: object) -> None:
        self.device.now = self.now
        if isinstance(event, PlanResolved):
            self._settle(event)
        self.scheduler.handle(event, self.now)
        while self.device.unresolved <= self.depth and (plan := self.scheduler.plan(self.now)):
            self._launch(plan)
        for effect in self.scheduler.drain_effects():
            if isinstance(effect, Ended):
                self.later(0.0, self.submit)

    @property
    def computed_tokens(self) -> int:
        return self.scheduler.load(self.now).computed_tokens

    def _launch(self, plan: Plan) -> None:
        for row in plan.rows:
            if row.sample is not None:
                assert row.request_id not in self.rows, f"request {row.request_id} decodes in two plans in flight"
                self.rows[row.request_id] = plan.plan_id
        self.device.launch(plan)
        self.most_in_flight = max(self.most_in_flight, self.device.unresolved)
        self.plan_costs.append(plan.num_tokens)

    def _settle(self, event: PlanResolved) -> None:
        self.rows = {request: plan_id for request, plan_id in self.rows.items() if plan_id != event.plan_id}


def run_steady(stages: int, load: Load) -> Steady:
    """Run the load on a unified pipelined worker with `stages` stages, each of which takes 1 / stages of the time."""
    driver = _Driver(stages, load)
    for _ in range(load.concurrency):
        driver.later(driver.random.uniform(0.0, load.seconds / 20), driver.submit)
    begun = load.seconds / 10
    driver.run_until(begun)
    before, tokens_before = list(driver.device.busy_seconds), driver.computed_tokens
    driver.plan_costs.clear()
    driver.run_until(begun + load.seconds)
    busy = [after - earlier for after, earlier in zip(driver.device.busy_seconds, before, strict=True)]
    return Steady(
        tokens_per_second=(driver.computed_tokens - tokens_before) / load.seconds,
        bubbles=tuple(1.0 - seconds / load.seconds for seconds in busy),
        most_in_flight=driver.most_in_flight,
        plan_costs=tuple(driver.plan_costs),
    )


def main() -> None:
    for name, load in LOADS.items():
        one = run_steady(1, load).tokens_per_second
        for stages in (1, 2, 4):
            found = run_steady(stages, load)
            ratio = found.tokens_per_second / one
            print(
                f"{name:<22}{stages} stages {found.tokens_per_second:8.1f} tokens/s = {ratio:.2f} of one stage"
                f" ({ratio / stages:.1%} of the ideal), bubbles {max(found.bubbles):.1%}"
            )


LOADS = {
    "steady": Load(),
    "answers only": Load(prompt_tokens=1),
    "prompts mostly": Load(prompt_tokens=512, max_tokens=8, concurrency=16, seconds=20.0),
    "jitter of a quarter": Load(jitter=0.25),
}

if __name__ == "__main__":
    main()
