"""The replicas of a worker (parallel.data_size): a rank 0 process each, with scheduler, pool and weights of its own.

They start, fail and end as one: the worker is ready when all are, and the death of one is the death of all. The first
replica starts alone, so that it measures the memory of a machine at rest; the others get a pool of its size.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from tandem.config import Config, ParallelConfig, Role, TransferConfig
from tandem.core.messages.worker import AdaptersChanged, RankFailed, RankReady
from tandem.errors import TandemError
from tandem.transfer.memory import common_pages
from tandem.worker.messages import StartRank
from tandem.worker.rank_process import RankProcess

# What every replica must say alike: a request may go to any of them.
_AGREED = (
    "role",
    "loop",
    "model",
    "max_total_num_tokens",
    "max_req_input_len",
    "max_context_tokens",
    "max_running_requests",
    "page_tokens",
    "num_pages",
    "page_bytes",
    "vocab_size",
    "eos_token_ids",
    "fingerprint",
    "numerics",
    "dtype",
    "operators",
    "adapters",
)


class ReplicaSet:
    """One life of all replicas. `exit_code` is done with the first end that ends the worker; `why_ended` says why.

    `receive` gets what a replica says, with its index. A failed start of one is the end of all.
    """

    def __init__(self, role: Role, config: Config, instance_id: bytes, worker_host: str, num_cpus: int) -> None:
        self._role: Role = role
        self._config = config
        self._instance_id = instance_id
        self._worker_host = worker_host
        self._num_cpus = num_cpus
        self._processes: list[RankProcess] = []
        self._heard = [time.monotonic()] * len(self)
        self._ready: dict[int, RankReady] = {}
        self._failed: dict[int, RankFailed] = {}
        self._stopping = False
        self._first_dead = 0
        self.exit_code: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def __len__(self) -> int:
        return self._config.parallel.data_size

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    async def spawn(self, receive: Callable[[int, list[Any]], None], command: Sequence[str] = ()) -> None:
        """Start the processes, which wait to be told who they are. `command` is for tests."""
        for index in range(len(self)):
            process = await RankProcess.spawn(partial(self._receive, index, receive), command)
            process.exit_code.add_done_callback(partial(self._ended, index))
            self._processes.append(process)

    def start(self) -> None:
        """Tell the first replica who it is; the others are told when it is ready."""
        self._tell(0)

    def send(self, replica: int, message: object) -> None:
        """Queue a message for one replica; before `spawn` there is nobody to take it."""
        if self._processes:
            self._processes[replica].send(message)

    def send_all(self, message: object) -> None:
        """Queue a message for every replica."""
        for process in self._processes:
            process.send(message)

    def stop(self, message: object) -> None:
        """Queue the message that ends every replica in order: from now on one that ends well is no news."""
        self._stopping = True
        self.send_all(message)

    def became_ready(self, replica: int, ready: RankReady) -> RankReady | None:
        """A replica serves; return what the worker says of itself if it is the last one.

        Raises TandemError if they do not agree.
        """
        self._ready[replica] = ready
        if replica == 0:
            for other in range(1, len(self)):
                self._tell(other)
        if len(self._ready) < len(self):
            return None
        return merge_ready([self._ready[index] for index in range(len(self))])

    def adapters_changed(self, replica: int, changed: AdaptersChanged) -> AdaptersChanged:
        """A replica serves other adapters; return what every one of them serves, which the worker may promise."""
        self._ready[replica] = replace(self._ready[replica], adapters=changed.adapters)
        everywhere = set.intersection(*(set(ready.adapters) for ready in self._ready.values()))
        return AdaptersChanged(tuple(adapter for adapter in changed.adapters if adapter in everywhere))

    def failed(self, replica: int, failed: RankFailed) -> None:
        """A replica says why it will end."""
        self._failed[replica] = failed

    def give_up(self, replica: int, failed: RankFailed) -> None:
        """End the worker because of a replica that does not know that it is at fault."""
        self._failed.setdefault(replica, failed)
        self._processes[replica].kill()

    def silent_seconds(self) -> list[float]:
        """Return for each replica how long nothing has been heard of it."""
        now = time.monotonic()
        return [now - heard for heard in self._heard]

    def why_ended(self) -> tuple[str, int]:
        """Return why the worker has to end, in words, and the exit code that follows."""
        index = self._first_dead
        name = "rank 0" if len(self) == 1 else f"rank 0 of replica {index}"
        failed = self._failed.get(index)
        if failed is not None:
            return f"{name} failed: {failed.message}", failed.exit_code or 1
        code = self._processes[index].exit_code.result()
        how = f"by signal {-code}" if code < 0 else f"with code {code}"
        last_words = self._processes[index].last_words()
        return f"{name} ended {how}" + (f"; it said last:\n{last_words}" if last_words else ""), 1

    @property
    def ended_well(self) -> bool:
        """Whether every replica has ended in order."""
        return self.exit_code.done() and self.exit_code.result() == 0 and not self._failed

    async def close(self) -> None:
        """Kill what still runs and reap it."""
        for process in self._processes:
            process.kill()
        await asyncio.gather(*(process.close() for process in self._processes))

    def _tell(self, replica: int) -> None:
        config = replica_config(self._config, replica, self._num_cpus, self._ready.get(0))
        start = StartRank(
            role=self._role,
            config=config,
            instance_id=importer_id(self._instance_id, replica),
            worker_host=self._worker_host,
            replica=replica if len(self) > 1 else None,
        )
        self._processes[replica].send(start)

    def _receive(self, replica: int, receive: Callable[[int, list[Any]], None], messages: list[Any]) -> None:
        self._heard[replica] = time.monotonic()
        receive(replica, messages)

    def _ended(self, replica: int, ended: asyncio.Future[int]) -> None:
        if self.exit_code.done() or ended.cancelled():
            return
        code = ended.result()
        well = code == 0 and replica not in self._failed and self._stopping
        if well and not all(process.exit_code.done() for process in self._processes):
            return
        self._first_dead = replica
        self.exit_code.set_result(code)


def importer_id(instance_id: bytes, replica: int) -> bytes:
    """Return the name under which a replica imports: prefill caps what each scheduler pins, not each worker."""
    return instance_id[:-1] + bytes([(instance_id[-1] + replica) % 256])


def replica_config(config: Config, replica: int, num_cpus: int, first: RankReady | None) -> Config:
    """Return the settings of one replica: its share of threads and memory, ports and devices of its own.

    Its data_size is how many replicas a device has to hold besides, itself included: the first one leaves them room,
    the others, given what `first` is, take the same pool.
    """
    size = config.parallel.data_size
    if size == 1:
        return config
    model = replace(config.model, threads=max(1, (config.model.threads or num_cpus) // size))
    cache = replace(
        config.cache,
        pool_bytes=config.cache.pool_bytes // size,
        pool_bytes_max=config.cache.pool_bytes_max // size,
    )
    parallel = _replica_parallel(config.parallel, replica)
    if first is not None:
        cache = replace(cache, pool_bytes=first.num_pages * first.page_bytes)
        parallel = replace(parallel, data_size=1)
    return replace(config, model=model, cache=cache, parallel=parallel, transfer=_replica_transfer(config, replica))


def _replica_parallel(parallel: ParallelConfig, replica: int) -> ParallelConfig:
    """Devices are named for the ranks of each replica in turn, or for those of one: then all replicas share them."""
    num_ranks = parallel.tensor_size * parallel.pipeline_size
    named = parallel.devices
    if len(named) <= num_ranks:
        return parallel
    own = named[replica * num_ranks : (replica + 1) * num_ranks]
    lodgers = max(sum(name == device for name in named) // own.count(device) for device in own)
    return replace(parallel, devices=own, data_size=lodgers)


def _replica_transfer(config: Config, replica: int) -> TransferConfig:
    """The ranks of a replica take the ports after its first one."""
    transfer, parallel = config.transfer, config.parallel
    offset = replica * parallel.tensor_size * parallel.pipeline_size
    host, colon, port = transfer.advertise_address.rpartition(":")
    return replace(
        transfer,
        port=transfer.port + offset if transfer.port else 0,
        advertise_address=f"{host}{colon}{int(port) + offset}" if transfer.advertise_address else "",
    )


def merge_ready(readies: Sequence[RankReady]) -> RankReady:
    """Return what a worker of these replicas is; raises TandemError if they are not alike.

    Pages and running requests are sums; what bounds one request is that of each replica.
    """
    first = readies[0]
    for index, other in enumerate(readies):
        for name in _AGREED:
            if getattr(other, name) != getattr(first, name):
                raise TandemError(
                    f"replica {index} is not like replica 0: {name} {getattr(other, name)!r}, not "
                    f"{getattr(first, name)!r}"
                )
    names = [{endpoint.transport for endpoint in ready.endpoints} for ready in readies]
    return replace(
        first,
        data_size=len(readies),
        num_pages=sum(ready.num_pages for ready in readies),
        max_running_requests=sum(ready.max_running_requests for ready in readies),
        weight_bytes=sum(ready.weight_bytes for ready in readies),
        pool_pages=common_pages(ready.pool_pages for ready in readies),
        endpoints=tuple(end for end in first.endpoints if all(end.transport in each for each in names)),
        imports=tuple(name for name in first.imports if all(name in ready.imports for ready in readies)),
        transport_notes=tuple(dict.fromkeys(note for ready in readies for note in ready.transport_notes)),
        startup_seconds=first.startup_seconds + max((other.startup_seconds for other in readies[1:]), default=0.0),
    )
