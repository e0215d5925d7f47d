"""A follower: one of a worker's ranks that do not plan. It executes rank 0's plans in order and says when each is done.

Its process has the parts of rank 0's, a device and a tie to a transfer process of its own, and no scheduler. It lives
exactly as long as rank 0's end of its channel.
"""

from __future__ import annotations

import logging
import mmap
import select
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tandem.collector import keep_what_is_here
from tandem.core.messages.handoff import Sharding
from tandem.core.messages.plans import Plan
from tandem.core.messages.worker import StartupProgress
from tandem.core.sharding import rank_part
from tandem.engine.collectives import Meeting
from tandem.engine.device import DeviceFailed
from tandem.engine.place import RankPlace
from tandem.engine.start import Engine, start_engine
from tandem.engine.wire import CollectiveFailed
from tandem.errors import ConfigError, TandemError
from tandem.ipc import Channel, ChannelClosed
from tandem.transfer.choice import check_transport
from tandem.worker.follower_messages import Beat, FollowerFailed, FollowerReady, StartFollower
from tandem.worker.transfer_link import TransferLink
from tandem.worker.transfer_start import own_link

BEAT_SECONDS = 1.0
FINISH_SECONDS = 1.0  # for rank 0 to take the last message
_logger = logging.getLogger(__name__)


def serve(start: StartFollower, leader: Channel, on_ready: Callable[[FollowerReady], None] = lambda ready: None) -> int:
    """Run a follower to its end and return the process's exit code; faults go to rank 0 as FollowerFailed."""
    try:
        _serve(start, leader, on_ready)
    except ChannelClosed:
        return 0  # rank 0 is gone: nobody is left to tell
    except CollectiveFailed as error:
        return _fail(leader, FollowerFailed(error.message, by_others=True))
    except ConfigError as error:
        return _fail(leader, FollowerFailed(error.message, exit_code=2))
    except TandemError as error:
        return _fail(leader, FollowerFailed(error.message))
    except Exception as error:
        _logger.exception("rank %d failed", start.rank)
        return _fail(leader, FollowerFailed(f"{type(error).__name__}: {error}"))
    return 0


def meeting_of(start: StartFollower) -> Meeting:
    parallel = start.config.parallel
    return Meeting(
        host=start.meeting_host,
        port=start.meeting_port,
        own_host=start.own_host,
        start_seconds=parallel.start_seconds,
        collective_seconds=parallel.collective_seconds,
    )


def resident_bytes() -> int:
    """Memory of this process that is its own or shared with others, as far as it was touched."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def _serve(start: StartFollower, leader: Channel, on_ready: Callable[[FollowerReady], None]) -> None:
    def progress(message: str) -> None:
        leader.send(StartupProgress(message))
        leader.flush()

    parallel = start.config.parallel
    place = RankPlace(start.rank, Sharding(parallel.tensor_size, parallel.pipeline_size))
    if start.role != "unified":
        check_transport(start.config.transfer)
    engine = start_engine(start.config, progress, place, meeting_of(start))
    link: TransferLink | None = None
    try:
        if start.role != "unified":
            link = own_link(start.config, start.worker_host, engine)
        keep_what_is_here()
        ready = ready_of(engine, place)
        leader.send(ready)
        on_ready(ready)
        _Follower(leader, engine, link).run()
    finally:
        if link is not None:
            link.stop()


def ready_of(engine: Engine, place: RankPlace) -> FollowerReady:
    spec, sharding = engine.spec, place.sharding
    part = rank_part(spec.num_layers, spec.num_kv_heads, sharding, place.tensor_rank, place.pipeline_rank)
    return FollowerReady(
        first_layer=part.first_layer,
        num_layers=part.num_layers,
        first_head=part.first_head,
        num_heads=part.num_heads,
        weight_bytes=engine.weight_bytes,
        pool_bytes=engine.layout.pool_bytes,
        pool_pages=engine.memory.pages,
        resident_bytes=resident_bytes(),
    )


def _fail(leader: Channel, failed: FollowerFailed) -> int:
    _logger.error("%s", failed.message)
    try:
        leader.send(failed)
        deadline = time.monotonic() + FINISH_SECONDS
        while leader.pending_bytes and time.monotonic() < deadline:
            leader.flush()
            select.select([], [leader], [], FINISH_SECONDS)
    except ChannelClosed:
        pass
    return failed.exit_code


class _Follower:
    """The loop of a follower: one selector over rank 0's channel, the device, and the transfer process."""

    def __init__(self, leader: Channel, engine: Engine, link: TransferLink | None) -> None:
        self._leader = leader
        self._device = engine.device
        self._link = link

    def run(self) -> None:
        """Serve until the channel ends, which is ChannelClosed, or something fails."""
        while True:
            for outcome in self._link.advance() if self._link is not None else ():
                self._leader.send(outcome)
            self._leader.flush()
            readable = self._wait()
            if self._leader in readable:
                for message in self._leader.receive():
                    self._obey(message)
            if self._device in readable:
                self._report()
            if self._link is not None:
                self._link.flush()
                for outcome in self._link.receive():
                    self._leader.send(outcome)
            if not readable and self._device.unresolved:
                self._leader.send(Beat())

    def _wait(self) -> list[Any]:
        link = self._link
        sources: list[Any] = [self._leader, self._device]
        writers: list[Any] = [self._leader] if self._leader.pending_bytes else []
        due = link.next_due() if link is not None else None
        if link is not None and link.channel is not None:
            sources.append(link.channel)
            writers += [link.channel] if link.channel.pending_bytes else []
        seconds = BEAT_SECONDS if self._device.unresolved else None
        if due is not None:
            until_due = max(0.0, due - time.monotonic())
            seconds = until_due if seconds is None else min(seconds, until_due)
        readable, writable, _ = select.select(sources, writers, [], seconds)
        return [*readable, *writable]

    def _obey(self, message: Any) -> None:
        if isinstance(message, Plan):
            self._device.launch(message)
            return
        assert self._link is not None, "this role hands nothing over"
        self._link.send(message)

    def _report(self) -> None:
        try:
            for resolved in self._device.resolved():
                self._leader.send(resolved)
        except DeviceFailed as failed:
            if isinstance(failed.__cause__, CollectiveFailed):
                raise failed.__cause__ from failed
            raise
