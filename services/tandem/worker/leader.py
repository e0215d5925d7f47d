"""Rank 0's start: alone, or together with the followers that share its model."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tandem.config import Config, ParallelConfig, Role
from tandem.core.messages.handoff import Sharding
from tandem.core.messages.transfer import TransferOutcome
from tandem.engine.place import RankPlace
from tandem.engine.start import Engine, start_engine
from tandem.engine.wire import listen_store
from tandem.ipc import Channel
from tandem.transfer.memory import common_pages, describe_pages
from tandem.worker.follower import meeting_of, ready_of
from tandem.worker.follower_messages import FROM_FOLLOWER, TO_FOLLOWER, FollowerReady, StartFollower
from tandem.worker.follower_process import Follower
from tandem.worker.followers import Followers
from tandem.worker.ranked_device import RankedDevice
from tandem.worker.rendezvous import accept, listen, rank_key, split_address

LOCAL_HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Ranks:
    """All ranks of a worker as one engine, whose layout is rank 0's, and the links to the followers' transfers."""

    engine: Engine
    weight_bytes: int  # of all ranks
    pool_pages: str  # that their pools lie in
    links: tuple[FollowerLink, ...] = ()

    @property
    def page_bytes(self) -> int:
        """A page in all ranks' pools."""
        spec = self.engine.spec
        layout = replace(self.engine.layout, num_layers=spec.num_layers, num_kv_heads=spec.num_kv_heads)
        return layout.page_bytes


class FollowerLink:
    """The way to a follower's transfer process: `transfer_group.RankLink` over the channel that plans take, too."""

    def __init__(self, followers: Followers, rank: int) -> None:
        self._followers = followers
        self._rank = rank
        self._inbox = followers.inbox(rank)
        self.channel = self._inbox

    def next_due(self) -> float | None:
        return None

    def advance(self) -> list[TransferOutcome]:
        """Nobody else listens before the loop turns."""
        self._followers.listen()
        return []

    def send(self, command: object) -> None:
        self._followers.send(command, self._rank)

    def flush(self) -> None:
        """Sent at once; what the channel does not take, it takes when the device is asked for results."""

    def receive(self) -> list[TransferOutcome]:
        return self._inbox.take()

    def stop(self) -> None:
        """The follower ends its transfer process, when its channel ends."""


def start_ranks(
    role: Role, config: Config, worker_host: str, others: Sequence[Follower], progress: Callable[[str], None]
) -> Ranks:
    """Start rank 0's engine together with the other ranks. Raises what start_engine raises, and RankLost.

    `progress` may be called from two threads at once.
    """
    parallel = config.parallel
    place = RankPlace(0, Sharding(parallel.tensor_size, parallel.pipeline_size))
    if place.num_ranks == 1:
        engine = start_engine(config, progress)
        return Ranks(engine, engine.weight_bytes, engine.memory.pages)
    followers = Followers((*others, *_from_elsewhere(config, place.num_ranks, progress)), progress)
    try:
        host = _own_host(parallel)
        with socket.create_server((host, 0)) as listener:
            port = listener.getsockname()[1]
            followers.keep(listen_store(os.dup(listener.fileno()), host, port, parallel.start_seconds))
        first = StartFollower(
            role=role,
            config=config,
            rank=0,
            meeting_host=host,
            meeting_port=port,
            own_host=host,
            worker_host=worker_host,
        )
        followers.start(
            [replace(first, rank=follower.rank, config=_config_of(config, follower.rank)) for follower in followers]
        )
        engine = followers.during(lambda: start_engine(config, progress, place, meeting_of(first)))
        ready = {0: ready_of(engine, place)} | followers.wait_ready(parallel.start_seconds)
    except BaseException:
        followers.close(at_once=True)
        raise
    for rank, own in sorted(ready.items()):
        progress(f"rank {rank}: {_holds(own)}")
    device = RankedDevice(engine.device, followers, place.drawing_rank, parallel.collective_seconds)
    links = tuple(FollowerLink(followers, follower.rank) for follower in followers)
    num_bytes = sum(own.weight_bytes for own in ready.values())
    pages = common_pages(own.pool_pages for own in ready.values())
    return Ranks(replace(engine, device=device), num_bytes, pages, links)


def _own_host(parallel: ParallelConfig) -> str:
    """Where other ranks reach those of this host."""
    if not parallel.remote_ranks:
        return LOCAL_HOST
    return parallel.host or split_address(parallel.rendezvous)[0]


def _from_elsewhere(config: Config, num_ranks: int, progress: Callable[[str], None]) -> list[Follower]:
    """Wait for the ranks that others start. Raises ConfigError or Unavailable."""
    parallel = config.parallel
    ranks = range(num_ranks - parallel.remote_ranks, num_ranks)
    if not ranks:
        return []
    key = rank_key(parallel)
    with listen(parallel.rendezvous) as listener:
        progress(f"waiting at {parallel.rendezvous} for ranks {ranks.start} to {ranks.stop - 1}")
        found = accept(listener, ranks, key, parallel.start_seconds)
    return [
        Follower(rank, Channel(connection, TO_FOLLOWER, FROM_FOLLOWER), where)
        for rank, (connection, where) in sorted(found.items())
    ]


def _config_of(config: Config, rank: int) -> Config:
    """A follower's transfer process takes the port after that of the rank before it."""
    transfer = config.transfer
    host, _, port = transfer.advertise_address.rpartition(":")
    return replace(
        config,
        transfer=replace(
            transfer,
            port=transfer.port + rank if transfer.port else 0,
            advertise_address=f"{host}:{int(port) + rank}" if port else "",
        ),
    )


def _holds(ready: FollowerReady) -> str:
    return (
        f"layers {ready.first_layer} to {ready.first_layer + ready.num_layers - 1}, "
        f"KV heads {ready.first_head} to {ready.first_head + ready.num_heads - 1}, "
        f"{ready.weight_bytes / 1e6:.1f} MB of weights, a pool of {ready.pool_bytes / 1e6:.1f} MB "
        f"in {describe_pages(ready.pool_pages)}, "
        f"{ready.resident_bytes / 1e6:.0f} MB resident"
    )
