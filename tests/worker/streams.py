"""Both ends of the hand-off streams on one real loopback connection; the test plays both schedulers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from tandem.core.messages.handoff import Accepted, Open, OpenReceived, OpenStream, RankEndpoint, SendAccepted, Sharding
from tandem.core.messages.sampling import SamplingParams
from tandem.core.messages.worker import RankReady
from tandem.core.token_ids import pack
from tandem.rpc.gen.handoff.v1.handoff_service_pb2_grpc import add_HandoffServiceServicer_to_server
from tandem.rpc.server import RpcServer
from tandem.worker.handoff_client import HandoffClient
from tandem.worker.handoff_server import HandoffServer
from tandem.worker.peer_channels import PeerChannels

PREFILL_ID = bytes(range(16))
DECODE_ID = bytes(range(16, 32))
VOCAB_SIZE = 100
_Event = TypeVar("_Event")


def rank_ready(role: str = "prefill", **changes: Any) -> RankReady:
    values: dict[str, Any] = {
        "role": role,
        "loop": f"overlap_{role}",
        "model": "m",
        "max_total_num_tokens": 1024,
        "max_req_input_len": 63,
        "max_context_tokens": 64,
        "max_running_requests": 8,
        "page_tokens": 4,
        "num_pages": 256,
        "page_bytes": 64,
        "vocab_size": VOCAB_SIZE,
        "eos_token_ids": (0,),
        "fingerprint": "f",
        "numerics": "",
        "dtype": "float32",
        "operators": "reference",
        "weight_bytes": 1,
        "pool_pages": "ordinary",
        "endpoints": (),
        "imports": ("tcp",),
        "transport_notes": (),
    }
    return RankReady(**{**values, **changes})


def an_open(**changes: Any) -> Open:
    values: dict[str, Any] = {
        "handoff_id": b"h" * 16,
        "attempt": 1,
        "importer_instance_id": DECODE_ID,
        "prompt_token_ids": pack([1, 2, 3]),
        "output_tokens": 0,
        "sampling": SamplingParams(),
        "tokens_held": 0,
        "fingerprint": "f",
        "numerics": "",
        "sharding": Sharding(),
        "transports": ("tcp",),
        "checksums": ("xxh3-64",),
    }
    return Open(**{**values, **changes})


def an_accepted() -> Accepted:
    endpoint = RankEndpoint(transport="tcp", address="127.0.0.1:1", instance_id=b"t" * 16)
    return Accepted(
        handoff_token=b"token",
        endpoints=(endpoint,),
        sharding=Sharding(),
        numerics="",
        checksum="xxh3-64",
        lease_seconds=10.0,
    )


class Events:
    """What one side's scheduler would be told, in order."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[object] = asyncio.Queue()

    def put(self, event: object) -> None:
        self._queue.put_nowait(event)

    async def next(self, kind: type[_Event], seconds: float = 30.0) -> _Event:
        event = await asyncio.wait_for(self._queue.get(), seconds)
        assert isinstance(event, kind), event
        return event

    async def nothing(self, seconds: float = 0.1) -> None:
        await asyncio.sleep(seconds)
        assert self._queue.empty(), self._queue.get_nowait()


class Pair:
    """A prefill frontend with its server, and a decode frontend with its client."""

    def __init__(self, connect_seconds: float = 30.0) -> None:
        self.prefill = Events()
        self.decode = Events()
        self.server = HandoffServer(self.prefill.put, PREFILL_ID)
        self.channels = PeerChannels(connect_seconds)
        self.client = HandoffClient(self.decode.put, self.channels)
        self.rpc = RpcServer()
        self.address = ""
        self._next_stream_id = 1

    async def start(self, ready: RankReady | None = None) -> None:
        self.rpc.add(add_HandoffServiceServicer_to_server, self.server, "tandem.handoff.v1.HandoffService")
        self.address = f"127.0.0.1:{self.rpc.listen('127.0.0.1', 0)}"
        self.server.open_for(ready or rank_ready())
        await self.rpc.start()

    def open(self, opened: Open | None = None, *, instance_id: bytes = PREFILL_ID, address: str = "") -> int:
        """Open a stream and return decode's number for it."""
        stream_id = self._next_stream_id
        self._next_stream_id += 1
        self.client.open(OpenStream(stream_id, address or self.address, instance_id, opened or an_open()))
        return stream_id

    async def opened(self) -> tuple[int, int]:
        """Open a stream and have it accepted; return decode's and prefill's numbers for it."""
        from tandem.core.messages.handoff import StreamAccepted

        mine = self.open()
        theirs = (await self.prefill.next(OpenReceived)).stream_id
        self.server.respond(SendAccepted(theirs, an_accepted()))
        assert (await self.decode.next(StreamAccepted)).stream_id == mine
        return mine, theirs


@asynccontextmanager
async def running_pair(**options: Any) -> AsyncIterator[Pair]:
    pair = Pair(**options)
    await pair.start()
    try:
        yield pair
    finally:
        await pair.client.close()
        await pair.rpc.stop(0)
