"""One real scheduler, driven by hand: the test is the loop, the frontend, the device and the transfer process."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from tandem.config import Role
from tandem.core.messages.plans import Plan, PlanResolved, Row, RowResult
from tandem.core.messages.requests import Ended, PrefillPeer, Submit, Tokens
from tandem.core.messages.sampling import SamplingParams, TokenLogprob
from tandem.core.request import Request
from tandem.core.scheduler import Scheduler, Tick
from tandem.core.settings import SchedulerSettings
from tandem.core.token_ids import pack

EOS = 2
PAGE = 4
DEFAULTS = SchedulerSettings(
    role="unified",
    num_pages=32,
    page_tokens=PAGE,
    max_context_tokens=96,
    vocab_size=1000,
    eos_token_ids=(EOS,),
    fingerprint="model",
    numerics="exact",
    instance_id=b"me",
)
Effect = TypeVar("Effect")


def of_type(effects: Iterable[object], kind: type[Effect]) -> list[Effect]:
    return [effect for effect in effects if isinstance(effect, kind)]


def one(effects: Iterable[object], kind: type[Effect]) -> Effect:
    """Return the only effect of a kind."""
    found = of_type(effects, kind)
    assert len(found) == 1, f"{len(found)} of {kind.__name__} in {list(effects)}"
    return found[0]


def prompt_of(length: int, first: int = 100) -> list[int]:
    return list(range(first, first + length))


class Rig:
    """Handles events at `now`, plans and resolves when told to, and checks all pages after each step.

    The device samples `script[request_id][output_index]`, else 10 + output_index.
    """

    def __init__(self, role: Role = "unified", *, checks: bool = True, **changes: Any) -> None:
        self.settings = replace(DEFAULTS, role=role, **changes)
        self._num_secrets = 0
        self.scheduler = Scheduler(self.settings, self._new_token)
        self.now = 0.0
        self.script: dict[int, Sequence[int]] = {}
        self.in_flight: deque[Plan] = deque()
        self.heard: list[object] = []
        self._checks = checks

    def _new_token(self) -> bytes:
        self._num_secrets += 1
        return b"secret-%d" % self._num_secrets

    # ---- events ---------------------------------------------------------------------------------------------------

    def send(self, event: object) -> list[object]:
        """Handle an event; return the effects."""
        self.scheduler.handle(event, self.now)
        return self._collect()

    def wait(self, seconds: float) -> list[object]:
        self.now += seconds
        return self.send(Tick())

    def submit(
        self,
        request_id: int,
        prompt: int | Sequence[int],
        max_tokens: int = 4,
        *,
        outputs: Sequence[int] = (),
        peers: tuple[PrefillPeer, ...] = (),
        timeout: float | None = None,
        salt: str = "",
        adapter: str = "",
        **sampling: Any,
    ) -> list[object]:
        """Submit a request; a prompt given by its length has tokens of its own."""
        tokens = prompt_of(prompt, 100 * request_id) if isinstance(prompt, int) else prompt
        return self.send(
            Submit(
                request_id=request_id,
                prompt_token_ids=pack(tokens),
                sampling=SamplingParams(max_tokens=max_tokens, **sampling),
                output_token_ids=pack(outputs),
                peers=peers,
                timeout_seconds=timeout,
                cache_salt=salt,
                adapter=adapter,
            )
        )

    # ---- device ---------------------------------------------------------------------------------------------------

    def plan(self) -> tuple[Row, ...]:
        """Plan and launch; return the rows, none if there is nothing to do. Effects are in `heard`."""
        plan = self.scheduler.plan(self.now)
        self._collect()
        if plan is None:
            return ()
        written: list[int] = []
        for row in plan.rows:
            _check_row(row, self.settings.page_tokens)
            assert self.request(row.request_id).page_table == row.pages, "a row of somebody who has lost its pages"
            written += row.pages[row.start // self.settings.page_tokens :]
        assert len(set(written)) == len(written), "two rows write to one page"
        self.in_flight.append(plan)
        return plan.rows

    def resolve(self, seconds: float = 0.0) -> list[object]:
        """Resolve the oldest plan in flight; return the effects."""
        plan = self.in_flight.popleft()
        return self.send(PlanResolved(plan.plan_id, tuple(map(self._result, plan.rows)), seconds))

    def step(self) -> list[object]:
        """Plan and resolve, nothing else in flight."""
        assert not self.in_flight
        return self.resolve() if self.plan() else []

    def run(self, num_steps: int = 500) -> list[object]:
        """Step until nothing is left to plan; return all effects."""
        before = len(self.heard)
        for _ in range(num_steps):
            if not self.in_flight and not self.plan():
                return self.heard[before:]
            self.resolve()
        raise AssertionError(f"not at rest after {num_steps} steps")

    def _result(self, row: Row) -> RowResult:
        logprobs: tuple[TokenLogprob, ...] = ()
        if row.prompt_logprobs is not None:
            following = [*row.token_ids[1:], *([] if row.next_token_id is None else [row.next_token_id])]
            logprobs = tuple(TokenLogprob(token, -float(token)) for token in following)
        if row.sample is None:
            return RowResult(prompt_logprobs=logprobs)
        index = row.sample.output_index
        script = self.script.get(row.request_id, ())
        return RowResult(script[index] if index < len(script) else 10 + index, None, logprobs)

    # ---- views ----------------------------------------------------------------------------------------------------

    def request(self, request_id: int) -> Request:
        return self.scheduler._ledger.requests[request_id]

    def outputs(self, request_id: int) -> list[int]:
        """Return the output that the client has heard."""
        messages = [message for message in of_type(self.heard, Tokens) if message.request_id == request_id]
        found: list[int] = []
        for message in messages:
            assert message.first_index == messages[0].first_index + len(found), "a token is missing, or comes twice"
            found.extend(message.token_ids)
        return found

    def ended(self, request_id: int) -> Ended:
        return one([end for end in of_type(self.heard, Ended) if end.request_id == request_id], Ended)

    @property
    def num_free(self) -> int:
        """Pages that are free or can be, at rest."""
        counts = self.scheduler.kv.pool.counts()
        return counts.free + counts.cached

    def _collect(self) -> list[object]:
        self._verify()
        effects = self.scheduler.drain_effects()
        self.heard += effects
        return effects

    def _verify(self) -> None:
        if self._checks:
            faults = self.scheduler.self_check()
            assert not faults, faults


def _check_row(row: Row, page_tokens: int) -> None:
    """What every device may rely on."""
    assert row.num_tokens > 0
    assert len(row.token_ids) in ((row.num_tokens,) if row.num_tokens > 1 else (0, 1))
    assert len(row.pages) * page_tokens >= row.start + row.num_tokens, f"pages are missing: {row}"
