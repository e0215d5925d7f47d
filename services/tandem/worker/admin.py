"""AdminService: trainings of adapters for whoever may administer this worker. No torch here: rank 0 trains.

Texts go to the rank in the messages that they came in, and nowhere else. A client that goes away cancels its training.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from grpc import aio

from tandem.config import ADAPTER_NAME, LoraConfig
from tandem.core.messages.training import (
    CancelTraining,
    LoadAdapter,
    StartTraining,
    TrainingEnded,
    TrainingExamples,
    TrainingOptions,
    TrainingOutcome,
    TrainingStarted,
    TrainingStep,
)
from tandem.errors import Cancelled, Draining, InvalidRequest, Overloaded, TandemError, Unavailable
from tandem.rpc.admin_upload import BEGIN_TAKEN
from tandem.rpc.gen.admin.v1 import admin_service_pb2 as admin_pb2
from tandem.rpc.gen.admin.v1 import admin_service_pb2_grpc as admin_grpc

UPLOAD_SECONDS = 600.0  # for all examples to come
DISCARD_SECONDS = 2.0
MESSAGE_BYTES_MAX = 16 << 20  # of one Examples; the pipe to the rank takes 64 MiB at once
MAX_UPLOADS = 3  # trainings whose examples are on their way or that are under way: their texts wait in one pipe
RANK_MAX, EPOCHS_MAX, BATCH_MAX = 512, 1000, 1024
_Context = aio.ServicerContext[Any, Any]
_Requests = AsyncIterator[admin_pb2.TrainLoraRequest]
_Event = TrainingStarted | TrainingStep | TrainingEnded


class AdminServer(admin_grpc.AdminServiceServicer):
    """The servicer, and the receiver of what the rank says about trainings. `send` takes messages for the rank."""

    def __init__(self, send: Callable[[object], None], config: LoraConfig) -> None:
        self._send = send
        self._config = config
        self._ready = False
        self._draining = False
        self._next_job_id = 1
        self._events: dict[int, asyncio.Queue[_Event]] = {}
        self._trained: dict[int, str] = {}  # adapters of the trainings that have begun

    def open(self) -> None:
        """Take trainings from now on."""
        self._ready = True

    def drain(self) -> None:
        """Refuse new trainings, and end those under way."""
        self._draining = True
        for job_id in list(self._events):
            self._send(CancelTraining(job_id))

    def heard(self, event: _Event) -> None:
        """Pass on what the rank says about a training; nobody may be left to hear it."""
        queue = self._events.get(event.job_id)
        if queue is not None:
            queue.put_nowait(event)

    # ---- gRPC -----------------------------------------------------------------------------------------------------

    async def TrainLora(
        self, request_iterator: _Requests, context: _Context
    ) -> AsyncIterator[admin_pb2.TrainLoraResponse]:
        with self._job() as (job_id, queue):
            try:
                async with asyncio.timeout(UPLOAD_SECONDS):
                    options = await self._upload(job_id, request_iterator, context)
            except TimeoutError:
                raise InvalidRequest(f"the examples did not come within {UPLOAD_SECONDS:g} s") from None
            self._trained[job_id] = options.adapter
            self._send(StartTraining(job_id, options))
            while not isinstance(event := await queue.get(), TrainingEnded):
                yield _response(event)
            yield _finished(self._checked(event))

    async def CancelTraining(
        self, request: admin_pb2.CancelTrainingRequest, context: _Context
    ) -> admin_pb2.CancelTrainingResponse:
        chosen = [job_id for job_id, name in self._trained.items() if request.adapter in ("", name)]
        for job_id in chosen:
            self._send(CancelTraining(job_id))
        return admin_pb2.CancelTrainingResponse(cancelled=bool(chosen))

    async def LoadAdapter(
        self, request: admin_pb2.LoadAdapterRequest, context: _Context
    ) -> admin_pb2.LoadAdapterResponse:
        _check_name(request.adapter)
        with self._job() as (job_id, queue):
            self._send(LoadAdapter(job_id, request.adapter))
            event = await queue.get()
            assert isinstance(event, TrainingEnded)
            self._checked(event)
            assert event.adapter is not None
            return admin_pb2.LoadAdapterResponse(digest=event.adapter.digest)

    @contextlib.contextmanager
    def _job(self) -> Iterator[tuple[int, asyncio.Queue[_Event]]]:
        """A job's number and events. One that has not ended when its call does is cancelled."""
        if not self._ready:
            raise Unavailable("this worker is starting")
        if self._draining:
            raise Draining("this worker is stopping")
        if len(self._events) >= MAX_UPLOADS:
            raise Overloaded(f"{MAX_UPLOADS} trainings are being uploaded or under way")
        job_id, self._next_job_id = self._next_job_id, self._next_job_id + 1
        queue: asyncio.Queue[_Event] = asyncio.Queue()
        self._events[job_id] = queue
        try:
            yield job_id, queue
        finally:
            del self._events[job_id]
            self._trained.pop(job_id, None)
            self._send(CancelTraining(job_id))  # of one that has ended it is ignored

    async def _upload(self, job_id: int, requests: _Requests, context: _Context) -> TrainingOptions:
        first = await anext(requests, None)
        if first is None or first.WhichOneof("op") != "begin":
            raise InvalidRequest("the first message must be Begin")
        options = options_from_proto(first.begin, self._config)
        await context.send_initial_metadata(BEGIN_TAKEN)  # examples may come
        try:
            await self._take_examples(job_id, requests)
        except InvalidRequest:
            await _discard(requests)
            raise
        return options

    async def _take_examples(self, job_id: int, requests: _Requests) -> None:
        num_examples = num_bytes = 0
        async for request in requests:
            if request.WhichOneof("op") != "examples":
                raise InvalidRequest("only Examples may follow Begin")
            size = request.ByteSize()
            num_examples += len(request.examples.examples)
            num_bytes += size
            if size > MESSAGE_BYTES_MAX:
                raise InvalidRequest(f"a message of {size} bytes, at most {MESSAGE_BYTES_MAX}", field="examples")
            if num_examples > self._config.max_examples:
                raise InvalidRequest(f"more than {self._config.max_examples} examples", field="examples")
            if num_bytes > self._config.max_text_bytes:
                raise InvalidRequest(f"more than {self._config.max_text_bytes} bytes of examples", field="examples")
            pairs = tuple((example.prompt, example.completion) for example in request.examples.examples)
            if not all(completion for _, completion in pairs):
                raise InvalidRequest("an example without a completion has nothing to learn", field="examples")
            self._send(TrainingExamples(job_id, pairs))
        if not num_examples:
            raise InvalidRequest("there are no examples", field="examples")

    def _checked(self, ended: TrainingEnded) -> TrainingEnded:
        """Raise what the end of a training is for its client, if it is no success."""
        match ended.outcome:
            case TrainingOutcome.DONE:
                return ended
            case TrainingOutcome.CANCELLED:
                raise Draining("this worker is stopping") if self._draining else Cancelled(ended.message)
            case TrainingOutcome.REFUSED:
                raise InvalidRequest(ended.message, field=ended.field_name)
            case TrainingOutcome.BUSY:
                raise Overloaded(ended.message)
            case TrainingOutcome.FAILED:
                raise TandemError(ended.message)


