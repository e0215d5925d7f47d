"""Adapters through real processes: prefill and decode have them, or one of them has not. PEFT is the oracle."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb
from tests.e2e.oracle import TIE, Oracle, greedy, random_prompt
from tests.e2e.service import Service
from tests.engine.adapters_made import write_peft_adapter

NUM_NEW = 16


class Judge:
    """Of greedy answers: each token is PEFT's best one, or as good."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def check(self, prompt: list[int], output: list[int]) -> None:
        assert len(output) == NUM_NEW
        with torch.no_grad():
            logits = self._model(input_ids=torch.tensor([prompt + output[:-1]])).logits[0, len(prompt) - 1 :].float()
        chosen = logits[torch.arange(len(output)), torch.tensor(output)]
        assert float((logits.max(dim=-1).values - chosen).max()) <= TIE


Oracles = dict[str, Judge]


@pytest.fixture(scope="module")
def adapters(made: tuple[Path, Oracle], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracles]:
    """Folders `code` and `chat`, and who judges answers with each of them and with none."""
    folder = tmp_path_factory.mktemp("adapters")
    oracles = {"": Judge(made[1]._model)}
    for seed, name in enumerate(("code", "chat")):
        oracles[name] = Judge(write_peft_adapter(made[1]._model, folder / name, seed=seed))
    return folder, oracles


def asked(prompt: list[int], adapter: str) -> pb.GenerateRequest:
    request = greedy(prompt, NUM_NEW)
    request.lora_adapter = adapter
    return request


def test_several_adapters_through_prefill_and_decode(
    service: Service, adapters: tuple[Path, Oracles], made: tuple[Path, Oracle]
) -> None:
    folder, oracles = adapters
    both = f"code={folder / 'code'},chat={folder / 'chat'}"
    prefill = service.worker("prefill", "--model.adapters", f"other-name={folder / 'code'},chat={folder / 'chat'}")
    decode = service.worker("decode", "--model.adapters", both)
    stub = service.stub(service.gateway([prefill.wait_ready()], [decode.wait_ready()]))
    assert list(stub.ListModels(pb.ListModelsRequest()).models[0].lora_adapters) == ["chat", "code"]
    source = random.Random(3)
    prompts = [random_prompt(source, length) for length in (40, 70)]
    cases = [(prompt, adapter) for prompt in prompts for adapter in ("", "code", "chat", "code")]
    with ThreadPoolExecutor(len(cases)) as threads:
        answers = list(threads.map(lambda case: stub.Generate(asked(*case)), cases))
    for (prompt, adapter), answer in zip(cases, answers, strict=True):
        oracles[adapter].check(prompt, list(answer.choices[0].token_ids))
        assert answer.timing.kv_transport == "tcp", "its prompt was computed on the prefill worker"
    again = stub.Generate(asked(prompts[1], "chat"))
    assert again.usage.cached_tokens == 64, "with the same adapter the prefix is known"
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(asked(prompts[0], "cod"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert [program.stop() for program in service.programs] == [0] * len(service.programs)


def test_a_prefill_worker_without_the_adapter_computes_no_prompt_of_it(
    service: Service, adapters: tuple[Path, Oracles]
) -> None:
    folder, oracles = adapters
    prefill = service.worker("prefill", "--model.adapters", f"code={folder / 'chat'}")
    decode = service.worker("decode", "--model.adapters", f"code={folder / 'code'}")
    stub = service.stub(service.gateway([prefill.wait_ready()], [decode.wait_ready()]))
    prompt = random_prompt(random.Random(4), 50)
    for adapter, transport in (("code", ""), ("", "tcp")):
        answer = stub.Generate(asked(prompt, adapter))
        oracles[adapter].check(prompt, list(answer.choices[0].token_ids))
        assert answer.timing.kv_transport == transport


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--model.adapters", "code"), "'code' is not name=folder"),
        (("--model.adapters", "a/b=x"), "'a/b=x' is not name=folder"),
        (("--model.adapters", "a=x,a=y"), "a is there twice"),
        (("--model.adapters", "a=/nowhere"), "model.adapters: a: /nowhere: no adapter_config.json"),
        (("--model.adapters", "a=x", "--parallel.pipeline-size", "2"), "not with parallel.pipeline_size 2"),
    ],
)
def test_adapters_that_cannot_be_served_end_the_start(service: Service, flags: tuple[str, ...], told: str) -> None:
    worker = service.worker("unified", *flags)
    assert worker.process.wait(60) == 2
    assert told in worker.log()
