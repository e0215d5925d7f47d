"""A whole service under one seed: clients, decode and prefill workers, streams, data plane, faults, a virtual clock."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from tandem.config import HandoffConfig, SchedulerConfig
from tandem.core.messages.handoff import (
    EndCode,
    OpenReceived,
    OpenStream,
    ReleaseReason,
    ReleaseReceived,
    Sharding,
    StreamClosed,
    StreamLost,
)
from tandem.core.messages.requests import Drain
from tandem.core.roles import Pacing
from tests.sim.client import Client
from tests.sim.transfer import SimTransfer
from tests.sim.worker import SimWorker

REST_SECONDS = 2.0  # after the last client's end, and a lease, nobody has anything to do any more
COUNTED = (
    "discarded_rows",
    "checksum_mismatches",
    "failed_pulls",
    "local_prefills",
    "leases_started",
    "leases_expired",
    "prefix_hit_tokens",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What one simulated run is like. `faults` scales every fault's probability; 0 is a calm day."""

    prefill_loop: Pacing = "overlap"
    decode_loop: Pacing = "overlap"
    prefill_stages: int = 1  # of pipelined loops
    decode_stages: int = 1
    num_prefill: int = 2
    num_decode: int = 2
    unified: bool = False
    prefill_sharding: Sharding = field(default_factory=Sharding)
    decode_sharding: Sharding = field(default_factory=Sharding)
    num_requests: int = 12
    page_tokens: int = 4
    prefill_pages: int = 40
    decode_pages: int = 40
    budget_tokens: int = 16
    max_running: int = 8
    faults: float = 0.0
    lost_releases: float = 0.0
    kills: int = 0
    transfer_kills: int = 0
    cancels: float = 0.0
    deadlines: float = 0.0
    drains: int = 0
    eos: int = 3
    max_context: int = 96
    prefill_seconds_per_token: float = 0.001
    decode_seconds_per_token: float = 0.001
    jitter: float = 0.5  # how far a plan's time may be from its cost
    microbatch_tokens_min: int = 1
    handoff: HandoffConfig = field(default_factory=lambda: HandoffConfig(lease_seconds=0.5, fence_seconds=0.5))

    @property
    def scheduler(self) -> SchedulerConfig:
        return SchedulerConfig(
            budget_tokens=self.budget_tokens,
            microbatch_tokens_min=self.microbatch_tokens_min,
            step_seconds_max=0.0,
            max_running_requests=self.max_running,
        )


@dataclass(eq=False)
class Stream:
    """One Handoff stream: in order in each direction, open or not on each side."""

    decode: SimWorker
    decode_id: int
    prefill: SimWorker
    prefill_id: int
    handoff_id: bytes
    decode_open: bool = True
    prefill_open: bool = False  # until Open has arrived
    up_at: float = 0.0
    down_at: float = 0.0


