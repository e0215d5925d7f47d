"""InferenceService over gRPC: reads the call's metadata and deadline, prepares, generates, replies.

Handlers are asynchronous generators or coroutines that raise members of the error tree; the interceptor ends the call.
"""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from google.protobuf import struct_pb2
from grpc import aio

from tandem.errors import DeadlineExceeded, InvalidRequest
from tandem.gateway import validation
from tandem.gateway.admission import Admission
from tandem.gateway.dispatch import Dispatcher
from tandem.gateway.fleet import Fleet
from tandem.gateway.generation import Generation
from tandem.gateway.limits import MAX_SEQUENCES
from tandem.gateway.preparation import Preparation
from tandem.gateway.prepared import Prepared
from tandem.gateway.record import RequestRecord
from tandem.gateway.replies import StreamReplies, response
from tandem.gateway.resumption import ResumptionRules
from tandem.gateway.tokenizer import Tokenizer
from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb
from tandem.rpc.gen.inference.v1 import inference_service_pb2_grpc as pb_grpc
from tandem.rpc.sampling_rules import check_token_ids
from tandem.rpc.write_guard import cut_at
from tandem.telemetry.gateway import GatewayMetrics
from tandem.telemetry.tracing import Tracer

REQUEST_ID = "x-request-id"
TRACEPARENT = "traceparent"
_SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
BLOCKED_WRITE_SECONDS = 1.0  # after its deadline, a call that still waits for its client is cut
MAX_DETOKENIZE_IDS = 1 << 20
_Context = aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """What a call's metadata and deadline say. `deadline` is a time of the running loop's clock."""

    request_id: str
    traceparent: str
    deadline: float


