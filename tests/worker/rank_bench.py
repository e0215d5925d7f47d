"""A rank without a model or a process: the real loop, ports and scheduler in a thread, with a counting device.

The test holds the frontend's end of the pipe.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tandem.config import Role
from tandem.core.messages.handoff import Sharding
from tandem.core.messages.requests import Drain, Ended, Submit, Tokens
from tandem.core.messages.sampling import SamplingParams
from tandem.core.roles import Pacing, loop_of
from tandem.core.scheduler import Scheduler
from tandem.core.settings import SchedulerSettings
from tandem.core.token_ids import pack
from tandem.ipc import Channel
from tandem.transfer.layout import KvLayout
from tandem.worker.chores import Chores
from tandem.worker.loop import run
from tandem.worker.messages import TO_FRONTEND, TO_RANK
from tandem.worker.ports import RankPorts
from tandem.worker.transfer_group import TransferGroup
from tandem.worker.transfer_link import TransferLink
from tests.fakes.device import CountingDevice

VOCAB_SIZE = 1000
_Message = TypeVar("_Message")


class RankBench:
    """`received` is everything that came through the pipe, in order."""

    def __init__(
        self, role: Role, loop: Pacing, device: CountingDevice, link: Callable[[CountingDevice], TransferLink] | None
    ) -> None:
        ours, theirs = socket.socketpair()
        self.channel = Channel(ours, TO_RANK, TO_FRONTEND)
        self.received: list[Any] = []
        self.error: BaseException | None = None
        self.device = device
        self.num_turns = 0
        row = loop_of(role, loop)
        settings = SchedulerSettings(
            role=role,
            chain=row.chain,
            num_pages=64,
            page_tokens=4,
            max_context_tokens=128,
            vocab_size=VOCAB_SIZE,
        )
        self.scheduler = Scheduler(settings, lambda: b"t" * 16)
        self._rank_end = Channel(theirs, TO_FRONTEND, TO_RANK)
        self.link = link(device) if link is not None else None
        self.ports = RankPorts(self._rank_end, device, self._group(), time.monotonic)
        self._depth = row.depth
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _group(self) -> TransferGroup | None:
        model = KvLayout(num_pages=64, num_layers=1, num_kv_heads=1, page_tokens=4, head_dim=1, dtype="float32")
        return TransferGroup([self.link], model, Sharding()) if self.link is not None else None

    def _run(self) -> None:
        wait = self.ports.wait

        def counted(until: float | None) -> list[object]:
            self.num_turns += 1
            return wait(until)

        self.ports.wait = counted  # type: ignore[method-assign]
        try:
            run(
                self.scheduler,
                self.device,
                self.ports,
                time.monotonic,
                self._depth,
                Chores(self.ports.send, time.monotonic),
            )
            self.ports.finish(5.0)
        except BaseException as error:
            self.error = error
        finally:
            self._rank_end.close()

    def send(self, *messages: object) -> None:
        for message in messages:
            self.channel.send(message)
        self.channel.flush()

    def submit(self, request_id: int, prompt: list[int], max_tokens: int, **options: Any) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        self.send(Submit(request_id=request_id, prompt_token_ids=pack(prompt), sampling=sampling, **options))

    def read_until(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            left = deadline - time.monotonic()
            assert left > 0, self.received
            if select.select([self.channel], [], [], left)[0]:
                self.received += self.channel.receive()

    def of(self, kind: type[_Message]) -> list[_Message]:
        return [message for message in self.received if isinstance(message, kind)]

    def output(self, request_id: int) -> list[int]:
        """The tokens of a request, whose indexes must be gapless."""
        output: list[int] = []
        for tokens in self.of(Tokens):
            if tokens.request_id == request_id:
                assert tokens.first_index == len(output)
                output += tokens.token_ids
        return output

    def ended(self, request_id: int) -> list[Ended]:
        return [ended for ended in self.of(Ended) if ended.request_id == request_id]

    def join(self) -> None:
        self.thread.join(10.0)
        assert not self.thread.is_alive()


@contextmanager
def running_rank(
    role: Role = "unified",
    loop: Pacing = "overlap",
    device: CountingDevice | None = None,
    link: Callable[[CountingDevice], TransferLink] | None = None,
) -> Iterator[RankBench]:
    bench = RankBench(role, loop, device or CountingDevice(VOCAB_SIZE), link)
    bench.thread.start()
    try:
        yield bench
        if bench.thread.is_alive():
            bench.send(Drain(0.0))
            bench.join()
    finally:
        bench.channel.close()
        bench.thread.join(10.0)
        if bench.link is not None:
            bench.link.stop()
        bench.device.close()
