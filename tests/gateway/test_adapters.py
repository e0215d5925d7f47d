"""Adapters at the gateway: who has them, which weights a name means, what is refused."""

from __future__ import annotations

from pathlib import Path

import grpc

from tandem.core.messages.worker import AdapterInfo
from tandem.errors import NotFound
from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb
from tests.fakes.worker import FakeWorker
from tests.gateway.harness import Setup, failure, run

OLD, NEW = AdapterInfo("code", "01" * 32), AdapterInfo("code", "02" * 32)
CHAT = AdapterInfo("chat", "03" * 32)


def asked(adapter: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="x", lora_adapter=adapter, sampling=pb.SamplingParams(max_tokens=2))


def test_a_request_goes_where_its_adapter_is_with_its_digest(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        models = await setup.stub.ListModels(pb.ListModelsRequest())
        assert list(models.models[0].lora_adapters) == ["chat", "code"]
        for _ in range(3):
            await setup.stub.Generate(asked("code"))
        assert [len(worker.submits) for worker in setup.workers] == [0, 3]
        submit = setup.workers[1].submits[0]
        assert (submit.lora_adapter, submit.lora_digest) == ("code", OLD.digest)
        await setup.stub.Generate(asked(""))
        assert sum(submit.lora_adapter == "" for worker in setup.workers for submit in worker.submits) == 1

    run(tmp_path, scenario, FakeWorker(adapters=(CHAT,)), FakeWorker(adapters=(CHAT, OLD)))


def test_an_unknown_adapter_is_refused_before_anybody_is_asked(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        chat = pb.ChatRequest(
            messages=[pb.ChatMessage(role="user", content=[pb.ContentPart(text="x")])], lora_adapter="cod"
        )
        for call in (setup.stub.Generate(asked("cod")), setup.stub.Chat(chat)):
            code, error = await failure(call)
            assert code is grpc.StatusCode.NOT_FOUND
            assert isinstance(error, NotFound) and error.field == "lora_adapter"
            assert error.message == "adapter 'cod' is not served here; served: code"
        assert not setup.worker.submits

    run(tmp_path, scenario, FakeWorker(adapters=(OLD,)))


def test_where_a_name_has_two_weights_most_workers_decide(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        for _ in range(4):
            await setup.stub.Generate(asked("code"))
        assert not setup.workers[0].submits
        assert {submit.lora_digest for worker in setup.workers for submit in worker.submits} == {NEW.digest}

    run(tmp_path, scenario, *(FakeWorker(adapters=(adapter,)) for adapter in (OLD, NEW, NEW)))
