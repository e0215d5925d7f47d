"""A decode worker and a prefill worker, their streams and their transfer processes, one step after the other.

Everything that either scheduler hears and says is written down. Nothing here is random, and time stands still unless
told otherwise: a scenario gives the same lines every time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from tandem.config import Role, SchedulerConfig
from tandem.core.messages import handoff, transfer
from tandem.core.messages.requests import Cancel, CancelCause, PrefillPeer
from tandem.core.roles import loop_of
from tests.core.import_rig import ENDPOINT
from tests.core.rig import Rig
from tests.core.show import show

PREFILL = b"prefill"


class Recorder(Rig):
    """A rig that writes down what its scheduler hears, plans and says."""

    def __init__(
        self, name: str, role: Role, stages: int, lines: list[str], route: Callable[[str, object], None]
    ) -> None:
        scheduler = SchedulerConfig(budget_tokens=8, microbatch_tokens_min=1, step_seconds_max=0.0)
        loop = loop_of(role, "pipelined" if stages > 1 else "overlap", stages)
        super().__init__(role, chain=loop.chain, stages=loop.stages, instance_id=name.encode(), scheduler=scheduler)
        self.name = name
        self._lines = lines
        self._route = route

    def send(self, event: object) -> list[object]:
        self._lines.append(f"{self.name} <- {show(event)}")
        return super().send(event)

    def _collect(self) -> list[object]:
        effects = super()._collect()
        for effect in effects:
            self._lines.append(f"{self.name} -> {show(effect)}")
            self._route(self.name, effect)
        return effects

    def compute(self) -> bool:
        """Plan until every stage has something, and resolve the oldest plan; whether there was anything to do."""
        while len(self.in_flight) < self.settings.stages and (rows := self.plan()):
            number = f" {self.in_flight[-1].plan_id}:" if self.settings.stages > 1 else ""
            self._lines += (f"{self.name} =>{number} {show(row)}" for row in rows)
        if self.in_flight:
            self.resolve()
            return True
        return False


class Pair:
    """The commands of a transcript are methods; `lines` is what came of them."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._workers: dict[str, Recorder] = {}
        self._queue: deque[tuple[str, object]] = deque()  # (worker, event) on its way
        self._stream_of: dict[str, tuple[str, int]] = {}  # "decode/1" -> its other end
        self._num_streams = 0
        self._last: object = None
        self._start("prefill", "prefill")
        self._start("decode", "decode")

    def _start(self, name: str, role: Role, stages: int = 1) -> None:
        rig = self._workers[name] = Recorder(name, role, stages, self.lines, self._routed)
        rig.send(transfer.TransferReady(name.encode(), (ENDPOINT,), ("tcp",)))

    # ---- commands -------------------------------------------------------------------------------------------------

    def pipelined(self, prefill_stages: str, decode_stages: str) -> None:
        """pipelined STAGES STAGES: other workers for both, with so many stages; before anything else"""
        self._start("prefill", "prefill", int(prefill_stages))
        self._start("decode", "decode", int(decode_stages))

    def submit(self, worker: str, prompt: str, max_tokens: str, attempt: str = "1", *outputs: str) -> None:
        """submit WORKER PROMPT_LENGTH MAX_TOKENS [ATTEMPT [OUTPUT ...]]"""
        peer = PrefillPeer(address="prefill:1", instance_id=PREFILL, handoff_id=b"handoff", attempt=int(attempt))
        known = [int(output) for output in outputs]
        self._workers[worker].submit(1, int(prompt), int(max_tokens), outputs=known, peers=(peer,))

    def cancel(self, worker: str, cause: str) -> None:
        """cancel WORKER CAUSE"""
        self._workers[worker].send(Cancel(1, CancelCause[cause]))

    def wait(self, worker: str, seconds: str) -> None:
        """wait WORKER SECONDS"""
        self._workers[worker].wait(float(seconds))

    def pages(self, worker: str) -> None:
        """pages WORKER: where its pages are"""
        counts = self._workers[worker].scheduler.kv.pool.counts()
        parts = f"{counts.free} free, {counts.held} held, {counts.cached} cached, {counts.quarantined} quarantined"
        self.lines.append(f"{worker}: {parts}")

    def start(self, name: str) -> None:
        """start WORKER: another decode worker"""
        self._start(name, "decode")

    def kill(self, worker: str) -> None:
        """kill WORKER: its streams end without a word"""
        del self._workers[worker]
        self._queue = deque(item for item in self._queue if item[0] != worker)
        for end, (other, stream) in list(self._stream_of.items()):
            if end.startswith(f"{worker}/") and other in self._workers:
                self._queue.append((other, handoff.StreamLost(stream)))

    def run(self, until: str = "") -> None:
        """run [KIND]: deliver and compute until all is at rest, or until something of that kind is under way"""
        while True:
            if until and any(type(event).__name__ == until for _, event in self._queue):
                return
            if self._queue:
                self.deliver()
            elif not any(rig.compute() for rig in list(self._workers.values())):
                return

    def deliver(self) -> None:
        """deliver: the next message only"""
        worker, event = self._queue.popleft()
        self._workers[worker].send(event)

    # ---- streams and transfer processes ---------------------------------------------------------------------------

    def _routed(self, worker: str, effect: object) -> None:
        answer = self._answer(effect)
        if answer is not None:
            self._queue.append((worker, answer))
        if isinstance(effect, handoff.OpenStream):
            self._num_streams += 1
            ends = (worker, effect.stream_id), ("prefill", self._num_streams)
            for own, other in (ends, ends[::-1]):
                self._stream_of[f"{own[0]}/{own[1]}"] = other
        stream = getattr(effect, "stream_id", None)
        carried = self._carried(effect)
        if stream is not None and carried is not None:
            end, number = self._stream_of[f"{worker}/{stream}"]
            if end in self._workers:
                self._queue.append((end, carried(number)))

    def _answer(self, effect: object) -> object | None:
        """What the worker's own transfer process says."""
        match effect:
            case transfer.Export():
                sums = b"".join((7000 + page).to_bytes(8, "little") for page in effect.pages)
                return transfer.Exported(effect.handoff_id, effect.attempt, effect.first_ordinal, sums)
            case transfer.Revoke():
                return transfer.Revoked(effect.handoff_id)
            case transfer.Pull():
                done = transfer.PullStatus.DONE
                return transfer.PullEnded(ticket=effect.ticket, status=done, good_ordinals=effect.ordinals)
            case transfer.CancelPull():
                for item in list(self._queue):
                    if isinstance(item[1], transfer.PullEnded) and item[1].ticket == effect.ticket:
                        self._queue.remove(item)
                return transfer.PullEnded(ticket=effect.ticket, status=transfer.PullStatus.CANCELLED)
        return None

    def _carried(self, effect: object) -> Callable[[int], object] | None:
        """What the other end of the stream hears."""
        match effect:
            case handoff.OpenStream():
                return lambda stream: handoff.OpenReceived(stream, effect.open)
            case handoff.SendRelease():
                return lambda stream: handoff.ReleaseReceived(stream, effect.reason)
            case handoff.DropStream():
                return lambda stream: handoff.StreamLost(stream)
            case handoff.SendAccepted():
                return lambda stream: handoff.StreamAccepted(stream, effect.accepted)
            case handoff.SendAnnounce():
                return lambda stream: handoff.StreamAnnounced(stream, effect.announce)
            case handoff.SendFirstToken():
                return lambda stream: handoff.StreamFirstToken(stream, effect.first_token)
            case handoff.SendComplete():
                return lambda stream: handoff.StreamCompleted(stream, effect.complete)
            case handoff.EndStream() if effect.code is not handoff.EndCode.OK:
                return lambda stream: handoff.StreamClosed(stream, effect.code)
        return None
