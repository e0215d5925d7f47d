"""A client and the gateway's journal of it: every token exactly once, in order, as the reference says."""

from __future__ import annotations

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
    """One request, resumed on another worker when its worker dies."""

    def __init__(self, world: World, number: int) -> None:
        random, options = world.random, world.options
        self.world = world
        self.number = number
        shared = [(number % 3 * 31 + index) % 97 for index in range(random.choice([0, 8, 17, 24]))]
        self.prompt = shared + [random.randrange(97) for _ in range(random.randint(1, 30))]
        self.seed = random.randrange(1000)
        self.max_tokens = random.randint(1, 24)
        self.expected = oracle.reference(self.prompt, self.seed, self.max_tokens, options.eos, options.max_context)
        self.journal: list[int] = []
        self.worker: SimWorker | None = None
        self.handoffs: list[tuple[bytes, bytes]] = []  # (prefill instance, hand-off id)
        self.attempt = 0
        self.request_id = 0
        self.cancelled = False
        self.done = False
        self.will_cancel = random.random() < options.cancels

    def begin(self) -> None:
        """Send the request, or what is left of it, to a decode worker."""
        world = self.world
        self.worker = world.random.choice(world.decodes)
        self.request_id = self.number + 1000 * len(self.worker.clients)
        self.worker.clients[self.request_id] = self
        self.attempt += 1
        submit = Submit(
            request_id=self.request_id,
            prompt_token_ids=pack(self.prompt),
            output_token_ids=pack(self.journal),
            sampling=SamplingParams(seed=self.seed, max_tokens=self.max_tokens),
            peers=self._peers(),
            timeout_seconds=_LIFE_SECONDS,
        )
        self.worker.event(submit)
        if self.will_cancel:
            world.later(world.random.uniform(0.0, 0.2), self._cancel)

    def _peers(self) -> tuple[PrefillPeer, ...]:
        world = self.world
        if world.options.unified:
            return ()
        alive = {worker.instance_id for worker in world.prefills}
        if self.handoffs and self.handoffs[0][0] in alive and world.random.random() < 0.8:
            instance, handoff_id = self.handoffs[0]  # attach to what an earlier attempt may have left
            return (PrefillPeer(address="sim", instance_id=instance, handoff_id=handoff_id, attempt=self.attempt),)
        chosen = world.random.sample(world.prefills, k=world.random.randint(0, len(world.prefills)))
        self.handoffs = [(worker.instance_id, world.random.randbytes(16)) for worker in chosen]
        given = len(self.journal)
        return tuple(
            PrefillPeer(
                address="sim", instance_id=instance, handoff_id=handoff_id, attempt=self.attempt, output_tokens=given
            )
            for instance, handoff_id in self.handoffs
        )

    def _cancel(self) -> None:
        if self.done or self.worker is None:
            return
        self.cancelled = True
        cause = self.world.random.choice([CancelCause.CLIENT, CancelCause.STOP_STRING, CancelCause.SESSION_LOST])
        self.worker.event(Cancel(self.request_id, cause))

    def hear(self, worker: SimWorker, message: Tokens | Ended) -> None:
        if worker is not self.worker or message.request_id != self.request_id:
            return
        assert not self.done, f"client {self.number} hears {message} after its end"
        if isinstance(message, Tokens):
            assert message.first_index == len(self.journal), f"token {message.first_index}, {len(self.journal)} known"
            self.journal.extend(message.token_ids)
            wanted = self.expected[: len(self.journal)]
            assert self.journal == wanted, f"client {self.number}: {self.journal} is not {wanted}"
            return
        if message.reason in (EndReason.STOP, EndReason.LENGTH) and not self.cancelled:
            assert self.journal == self.expected, f"client {self.number} ended early: {message}"
            assert (message.reason is EndReason.STOP) == (self.expected[-1] == self.world.options.eos)
        else:
            assert self.cancelled, f"client {self.number}: {message}"
        self.done = True

    def worker_lost(self) -> None:
        if not self.done:
            self.begin()
