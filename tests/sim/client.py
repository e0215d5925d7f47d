"""A client and the gateway's journal of it: every token exactly once, in order, as the reference says."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from tandem.core.messages.requests import Cancel, CancelCause, Ended, EndReason, PrefillPeer, Submit, Tokens
from tandem.core.messages.sampling import SamplingParams
from tandem.core.token_ids import pack
from tests.sim import oracle

if TYPE_CHECKING:
    from tests.sim.worker import SimWorker
    from tests.sim.world import World

_LIFE_SECONDS = 250.0


class Client:
    """One request, resumed on another worker when its worker dies or drains."""

    def __init__(self, world: World, number: int) -> None:
        random, options = world.random, world.options
        self.world = world
        self.number = number
        shared = [(number % 3 * 31 + index) % 97 for index in range(random.choice([0, 8, 17, 24]))]
        self.prompt = shared + [random.randrange(97) for _ in range(random.randint(1, 30))]
        self.sampling = _sampling(random)
        self.expected = oracle.reference(self.prompt, self.sampling, options.eos, options.max_context)
        self.journal: list[int] = []
        self.worker: SimWorker | None = None
        self.handoffs: list[tuple[bytes, bytes, int]] = []  # (prefill instance, hand-off id, outputs of its first Open)
        self.attempt = 0
        self.request_id = 0
        self.cancelled = False
        self.done = False
        self.will_cancel = random.random() < options.cancels
        hurried = random.random() < options.deadlines
        self._life = random.uniform(0.02, 0.4) if hurried else _LIFE_SECONDS
        self._begun_at = 0.0
        self._scored = False
        self._dies_at: float | None = None

    def begin(self) -> None:
        """Send the request, or what is left of it, to a decode worker."""
        world = self.world
        if self._dies_at is None:
            self._dies_at = world.now + self._life
        self._begun_at = world.now
        self.worker = world.random.choice(world.decodes)
        self.request_id = self.number + 1000 * len(self.worker.clients)
        self.worker.clients[self.request_id] = self
        self.attempt += 1
        submit = Submit(
            request_id=self.request_id,
            prompt_token_ids=pack(self.prompt),
            output_token_ids=pack(self.journal),
            sampling=self.sampling,
            peers=self._peers(),
            timeout_seconds=self._dies_at - world.now,
        )
        self.worker.event(submit)
        if self.will_cancel:
            world.later(world.random.uniform(0.0, 0.2), self._cancel)

    def _peers(self) -> tuple[PrefillPeer, ...]:
        world = self.world
        if world.options.unified:
            return ()
        alive = {worker.instance_id for worker in world.prefills}
        if not self.handoffs or self.handoffs[0][0] not in alive or world.random.random() >= 0.8:
            given = len(self.journal)
            chosen = world.random.sample(world.prefills, k=world.random.randint(0, len(world.prefills)))
            self.handoffs = [(worker.instance_id, world.random.randbytes(16), given) for worker in chosen]
        # An id that is named again is attached to what an earlier attempt may have left.
        return tuple(
            PrefillPeer(
                address="sim", instance_id=instance, handoff_id=handoff_id, attempt=self.attempt, output_tokens=given
            )
            for instance, handoff_id, given in self.handoffs
        )

    def _cancel(self) -> None:
        if self.done or self.worker is None:
            return
        self.cancelled = True
        cause = self.world.random.choice([CancelCause.CLIENT, CancelCause.STOP_STRING, CancelCause.SESSION_LOST])
        worker = self.worker
        worker.event(Cancel(self.request_id, cause))
        assert self.done or not worker.alive, f"client {self.number} hears nothing of its cancel"

    def hear(self, worker: SimWorker, message: Tokens | Ended) -> None:
        if worker is not self.worker or message.request_id != self.request_id:
            return
        assert not self.done, f"client {self.number} hears {message} after its end"
        due = max(self._dies_at or 0.0, self._begun_at)
        assert self.world.now < due + 0.001, f"client {self.number} hears {message} after its deadline {due}"
        if message.prompt_logprobs:
            assert [logprob.token_id for logprob in message.prompt_logprobs] == self.prompt
            assert not self._scored, f"client {self.number} hears its prompt's log-probabilities twice"
            self._scored = True
            self.world.seen["prompt logprobs"] += 1
        if isinstance(message, Tokens):
            assert message.first_index == len(self.journal), f"token {message.first_index}, {len(self.journal)} known"
            self.journal.extend(message.token_ids)
            wanted = self.expected[: len(self.journal)]
            assert self.journal == wanted, f"client {self.number}: {self.journal} is not {wanted}"
        else:
            self._ended(message)

    def _ended(self, message: Ended) -> None:
        world = self.world
        world.seen[f"end {message.reason.value}"] += 1
        if message.reason is EndReason.DRAINED:
            world.later(world.random.uniform(0.0, 0.01), self.worker_lost)
            self.worker = None
            return
        if message.reason is EndReason.DEADLINE:
            assert self._dies_at is not None
            assert self._dies_at <= world.now
        elif message.reason in (EndReason.STOP, EndReason.LENGTH) and not self.cancelled:
            assert self.journal == self.expected, f"client {self.number} ended early: {message}"
            assert (message.reason is EndReason.STOP) == (self.expected[-1:] == [world.options.eos])
            assert self._scored == (self.sampling.prompt_logprobs is not None)
        else:
            assert self.cancelled, f"client {self.number}: {message}"
        self.done = True
        world.last_end = world.now

    def worker_lost(self) -> None:
        if not self.done:
            self.begin()


def _sampling(random: Random) -> SamplingParams:
    """A request of any kind: scoring, with a least length, with penalties, with prompt log-probabilities."""
    max_tokens = random.randint(1, 24) if random.random() < 0.95 else 0
    return SamplingParams(
        seed=random.randrange(1000),
        max_tokens=max_tokens,
        min_tokens=random.choice([0, 0, random.randint(0, max_tokens)]),
        repetition_penalty=random.choice([1.0, 1.0, 1.0, 1.1]),
        prompt_logprobs=0 if random.random() < 0.15 or not max_tokens else None,
    )
