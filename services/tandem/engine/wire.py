"""A group of ranks that send each other tensors: torch.distributed's gloo, or NCCL between GPUs, behind one small face.

gloo's waits block, nothing spins. Every wait has a bound. What goes beyond it, or a peer that is gone, is
CollectiveFailed, after which a rank is of no use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from tandem.errors import TandemError

_distributed: Any = torch.distributed  # which names it has depends on how torch was built


class CollectiveFailed(TandemError):
    """Another rank is gone, or has not taken part in time."""


class Wire:
    """One process group. All of its ranks call the same, in the same order; sends and receives are paired.

    `staged`: tensors are on a GPU and travel by way of the host.
    """

    def __init__(self, group: Any, name: str, *, staged: bool) -> None:
        self._group = group
        self._name = name
        self._staged = staged

    def all_gather(self, outputs: torch.Tensor, inputs: torch.Tensor) -> None:
        """[n] of each rank -> [ranks * n], in the order of the ranks."""
        with self._named():
            if not self._staged:
                self._group._allgather_base(outputs, inputs).wait()
                return
            host = torch.empty(outputs.shape, dtype=outputs.dtype)
            self._group._allgather_base(host, inputs.cpu()).wait()
            outputs.copy_(host)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Give the first rank's tensor to all, in place."""
        with self._named():
            host = tensor.cpu() if self._staged else tensor
            self._group.broadcast([host], _distributed.BroadcastOptions()).wait()
            if self._staged:
                tensor.copy_(host)

    def start_send(self, tensor: torch.Tensor, rank: int) -> Sending:
        """Send to a rank. The tensor is neither written nor freed before the result is finished."""
        with self._named():
            host = tensor.cpu() if self._staged else tensor
            return Sending(self, self._group.send([host], rank, 0), host)

    def send(self, tensor: torch.Tensor, rank: int) -> None:
        self.start_send(tensor, rank).finish()

    def receive(self, tensor: torch.Tensor, rank: int) -> None:
        """Fill a tensor with what a rank sends."""
        with self._named():
            host = torch.empty(tensor.shape, dtype=tensor.dtype) if self._staged else tensor
            self._group.recv([host], rank, 0).wait()
            if self._staged:
                tensor.copy_(host)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise CollectiveFailed(f"{self._name}: {_reason(error)}") from error


class Sending:
    """A tensor on its way. Holds it until it has arrived."""

    def __init__(self, wire: Wire, work: Any, tensor: torch.Tensor) -> None:
        self._wire = wire
        self._work = work
        self._tensor = tensor

    @property
    def is_done(self) -> bool:
        return bool(self._work.is_completed())

    def finish(self) -> None:
        with self._wire._named():
            self._work.wait()


def listen_store(fd: int, host: str, port: int, seconds: float) -> Any:
    """Serve the place where ranks meet on a socket that listens at host:port; takes the descriptor over."""
    bound = timedelta(seconds=seconds)
    return _distributed.TCPStore(host, port, None, True, bound, wait_for_workers=False, master_listen_fd=fd)


def find_store(host: str, port: int, seconds: float) -> Any:
    """Connect to the place where ranks meet."""
    try:
        return _distributed.TCPStore(host, port, None, False, timedelta(seconds=seconds), wait_for_workers=False)
    except RuntimeError as error:
        raise CollectiveFailed(f"rank 0 was not reached at {host}:{port}: {_reason(error)}") from error


def gloo_group(store: Any, name: str, rank: int, size: int, host: str, seconds: float) -> Any:
    """Tie `size` ranks together, this one reachable at `host`. Every later wait may take `seconds`."""
    options = _distributed.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=seconds)
    try:
        options._devices = [_distributed.ProcessGroupGloo.create_device(hostname=host)]
        return _distributed.ProcessGroupGloo(_distributed.PrefixStore(name, store), rank, size, options)
    except RuntimeError as error:
        raise CollectiveFailed(f"{name}: {_reason(error)}") from error


def nccl_group(store: Any, name: str, rank: int, size: int, seconds: float) -> Any:
    """Tie `size` ranks together, each with a GPU of its own, the current device."""
    options = _distributed.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=seconds)
    try:
        return _distributed.ProcessGroupNCCL(_distributed.PrefixStore(name, store), rank, size, options)
    except RuntimeError as error:
        raise CollectiveFailed(f"{name}: {_reason(error)}") from error


def _reason(error: RuntimeError) -> str:
    """The first line, without the place in gloo's source."""
    line = str(error).partition("\n")[0]
    return line.partition("] ")[2] if line.startswith("[") and "] " in line else line