class InferenceServicer(pb_grpc.InferenceServiceServicer):
    """The public API of one model."""

    def __init__(
        self,
        *,
        preparation: Preparation,
        tokenizer: Tokenizer,
        fleet: Fleet,
        dispatcher: Dispatcher,
        admission: Admission,
        metrics: GatewayMetrics,
        rules: ResumptionRules,
        max_prompt_bytes: int,
        request_seconds_max: float,
        tracer: Tracer | None = None,
    ) -> None:
        self._preparation = preparation
        self._tokenizer = tokenizer
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._admission = admission
        self._metrics = metrics
        self._rules = rules
        self._max_prompt_bytes = max_prompt_bytes
        self._request_seconds_max = request_seconds_max
        self._tracer = tracer or Tracer.off()

    async def Generate(self, request: pb.GenerateRequest, context: _Context) -> pb.GenerateResponse:
        call = self._call(request.request_id, context)
        with self._record("Generate", call) as record, self._admission.admit(_num_sequences(request.sampling)):
            prepared = await self._preparation.generate(request, call.request_id, record.traceparent)
            return await self._whole(prepared, call, record, context)

    async def Chat(self, request: pb.ChatRequest, context: _Context) -> pb.GenerateResponse:
        call = self._call(request.request_id, context)
        with self._record("Chat", call) as record, self._admission.admit(_num_sequences(request.sampling)):
            prepared = await self._preparation.chat(request, call.request_id, record.traceparent)
            return await self._whole(prepared, call, record, context)

    async def StreamGenerate(
        self, request: pb.GenerateRequest, context: _Context
    ) -> AsyncIterator[pb.StreamGenerateResponse]:
        call = self._call(request.request_id, context)
        with self._record("StreamGenerate", call) as record, self._admission.admit(_num_sequences(request.sampling)):
            prepared = await self._preparation.generate(request, call.request_id, record.traceparent)
            async with aclosing(self._stream(prepared, call, record, context)) as messages:
                async for message in messages:
                    yield message

    async def StreamChat(self, request: pb.ChatRequest, context: _Context) -> AsyncIterator[pb.StreamGenerateResponse]:
        call = self._call(request.request_id, context)
        with self._record("StreamChat", call) as record, self._admission.admit(_num_sequences(request.sampling)):
            prepared = await self._preparation.chat(request, call.request_id, record.traceparent)
            async with aclosing(self._stream(prepared, call, record, context)) as messages:
                async for message in messages:
                    yield message

    async def Tokenize(self, request: pb.TokenizeRequest, context: _Context) -> pb.TokenizeResponse:
        validation.check_model(request.model, (self._preparation.model,))
        kind = request.WhichOneof("input")
        with self._admission.admit():
            if kind == "chat":
                validation.check_chat(request.chat, self._max_prompt_bytes)
                _, ids = await self._preparation.chat_prompt(request.chat)
            elif kind == "text":
                validation.check_text(request.text, self._max_prompt_bytes, "text")
                ids = await self._tokenizer.encode(request.text, add_special_tokens=request.add_special_tokens)
            else:
                raise InvalidRequest("there is nothing to tokenize", field="input")
        return pb.TokenizeResponse(token_ids=ids)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: _Context) -> pb.DetokenizeResponse:
        validation.check_model(request.model, (self._preparation.model,))
        if len(request.token_ids) > MAX_DETOKENIZE_IDS:
            raise InvalidRequest(f"at most {MAX_DETOKENIZE_IDS} token ids", field="token_ids")
        limits = self._preparation.limits()
        check_token_ids(tuple(request.token_ids), limits.vocab_size, "token_ids")
        text = self._tokenizer.decode(request.token_ids, skip_special=request.skip_special_tokens)
        return pb.DetokenizeResponse(text=text)

    async def ListModels(self, request: pb.ListModelsRequest, context: _Context) -> pb.ListModelsResponse:
        limits, sampling = self._preparation.limits(), self._preparation.default_sampling
        defaults = struct_pb2.Struct()
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
            defaults[name] = getattr(sampling, name)
        model = pb.ModelInfo(
            id=self._preparation.model,
            root=self._preparation.model,
            max_context_tokens=limits.max_context_tokens,
            max_output_tokens=limits.max_output_tokens(1) or 0,
            vocab_size=limits.vocab_size,
            eos_token_ids=limits.eos_token_ids,
            chat_template_sha256=self._tokenizer.chat_templates.sha256,
            default_sampling=defaults,
            ready_prefill_workers=self._fleet.count_ready("prefill"),
            ready_decode_workers=self._fleet.count_ready("decode", "unified"),
            lora_adapters=sorted(self._fleet.adapters),
        )
        return pb.ListModelsResponse(models=[model])

    async def _stream(
        self, prepared: Prepared, call: Call, record: RequestRecord, context: _Context
    ) -> AsyncGenerator[pb.StreamGenerateResponse, None]:
        replies = StreamReplies(prepared, self._tokenizer.token_bytes)
        generation = self._generation(prepared, call, record, context, whole=False)
        late = DeadlineExceeded("the deadline passed while the client did not read")
        introduced = False
        with cut_at(call.deadline + BLOCKED_WRITE_SECONDS, context, late):
            async with aclosing(generation.deltas()) as deltas:
                async for delta in deltas:
                    record.on_delta(delta)
                    if not introduced:
                        await _introduce(call, context)
                        introduced = True
                    yield replies.message(delta)

    async def _whole(
        self, prepared: Prepared, call: Call, record: RequestRecord, context: _Context
    ) -> pb.GenerateResponse:
        finished = []
        generation = self._generation(prepared, call, record, context, whole=True)
        async with aclosing(generation.deltas()) as deltas:
            async for delta in deltas:
                record.on_delta(delta)
                finished.append(delta)
        await _introduce(call, context)
        return response(prepared, finished, self._tokenizer.token_bytes)

    def _generation(
        self, prepared: Prepared, call: Call, record: RequestRecord, context: _Context, *, whole: bool
    ) -> Generation:
        record.prepared(prepared)
        generation = Generation(
            prepared,
            dispatcher=self._dispatcher,
            tokenizer=self._tokenizer,
            rules=self._rules,
            deadline=call.deadline,
            on_tokens=record.on_tokens,
            on_resumed=record.on_resumed,
            whole=whole,
        )
        # Where a handler waits for a client that does not read, this is what ends the work of the workers.
        done: Any = lambda _: generation.abort()  # noqa: E731 (the stubs want a class of theirs)
        context.add_done_callback(done)
        return generation

    def _record(self, api: str, call: Call) -> RequestRecord:
        span = self._tracer.enter(f"{_SERVICE}/{api}", call.traceparent, may_begin_trace=True)
        return RequestRecord(api, call.request_id, self._metrics, span, deadline=call.deadline)

    def _call(self, request_id: str, context: _Context) -> Call:
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        request_id = metadata.get(REQUEST_ID) or request_id or uuid.uuid4().hex
        validation.check_request_id(request_id)
        seconds = context.time_remaining()
        if seconds is None or math.isnan(seconds):
            seconds = math.inf
        deadline = asyncio.get_running_loop().time() + min(seconds, self._request_seconds_max)
        return Call(request_id, metadata.get(TRACEPARENT, ""), deadline)


def _num_sequences(sampling: pb.SamplingParams) -> int:
    """How much room a request takes, before anything of it is known to be valid."""
    return min(max(1, sampling.n), MAX_SEQUENCES)


async def _introduce(call: Call, context: _Context) -> None:
    """Say the request's id, with the first of an answer: once headers are out, no client tries a refused call again."""
    await context.send_initial_metadata(((REQUEST_ID, call.request_id),))
