"""How a training's examples are uploaded: not before the worker has said that it takes what Begin asks for.

A client that writes to a call which the worker has ended is told of an internal error by grpc.aio instead of why.
"""

from __future__ import annotations

from typing import Any

BEGIN_TAKEN = (("tandem-begin", "taken"),)  # initial metadata


async def wait_until_taken(stream: Any) -> bool:
    """Wait for the worker's word on Begin; False: the call has ended, and its status says why."""
    key, value = BEGIN_TAKEN[0]
    if (await stream.initial_metadata()).get(key) == value:
        return True
    await stream.code()  # metadata comes before the end of a refused call
    return False
