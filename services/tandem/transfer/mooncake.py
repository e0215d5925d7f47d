"""Mooncake's transfer engine (RDMA, or its TCP): loaded here and nowhere else, and only when asked for.

Its traps, each measured: a call before `initialize`, or a status call with an id that is over, is a SIGSEGV; a
returned error does not end a transfer; the environment counts at the first import only; everybody who reaches its
ports may read and write registered memory. Spawn, never fork, once an engine exists.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tandem.config import TransferConfig
from tandem.core.messages.handoff import RankEndpoint
from tandem.core.messages.transfer import Slab
from tandem.errors import TransportError
from tandem.transfer.choice import MOONCAKE_RDMA, mooncake_absence
from tandem.transfer.one_sided import OneSidedAddress, ReadId, ReadState, arenas, probe_pattern
from tandem.transfer.pages import Pages, PageSpace
from tandem.transfer.tcp_stream import join_address

_METADATA = "P2PHANDSHAKE"  # no server: the peer itself is asked for its descriptor
_QUEUE_LIMIT = "65535"  # a rejected item can wedge a peer for good
_TIMEOUT_SECONDS = "5"
_OK = 0
_COMPLETED = 1
_RUNNING = 0


class Mooncake:
    """The loaded library. One a process: its settings are fixed by the first import."""

    def __init__(self, transport: str, config: TransferConfig, host: str) -> None:
        """Raises TransportError if it is not installed or cannot be loaded."""
        if reason := mooncake_absence():
            raise TransportError(reason)
        self.transport = transport
        self._host = host
        self._devices = config.mooncake_devices if transport == MOONCAKE_RDMA else ""
        self._protocol = "rdma" if transport == MOONCAKE_RDMA else "tcp"
        os.environ.update(_environment(transport, config, host))
        try:
            self._module: Any = importlib.import_module("mooncake.engine")
        except ImportError as error:
            raise TransportError(f"mooncake.engine: {error}") from error

    def new_engine(self) -> MooncakeEngine:
        """Start an engine with ports and threads of its own. Raises TransportError."""
        engine = self._module.TransferEngine()
        if engine.initialize(self._host, _METADATA, self._protocol, self._devices) != _OK:
            raise TransportError(f"Mooncake cannot start an engine for {self.transport} on {self._host}")
        return MooncakeEngine(engine)

    def session(self, engine: MooncakeEngine) -> str:
        return join_address(self._host, engine.port)


class MooncakeEngine:
    """A ReadEngine. Each read has an id of its own, since a status covers only a batch's first entry."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._reads: set[ReadId] = set()

    @property
    def port(self) -> int:
        return int(self._engine.get_rpc_port())

    def register(self, address: int, length: int) -> None:
        self.register_all([(address, length)])

    def register_all(self, regions: list[tuple[int, int]]) -> None:
        """Raises TransportError."""
        addresses, lengths = [address for address, _ in regions], [length for _, length in regions]
        code = self._engine.batch_register_memory(addresses, lengths)  # the single call would hold the GIL
        if code != _OK:
            raise TransportError(f"Mooncake cannot register {sum(lengths)} bytes (code {code}; ulimit -l?)")

    def submit(self, session: str, local: int, remote: int, length: int) -> ReadId | None:
        read = int(self._engine.batch_transfer_async_read(session, [local], [remote], [length]))
        if read in (0, -1):
            return None
        self._reads.add(read)
        return read

    def poll(self, read_id: ReadId) -> ReadState:
        self._reads.remove(read_id)  # a KeyError is better than what the library does with an id that is over
        code = int(self._engine.transfer_check_status(read_id))
        if code == _RUNNING:
            self._reads.add(read_id)
            return ReadState.RUNNING
        return ReadState.DONE if code == _COMPLETED else ReadState.FAILED

    def close(self) -> None:
        self._engine = None  # the destructor ends its threads; ids that still run go with it


class MooncakeExporter:
    """Registers the whole pool for readers who are trusted: there is nothing to grant and nothing to revoke."""

    def __init__(self, mooncake: Mooncake, space: PageSpace, instance_id: bytes, control: str) -> None:
        """Raises TransportError. `control`: TCP address of this process."""
        self._engine = mooncake.new_engine()
        self._space = space
        self._probe = np.frombuffer(probe_pattern(instance_id), dtype=np.uint8).copy()
        probe = int(self._probe.ctypes.data)
        self._engine.register_all([*arenas(space), (probe, self._probe.nbytes)])
        address = OneSidedAddress(mooncake.session(self._engine), space.address, probe, control)
        self.endpoint = RankEndpoint(transport=mooncake.transport, address=address.encode(), instance_id=instance_id)

    def open(self, handoff_id: bytes, attempt: int, token: bytes, pieces: Sequence[Slab]) -> None:
        """Nothing to do: readers name memory."""

    def add(self, handoff_id: bytes, attempt: int, first_ordinal: int, pages: Pages) -> None:
        """Nothing to do: the whole pool is readable."""

    def revoke(self, handoff_id: bytes, done: Callable[[], None]) -> None:
        """Done at once: a late reader gets other bytes, sees that by their checksums, and harms nobody."""
        done()

    def close(self) -> None:
        self._engine.close()


def _environment(transport: str, config: TransferConfig, host: str) -> dict[str, str]:
    """Return the variables that the library reads when it is loaded."""
    forced = "MC_FORCE_HCA" if transport == MOONCAKE_RDMA else "MC_FORCE_TCP"  # `protocol` alone is ignored
    variables = {
        forced: "1",
        "MC_LOG_LEVEL": "ERROR",
        "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": _QUEUE_LIMIT,
        "MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER": _QUEUE_LIMIT,
        "MC_TCP_PROGRESS_TIMEOUT_SEC": _TIMEOUT_SECONDS,
        "MC_TCP_STATUS_TIMEOUT_SEC": _TIMEOUT_SECONDS,
        "MC_TCP_SLICE_SIZE": str(256 << 10),
        "MC_HANDSHAKE_CONNECT_TIMEOUT": _TIMEOUT_SECONDS,
        "MC_MIN_RPC_PORT": str(config.mooncake_port_min),
        "MC_MAX_RPC_PORT": str(config.mooncake_port_max),
    }
    if ":" in host:
        variables["MC_USE_IPV6"] = "1"
    return variables
