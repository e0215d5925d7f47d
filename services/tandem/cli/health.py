"""Waits until a program says, over grpc.health.v1, that it serves."""

from __future__ import annotations

import asyncio
from typing import Any

from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.errors import Unavailable
from tandem.rpc.channels import open_channel


async def wait_serving(address: str, seconds: float) -> None:
    """Return once `address` is SERVING. Raises Unavailable if it is not by then, or cannot be asked."""
    try:
        async with asyncio.timeout(seconds), open_channel(address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True)
            async for answer in watch:
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    watch.cancel()
                    return
    except aio.AioRpcError as error:
        raise Unavailable(f"{address} cannot be asked whether it serves: {error.details()}") from error
    except TimeoutError:
        raise Unavailable(f"{address} does not serve after {seconds:g} s") from None
