"""Waits until a gateway serves and has met all of its workers."""

from __future__ import annotations

import asyncio
from typing import Any

from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.errors import Unavailable
from tandem.rpc.channels import open_channel
from tandem.rpc.gen.inference.v1.inference_service_pb2 import ListModelsRequest
from tandem.rpc.gen.inference.v1.inference_service_pb2_grpc import InferenceServiceStub

_POLL_SECONDS = 0.05


async def wait_serving(address: str, num_prefill: int, num_decode: int, seconds: float) -> None:
    """Return once the gateway at `address` is SERVING and has so many ready workers.

    It serves as soon as it has one decode worker; with fewer prefill workers than there are, a prompt would be
    computed where nobody expects it. Raises Unavailable if that is not so in time, or the gateway cannot be asked.
    """
    try:
        async with asyncio.timeout(seconds), open_channel(address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True)
            async for answer in watch:
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    break
            watch.cancel()
            models = InferenceServiceStub(channel)
            while True:
                (model,) = (await models.ListModels(ListModelsRequest())).models
                if model.ready_prefill_workers >= num_prefill and model.ready_decode_workers >= num_decode:
                    return
                await asyncio.sleep(_POLL_SECONDS)
    except aio.AioRpcError as error:
        raise Unavailable(f"{address} cannot be asked whether it serves: {error.details()}") from error
    except TimeoutError:
        raise Unavailable(f"{address} does not serve with all of its workers after {seconds:g} s") from None