class World:
    """Owns the clock, the streams and the faults."""

    def __init__(self, seed: int, options: Options) -> None:
        self.seed = seed
        self.random = Random(seed)
        self.options = options
        self.now = 0.0
        self._transcript: deque[tuple[float, str, str, object]] = deque(maxlen=4000)  # worded when somebody reads it
        self.last_end = 0.0  # when the last client had its answer, or its error
        self.seen: Counter[str] = Counter()  # what has happened in this run
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self.directory: dict[bytes, SimTransfer] = {}
        self.streams: list[Stream] = []
        self.stream_of: dict[tuple[SimWorker, int], Stream] = {}
        role: Literal["decode", "unified"] = "unified" if options.unified else "decode"
        self.prefills = [SimWorker(self, "prefill", options.prefill_loop) for _ in range(options.num_prefill)]
        self.decodes = [SimWorker(self, role, options.decode_loop) for _ in range(options.num_decode)]
        self.retired: list[SimWorker] = []  # dead, or draining
        self.clients = [Client(self, number) for number in range(options.num_requests)]

    # ---- clock ----------------------------------------------------------------------------------------------------

    def later(self, delay: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (self.now + delay, self._count, action))

    def run(self, until: float = 300.0) -> None:
        """Run to quiescence; raises AssertionError if somebody is stuck."""
        for worker in [*self.prefills, *self.decodes]:
            worker.transfer.start()
        for client in self.clients:
            self.later(self.random.uniform(0.0, 0.3), client.begin)
        for _ in range(self.options.kills):
            self.later(self.random.uniform(0.02, 0.6), self._kill_somebody)
        for _ in range(self.options.transfer_kills):
            self.later(self.random.uniform(0.02, 0.6), self._kill_a_transfer)
        for _ in range(self.options.drains):
            self.later(self.random.uniform(0.02, 0.6), self._drain_somebody)
        if self.options.faults:
            self.later(0.05, self._break_a_stream)
        while self._heap:
            self.now, _, action = heapq.heappop(self._heap)
            if self.now > until:
                break
            action()
        stuck = [client for client in self.clients if not client.done]
        assert not stuck, f"stuck: {[(client.number, len(client.journal)) for client in stuck]}"
        for worker in [*self.prefills, *self.decodes, *self.retired]:
            worker.check_quiescent(self.last_end + self.options.handoff.lease_seconds + REST_SECONDS)
            load = worker.scheduler.load(self.now)
            self.seen.update({name: getattr(load, name) for name in COUNTED})

    def log(self, who: str, verb: str, what: object = "") -> None:
        self._transcript.append((self.now, who, verb, what))

    @property
    def transcript(self) -> list[str]:
        """The last things that happened, a line each."""
        return [f"{moment:9.5f} {who} {verb} {what}" for moment, who, verb, what in self._transcript]

    # ---- streams --------------------------------------------------------------------------------------------------

    def open_stream(self, decode: SimWorker, effect: OpenStream) -> None:
        candidates = [*self.prefills, *(worker for worker in self.retired if worker.alive)]
        prefill = next((worker for worker in candidates if worker.instance_id == effect.instance_id), None)
        if prefill is None:
            closed = StreamClosed(effect.stream_id, EndCode.LOST, "unreachable")
            self.later(self.random.uniform(0.0, 0.05), lambda: decode.event(closed))
            return
        for other in self.streams:
            left = other.decode is decode and other.decode_open and other.handoff_id == effect.open.handoff_id
            assert not left, f"stream {other.decode_id} is left behind, stream {effect.stream_id} is opened"
        stream = Stream(decode, effect.stream_id, prefill, prefill.new_stream_id(), effect.open.handoff_id)
        self.streams.append(stream)
        self.stream_of[decode, effect.stream_id] = stream
        self.stream_of[prefill, stream.prefill_id] = stream

        def arrive() -> None:
            if prefill.alive:
                stream.prefill_open = True
                prefill.event(OpenReceived(stream.prefill_id, effect.open))
            else:
                self._close_decode_side(stream)

        self._up(stream, arrive)

    def release(self, decode: SimWorker, stream_id: int, reason: ReleaseReason) -> None:
        stream = self.stream_of.get((decode, stream_id))
        if stream is None:
            return
        stream.decode_open = False
        if self.random.random() < self.options.lost_releases:
            self.log("fault:", "a release is lost with its stream")
            self._up(stream, lambda: self._end_prefill_side(stream, StreamLost(stream.prefill_id)))
        else:
            self._up(stream, lambda: self._end_prefill_side(stream, ReleaseReceived(stream.prefill_id, reason)))

    def drop(self, decode: SimWorker, stream_id: int) -> None:
        stream = self.stream_of.get((decode, stream_id))
        if stream is not None:
            stream.decode_open = False
            self._up(stream, lambda: self._end_prefill_side(stream, StreamLost(stream.prefill_id)))

    def down(self, prefill: SimWorker, stream_id: int, event: Callable[[int], object], last: bool = False) -> None:
        """Carry something from prefill to decode; `last`: prefill has ended the stream."""
        stream = self.stream_of[prefill, stream_id]
        if last:
            stream.prefill_open = False
        stream.down_at = max(stream.down_at, self.now + self._latency())

        def arrive() -> None:
            if stream.decode_open:
                stream.decode_open = not last
                stream.decode.event(event(stream.decode_id))

        self.later(stream.down_at - self.now, arrive)

    def _up(self, stream: Stream, action: Callable[[], None]) -> None:
        stream.up_at = max(stream.up_at, self.now + self._latency())
        self.later(stream.up_at - self.now, action)

    def _end_prefill_side(self, stream: Stream, event: object) -> None:
        if stream.prefill_open:
            if isinstance(event, StreamLost):
                stream.prefill_open = False
            stream.prefill.event(event)

    def _close_decode_side(self, stream: Stream) -> None:
        if stream.decode_open:
            stream.decode_open = False
            stream.decode.event(StreamClosed(stream.decode_id, EndCode.LOST, "reset"))

    def sever(self, stream: Stream) -> None:
        """Break a stream; each side notices in its own time."""
        self._up(stream, lambda: self._end_prefill_side(stream, StreamLost(stream.prefill_id)))
        self.later(self._latency(), lambda: self._close_decode_side(stream))

    def _latency(self) -> float:
        if self.random.random() < self.options.faults / 4:
            return self.random.uniform(0.0, 0.3)
        return self.random.uniform(0.0001, 0.004)

    # ---- faults ---------------------------------------------------------------------------------------------------

    def _break_a_stream(self) -> None:
        if all(client.done for client in self.clients):
            return
        live = [stream for stream in self.streams if stream.decode_open or stream.prefill_open]
        if live and self.random.random() < self.options.faults:
            self.log("fault:", "stream broken")
            self.sever(self.random.choice(live))
        self.later(0.02, self._break_a_stream)

    def _kill_a_transfer(self) -> None:
        worker = self.random.choice([*self.prefills, *self.decodes])
        if worker.alive and worker.transfer.alive:
            self.log("fault:", f"transfer process of {worker.name} killed")
            worker.transfer.kill(self.random.uniform(0.001, 0.1))

    def _kill_somebody(self) -> None:
        group = self.random.choice([group for group in (self.prefills, self.decodes) if group])
        index = self.random.randrange(len(group))
        victim = group[index]
        self.log("fault:", f"{victim.name} killed")
        victim.die()
        for stream in [stream for stream in self.streams if victim in (stream.decode, stream.prefill)]:
            self.sever(stream)
        self._replace(group, index)
        for client in self.clients:
            if client.worker is victim:
                self.later(self._latency(), client.worker_lost)

    def _drain_somebody(self) -> None:
        """A rolling restart: another worker takes the place, this one finishes what its grace lets it."""
        group = self.random.choice([group for group in (self.prefills, self.decodes) if group])
        index = self.random.randrange(len(group))
        self.log("fault:", f"{group[index].name} drains")
        group[index].event(Drain(self.random.choice([0.0, 0.05, 0.3, None])))
        self._replace(group, index)

    def _replace(self, group: list[SimWorker], index: int) -> None:
        old = group[index]
        self.retired.append(old)
        group[index] = SimWorker(self, old.role, old.loop_name)
        group[index].transfer.start()  # a worker is named once it is ready
