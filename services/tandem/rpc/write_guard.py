"""Cuts a streaming call whose handler waits for a client that does not read.

Such a handler hangs in grpc's write, where no exception of ours can reach it: the call is ended beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

from grpc import aio

from tandem.errors import TandemError
from tandem.rpc import status

_cutting: set[asyncio.Task[None]] = set()  # the loop itself keeps no tasks alive


@contextlib.contextmanager
def cut_at(when: float, context: aio.ServicerContext[Any, Any], error: TandemError) -> Iterator[None]:
    """End the calling handler's call with `error` if it is still inside at `when`, a time of the running loop's clock.

    The handler is cancelled at once; the status waits behind what was written before, until the client reads or goes.
    """
    task = asyncio.current_task()
    assert task is not None, "used inside of a handler"

    def cut() -> None:
        ending = asyncio.ensure_future(_end(context, error))
        _cutting.add(ending)
        ending.add_done_callback(_cutting.discard)
        loop.call_soon(task.cancel)  # after the status is under way: a cancelled handler sends none

    loop = task.get_loop()
    timer = loop.call_at(when, cut)
    try:
        yield
    finally:
        timer.cancel()


async def _end(context: aio.ServicerContext[Any, Any], error: TandemError) -> None:
    # AbortError: the status was sent. Any other: the client was gone before it could be.
    with contextlib.suppress(Exception):
        await status.abort(context, error)
