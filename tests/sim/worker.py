"""One simulated worker: the real scheduler and the real loop's three steps, over simulated ports and device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tandem.config import Role
from tandem.core.messages import handoff, transfer
from tandem.core.messages.requests import Ended, Tokens
from tandem.core.roles import Pacing, loop_of
from tandem.core.scheduler import Scheduler, Tick
from tandem.core.settings import SchedulerSettings
from tests.sim.device import HashDevice
from tests.sim.transfer import HEADS, LAYERS, SimTransfer
from tests.sim.watch import Watch

if TYPE_CHECKING:
    from tests.sim.client import Client
    from tests.sim.world import World


class SimWorker:
    """A process life. A restarted worker is a new object with a new instance id."""

    def __init__(self, world: World, role: Role, loop_name: Pacing) -> None:
        options = world.options
        self.world = world
        self.role: Role = role
        self.loop_name: Pacing = loop_name
        self.instance_id = world.random.randbytes(8)
        self.name = f"{role}-{self.instance_id.hex()[:4]}"
        self.alive = True
        loop = loop_of(role, loop_name, options.prefill_stages if role == "prefill" else options.decode_stages)
        num_pages = options.prefill_pages if role == "prefill" else options.decode_pages
        sharding = options.prefill_sharding if role == "prefill" else options.decode_sharding
        settings = SchedulerSettings(
            role=role,
            chain=loop.chain,
            stages=loop.stages,
            num_pages=num_pages,
            page_tokens=options.page_tokens,
            max_context_tokens=options.max_context,
            vocab_size=97,
            eos_token_ids=(options.eos,),
            scheduler=options.scheduler,
            handoff=options.handoff,
            fingerprint="sim",
            numerics="sim",
            instance_id=self.instance_id,
            sharding=sharding,
            num_layers=LAYERS,
            num_kv_heads=HEADS,
        )
        self.depth, self.chain = loop.depth, loop.chain
        self.scheduler = Scheduler(settings, lambda: world.random.randbytes(16))
        self.pool = [[world.random.getrandbits(60) for _ in range(options.page_tokens)] for _ in range(num_pages)]
        seconds = options.prefill_seconds_per_token if role == "prefill" else options.decode_seconds_per_token
        self.device = HashDevice(
            world.random, self.scheduler, self.pool, world.later, self.event, seconds, loop.stages, options.jitter
        )
        self.transfer = SimTransfer(
            world.random,
            self.pool,
            world.later,
            self.event,
            world.directory,
            options.faults,
            sharding,
        )
        self.watch = Watch(self)
        self.clients: dict[int, Client] = {}
        self._num_streams = 0
        self._timer_at: float | None = None
        self._busy_until = 0.0

    def new_stream_id(self) -> int:
        self._num_streams += 1
        return self._num_streams

    def die(self) -> None:
        self.alive = self.device.alive = False
        self.transfer.kill(None)

    # ---- the loop -------------------------------------------------------------------------------------------------

    def event(self, event: object) -> None:
        """One turn of the loop with one event."""
        if not self.alive:
            return
        self.world.log(self.name, "<-", event)
        now = self.device.now = self.world.now
        if not self.scheduler.idle:
            self._busy_until = now
        check = self.watch.expects(event)
        self.scheduler.handle(event, now)
        if check is not None:
            check()
        while self.device.unresolved <= self.depth and (plan := self.scheduler.plan(now)):
            self.watch.planned(plan)
            self.device.launch(plan)
        self.watch.after_event()
        faults = self.scheduler.self_check()
        assert not faults, faults
        for effect in self.scheduler.drain_effects():
            self.world.log(self.name, "->", effect)
            self._route(effect)
        self._arm()

    def _arm(self) -> None:
        due = self.scheduler.next_timer()
        if due is None or due == self._timer_at:
            return
        self._timer_at = due
        self.world.later(max(0.0, due - self.world.now), self._tick)

    def _tick(self) -> None:
        self._timer_at = None
        due = self.scheduler.next_timer()
        if self.alive and due is not None and due <= self.world.now:
            self.event(Tick())
        elif self.alive:
            self._arm()

    # ---- effects --------------------------------------------------------------------------------------------------

    def _route(self, effect: object) -> None:
        world = self.world
        match effect:
            case Tokens() | Ended():
                client = self.clients.get(effect.request_id)
                if client is not None:
                    client.hear(self, effect)
            case handoff.OpenStream():
                world.seen["held prefix"] += effect.open.tokens_held > 0
                world.open_stream(self, effect)
            case handoff.SendRelease():
                world.release(self, effect.stream_id, effect.reason)
            case handoff.DropStream():
                world.drop(self, effect.stream_id)
            case handoff.SendAccepted():
                accepted = effect.accepted
                world.down(self, effect.stream_id, lambda stream: handoff.StreamAccepted(stream, accepted))
            case handoff.SendAnnounce():
                announce = effect.announce
                self.watch.announced(effect)
                world.down(self, effect.stream_id, lambda stream: handoff.StreamAnnounced(stream, announce))
            case handoff.SendFirstToken():
                first = effect.first_token
                world.down(self, effect.stream_id, lambda stream: handoff.StreamFirstToken(stream, first))
            case handoff.SendComplete():
                complete = effect.complete
                world.down(self, effect.stream_id, lambda stream: handoff.StreamCompleted(stream, complete))
            case handoff.EndStream():
                code = effect.code
                world.down(self, effect.stream_id, lambda stream: handoff.StreamClosed(stream, code), last=True)
            case transfer.Export() | transfer.Revoke() | transfer.Pull() | transfer.CancelPull():
                self.transfer.command(effect)
            case _:
                raise AssertionError(f"nobody takes {effect}")

    def check_quiescent(self, due: float) -> None:
        """Everything is given back, and was by `due`: nothing has waited for a deadline."""
        if not self.alive:
            return
        counts = self.scheduler.kv.pool.counts()
        assert self.scheduler.idle, f"{self.name} is not idle: {self.scheduler.load(self.world.now)}"
        assert counts.free + counts.cached == counts.total, f"{self.name}: {counts}"
        self.watch.at_rest()
        assert self._busy_until <= due, f"{self.name} was at rest at {self._busy_until}, not by {due}"
        slots = self.scheduler._ledger._slots
        assert sorted(slots) == list(range(self.world.options.max_running)), f"{self.name} has these slots: {slots}"
