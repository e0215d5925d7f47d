"""A follower that somebody else than rank 0 starts, on a host of its own: `tandem ROLE --parallel.rank N`.

It dials rank 0, whose settings count, but for what belongs to this host: the checkpoint's place, device, threads,
certificates, ports and addresses. It ends with rank 0, and then starts anew with the next one only if its supervisor
starts it again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from tandem.config import Config, Role
from tandem.errors import TandemError
from tandem.ipc import Channel, ChannelClosed
from tandem.worker.follower_main import first_message
from tandem.worker.follower_messages import (
    FROM_FOLLOWER,
    TO_FOLLOWER,
    FollowerFailed,
    FollowerReady,
    StartFollower,
)
from tandem.worker.rendezvous import dial, rank_key, split_address

_logger = logging.getLogger(__name__)


def follow(role: Role, config: Config, on_ready: Callable[[FollowerReady], None]) -> int:
    """Be the rank that `config` names until rank 0 ends; returns the exit code. Raises ConfigError."""
    parallel = config.parallel
    key = rank_key(parallel)
    _logger.info("rank %d looks for rank 0 at %s", parallel.rank, parallel.rendezvous)
    try:
        connection = dial(parallel.rendezvous, parallel.rank, key, parallel.start_seconds)
    except TandemError as error:
        _logger.error("%s", error.message)
        return 1
    own_host = parallel.host or connection.getsockname()[0]
    leader = Channel(connection, FROM_FOLLOWER, TO_FOLLOWER)
    try:
        start = first_message(leader)
        if start.role != role:
            message = f"it was started as {role}, and rank 0 is {start.role}"
            leader.send(FollowerFailed(message, exit_code=2))
            leader.flush()
            _logger.error("%s", message)
            return 2
    except ChannelClosed as error:
        _logger.error("rank 0 is gone: %s", error)
        return 1
    from tandem.worker.follower import serve

    code = serve(_with_own(start, config, own_host), leader, on_ready)
    if code == 0:
        _logger.info("rank 0 has ended, and so does rank %d", parallel.rank)
    return code


def _with_own(start: StartFollower, own: Config, own_host: str) -> StartFollower:
    theirs = start.config
    num_ranks = theirs.parallel.tensor_size * theirs.parallel.pipeline_size
    return replace(
        start,
        rank=own.parallel.rank,
        meeting_host=split_address(own.parallel.rendezvous)[0],
        own_host=own_host,
        worker_host=own.server.advertise_host or own_host,
        config=replace(
            theirs,
            model=replace(own.model, dtype=theirs.model.dtype, max_context_tokens=theirs.model.max_context_tokens),
            parallel=replace(
                theirs.parallel,
                rank=own.parallel.rank,
                devices=own.parallel.devices or theirs.parallel.devices,
                remote_ranks=num_ranks - 1,  # seen from here: this host's threads and memory are this rank's
            ),
            transfer=own.transfer,
            server=own.server,
            tls=own.tls,
        ),
    )
