"""The one server interceptor: errors of the tree end a call with their status, bugs with a bare INTERNAL.

`admit` may refuse a call, by raising, before its servicer sees it.

Works for handlers that are coroutines (returning, or driving the context by read and write) and for asynchronous
generators. Cancellation passes through untouched.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc import aio

from tandem import errors
from tandem.rpc import status

_logger = logging.getLogger(__name__)
_Context = aio.ServicerContext[Any, Any]
_KINDS: dict[tuple[bool, bool], tuple[str, Callable[..., Any]]] = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}


class ErrorInterceptor(aio.ServerInterceptor):
    """Maps what a servicer, or `admit` before it, raises; see the module."""

    def __init__(self, admit: Callable[[_Context], None] | None = None) -> None:
        self._admit = admit or _admit_all

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        attribute, factory = _KINDS[bool(handler.request_streaming), bool(handler.response_streaming)]
        behaviour = getattr(handler, attribute)
        wrap = _wrap_generator if inspect.isasyncgenfunction(behaviour) else _wrap_coroutine
        return factory(
            wrap(behaviour, handler_call_details.method, self._admit),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def _admit_all(context: _Context) -> None:
    """Refuse nobody."""


def _wrap_coroutine(
    behaviour: Callable[..., Awaitable[Any]], method: str, admit: Callable[[_Context], None]
) -> Callable[..., Awaitable[Any]]:
    async def call(request: Any, context: _Context) -> Any:
        try:
            admit(context)
            return await behaviour(request, context)
        except Exception as error:
            await _end(context, error, method)

    return call


def _wrap_generator(
    behaviour: Callable[..., Any], method: str, admit: Callable[[_Context], None]
) -> Callable[..., AsyncIterator[Any]]:
    async def call(request: Any, context: _Context) -> AsyncIterator[Any]:
        try:
            admit(context)
            # Closed here and now, not by the garbage collector: its `finally` is what cancels work on the workers.
            async with contextlib.aclosing(behaviour(request, context)) as responses:
                async for response in responses:
                    yield response
        except Exception as error:
            await _end(context, error, method)

    return call


async def _end(context: _Context, error: Exception, method: str) -> None:
    if isinstance(error, errors.TandemError):
        await status.abort(context, error)
    if isinstance(error, aio.AbortError):
        raise error  # the servicer has ended the call itself
    _logger.exception("%s failed", method, exc_info=error)
    await status.abort(context, errors.TandemError("internal error"))