def options_from_proto(begin: admin_pb2.Begin, config: LoraConfig) -> TrainingOptions:
    """Return the options with every default resolved; raises InvalidRequest for one that cannot be meant."""
    _check_name(begin.adapter)
    rank = begin.rank if begin.HasField("rank") else 8
    options = TrainingOptions(
        adapter=begin.adapter,
        rank=rank,
        alpha=begin.alpha if begin.HasField("alpha") else 2.0 * rank,
        rslora=begin.rslora,
        targets=tuple(dict.fromkeys(begin.targets)),
        learning_rate=begin.learning_rate if begin.HasField("learning_rate") else 2e-4,
        epochs=begin.epochs if begin.HasField("epochs") else 1,
        batch_size=begin.batch_size if begin.HasField("batch_size") else 4,
        max_sequence_tokens=(
            begin.max_sequence_tokens if begin.HasField("max_sequence_tokens") else config.max_sequence_tokens
        ),
        seed=begin.seed,
    )
    bounds = {
        "rank": (1, RANK_MAX),
        "epochs": (1, EPOCHS_MAX),
        "batch_size": (1, BATCH_MAX),
        "max_sequence_tokens": (2, config.max_sequence_tokens),
        "seed": (0, (1 << 63) - 1),
    }
    for name, (low, high) in bounds.items():
        if not low <= getattr(options, name) <= high:
            raise InvalidRequest(f"{name} is {getattr(options, name)}, must be between {low} and {high}", field=name)
    for name in ("alpha", "learning_rate"):
        value = getattr(options, name)
        if not (math.isfinite(value) and value > 0):
            raise InvalidRequest(f"{name} is {value}, must be above 0", field=name)
    return options


def _check_name(name: str) -> None:
    if not ADAPTER_NAME.fullmatch(name):
        raise InvalidRequest("an adapter's name has 1 to 64 letters, digits and ._-", field="adapter")


async def _discard(requests: _Requests) -> None:
    """Read what a refused client still sends, for a while: one that cannot write is not told why by every gRPC."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            async for _ in requests:
                pass


def _response(event: TrainingStarted | TrainingStep) -> admin_pb2.TrainLoraResponse:
    if isinstance(event, TrainingStarted):
        started = admin_pb2.Started(examples=event.num_examples, tokens=event.num_tokens, steps=event.num_steps)
        return admin_pb2.TrainLoraResponse(started=started)
    return admin_pb2.TrainLoraResponse(
        step=admin_pb2.Step(
            step=event.step,
            steps=event.num_steps,
            loss=event.loss,
            tokens_per_second=event.tokens_per_second,
            device_share=event.device_share,
        )
    )


def _finished(ended: TrainingEnded) -> admin_pb2.TrainLoraResponse:
    assert ended.adapter is not None
    return admin_pb2.TrainLoraResponse(
        finished=admin_pb2.Finished(adapter=ended.adapter.name, digest=ended.adapter.digest)
    )
