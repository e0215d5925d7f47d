"""Several rank processes as one worker: their start in order, what they must agree on, and every way for one to end."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from tandem.config import CacheConfig, Config, ModelConfig, ParallelConfig, TransferConfig
from tandem.core.messages.handoff import RankEndpoint
from tandem.core.messages.requests import Drain
from tandem.core.messages.worker import AdapterInfo, AdaptersChanged, RankFailed
from tandem.errors import TandemError
from tandem.worker.replica_set import ReplicaSet, merge_ready, replica_config
from tests.worker.streams import rank_ready

SOON = 12.0  # the wrong way takes 60
WORKER_ID = bytes(15) + b"\xff"
# A rank that says who it was told to be, and does with further messages what its index is scripted to do.
RANK = """
import select, socket, sys, time
from tandem.ipc import Channel
from tandem.core.messages.worker import RankFailed, StartupProgress
from tandem.worker.messages import TO_FRONTEND, TO_RANK
channel = Channel(socket.socket(fileno=int(sys.argv[1])), TO_FRONTEND, TO_RANK)
def say(message):
    channel.send(message); channel.flush()
def hear():
    select.select([channel], [], []); return channel.receive()
(start,) = hear()
say(StartupProgress(f"{start.replica} {start.instance_id[-1]} {start.config.model.threads}"))
replica = start.replica or 0
"""


def config(size: int = 2, **parts: Any) -> Config:
    return Config(parallel=ParallelConfig(data_size=size), **parts)


@asynccontextmanager
async def running(script: str, size: int = 2) -> AsyncIterator[tuple[ReplicaSet, list[tuple[int, str]]]]:
    """Scripted replicas, all started; yields them and what they said."""
    said: list[tuple[int, str]] = []
    replicas = ReplicaSet("unified", config(size), WORKER_ID, "127.0.0.1", 8)

    def receive(replica: int, messages: list[Any]) -> None:
        for message in messages:
            if isinstance(message, RankFailed):
                replicas.failed(replica, message)
            else:
                said.append((replica, message.message))

    try:
        await replicas.spawn(receive, [sys.executable, "-c", RANK + textwrap.dedent(script)])
        replicas.start()
        async with asyncio.timeout(30.0):
            while len(said) < 1:
                await asyncio.sleep(0.01)
            assert not any(replica for replica, _ in said), "the first one starts alone"
            for number in range(size):
                assert (replicas.became_ready(number, rank_ready("unified")) is None) == (number < size - 1)
                while len({replica for replica, _ in said}) < size:
                    await asyncio.sleep(0.01)
        yield replicas, said
    finally:
        await replicas.close()


async def end_of(replicas: ReplicaSet) -> tuple[int, float]:
    began = asyncio.get_running_loop().time()
    async with asyncio.timeout(30.0):
        code = await asyncio.shield(replicas.exit_code)
    return code, asyncio.get_running_loop().time() - began


def test_each_is_told_who_it_is_and_all_end_together() -> None:
    async def scenario() -> None:
        async with running("hear(); time.sleep(0.3 * replica)", size=3) as (replicas, said):
            assert sorted(said) == [(0, "0 255 2"), (1, "1 0 2"), (2, "2 1 2")]
            began = asyncio.get_running_loop().time()
            replicas.stop(Drain(0.0))
            code, _ = await end_of(replicas)
            assert code == 0 and replicas.ended_well
            took = asyncio.get_running_loop().time() - began
            assert took >= 0.5, "the first to end well is no news while others have work"

    asyncio.run(scenario())


@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_one_is_the_end_with_its_reason(victim: int) -> None:
    async def scenario() -> None:
        async with running("time.sleep(60)") as (replicas, _):
            os.kill(replicas.pids[victim], signal.SIGKILL)
            code, seconds = await end_of(replicas)
            assert (code, seconds < SOON) == (-signal.SIGKILL, True)
            assert replicas.why_ended() == (f"rank 0 of replica {victim} ended by signal 9", 1)
            assert not replicas.ended_well
            began = asyncio.get_running_loop().time()
            await replicas.close()
            assert asyncio.get_running_loop().time() - began < SOON
            for pid in replicas.pids:
                with pytest.raises(ProcessLookupError):
                    os.kill(pid, 0)

    asyncio.run(scenario())


def test_a_failure_that_is_told_has_its_words_and_code() -> None:
    async def scenario() -> None:
        script = "say(RankFailed('no memory', 2)) if replica == 1 else time.sleep(60)"
        async with running(script) as (replicas, _):
            await end_of(replicas)
            assert replicas.why_ended() == ("rank 0 of replica 1 failed: no memory", 2)

    asyncio.run(scenario())


@pytest.mark.parametrize("code", [0, 3])
def test_an_end_that_nobody_asked_for_is_a_death(code: int) -> None:
    async def scenario() -> None:
        async with running(f"sys.exit({code}) if replica else time.sleep(60)") as (replicas, _):
            assert (await end_of(replicas))[0] == code
            assert replicas.why_ended() == (f"rank 0 of replica 1 ended with code {code}", 1)
            assert replicas.ended_well == (code == 0)

    asyncio.run(scenario())


def test_a_death_during_a_drain_does_not_wait_for_the_others() -> None:
    async def scenario() -> None:
        async with running("hear(); time.sleep(60) if replica else sys.exit(7)") as (replicas, _):
            replicas.stop(Drain(60.0))
            code, seconds = await end_of(replicas)
            assert (code, seconds < SOON) == (7, True)
            assert not replicas.ended_well

    asyncio.run(scenario())


def test_every_loop_is_listened_to() -> None:
    async def scenario() -> None:
        script = "\nwhile replica == 0: say(StartupProgress('here')); time.sleep(0.02)\ntime.sleep(60)"
        async with running(script) as (replicas, _):
            async with asyncio.timeout(30.0):
                while not (silent := replicas.silent_seconds())[0] < 0.5 < silent[1]:
                    await asyncio.sleep(0.05)

    asyncio.run(scenario())


def test_a_worker_with_one_replica_speaks_of_rank_0() -> None:
    async def scenario() -> None:
        async with running("time.sleep(60)", size=1) as (replicas, said):
            assert said == [(0, "None 255 0")]
            os.kill(replicas.pids[0], signal.SIGKILL)
            await end_of(replicas)
            assert replicas.why_ended()[0] == "rank 0 ended by signal 9"

    asyncio.run(scenario())


def test_pages_are_summed_and_bounds_are_those_of_each() -> None:
    def ready(*transports: str, **changes: Any) -> Any:
        endpoints = tuple(RankEndpoint(transport=name, address="a:1", instance_id=b"i" * 16) for name in transports)
        return rank_ready("prefill", endpoints=endpoints, **changes)

    one = ready("mooncake-tcp", "tcp", transport_notes=("a",), startup_seconds=1.0)
    other = ready("tcp", transport_notes=("a", "b"), startup_seconds=3.0)
    merged = merge_ready([one, other, other])
    assert (merged.num_pages, merged.max_running_requests, merged.weight_bytes) == (768, 24, 3)
    assert (merged.max_total_num_tokens, merged.max_req_input_len, merged.max_context_tokens) == (1024, 63, 64)
    assert [endpoint.transport for endpoint in merged.endpoints] == ["tcp"], "what every replica has"
    assert (merged.transport_notes, merged.data_size, merged.startup_seconds) == (("a", "b"), 3, 4.0)
    assert merge_ready([one]) == one
    assert merge_ready([one, replace(one, pool_pages="huge")]).pool_pages == "mixed", "no reason to end"
    for name, value in (("fingerprint", "g"), ("num_pages", 255), ("numerics", "n"), ("operators", "x")):
        with pytest.raises(TandemError, match=f"replica 1 is not like replica 0: {name}"):
            merge_ready([one, replace(one, **{name: value})])


def test_an_adapter_is_served_once_every_replica_has_it() -> None:
    async def scenario() -> None:
        one, other = AdapterInfo("one", "1"), AdapterInfo("other", "2")
        async with running("time.sleep(60)") as (replicas, _):
            assert replicas.adapters_changed(0, AdaptersChanged((one,))).adapters == ()
            assert replicas.adapters_changed(1, AdaptersChanged((one, other))).adapters == (one,)
            assert replicas.adapters_changed(0, AdaptersChanged((one, other))).adapters == (one, other)
            renewed = AdapterInfo("one", "3")
            assert replicas.adapters_changed(0, AdaptersChanged((renewed, other))).adapters == (other,)

    asyncio.run(scenario())


def test_threads_memory_and_ports_are_shared_out() -> None:
    whole = config(
        3,
        model=ModelConfig(threads=7),
        cache=CacheConfig(pool_bytes=0, pool_bytes_max=3 << 30),
        transfer=TransferConfig(port=50052, advertise_address="[fd00::1]:7000"),
    )
    first, last = (replica_config(whole, index, 8, None) for index in (0, 2))
    assert first.model.threads == 2
    assert first.cache.pool_bytes_max == 1 << 30
    assert (first.transfer.port, first.transfer.advertise_address) == (50052, "[fd00::1]:7000")
    assert (last.transfer.port, last.transfer.advertise_address) == (50054, "[fd00::1]:7002")
    assert first.parallel.data_size == 3, "the first reckons with the weights of all"
    sized = replica_config(whole, 1, 8, rank_ready("prefill"))
    assert (sized.cache.pool_bytes, sized.parallel.data_size) == (256 * 64, 1)
    given = replica_config(replace(whole, cache=CacheConfig(pool_bytes=90)), 0, 8, None)
    assert given.cache.pool_bytes == 30
    assert replica_config(replace(whole, model=ModelConfig(threads=0)), 0, 8, None).model.threads == 2
    assert replica_config(replace(whole, model=ModelConfig(threads=1)), 0, 8, None).model.threads == 1


def test_devices_are_named_for_each_replica_or_shared() -> None:
    def of(*devices: str, size: int = 2, replica: int = 1) -> tuple[tuple[str, ...], int]:
        parallel = ParallelConfig(data_size=size, tensor_size=2, devices=devices)
        own = replica_config(Config(parallel=parallel), replica, 8, None).parallel
        return own.devices, own.data_size

    assert of() == ((), 2)
    assert of("cuda:0", "cuda:1") == (("cuda:0", "cuda:1"), 2), "both replicas are on both"
    assert of("cuda:0", "cuda:1", "cuda:2", "cuda:3") == (("cuda:2", "cuda:3"), 1)
    assert of("cuda:0", "cuda:1", "cuda:2", "cuda:3", replica=0) == (("cuda:0", "cuda:1"), 1)
    assert of("cpu", "cpu", "cpu", "cpu") == (("cpu", "cpu"), 2)
    assert of("cuda:0", "cuda:1", "cuda:2", "cuda:0") == (("cuda:2", "cuda:0"), 2)


def test_a_worker_of_one_replica_keeps_its_settings() -> None:
    alone = config(1, model=ModelConfig(threads=0))
    assert replica_config(alone, 0, 8, None) is alone
