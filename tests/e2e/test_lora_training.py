"""`tandem lora train` on running workers: it learns, answers meanwhile keep every bit, what is trained is served."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb
from tandem.rpc.gen.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.e2e.oracle import Oracle
from tests.e2e.service import Program, Service

TEXTS = [f"def add_{number}(a, b):\n    return a + b + {number}\n" for number in range(12)]


def write_examples(folder: Path) -> Path:
    lines = [{"text": text} for text in TEXTS[:6]]
    lines += [dict(zip(("prompt", "completion"), text.split("\n", 1), strict=True)) for text in TEXTS[6:]]
    path = folder / "examples.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def lora(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tandem.cli.main", "lora", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str], code: int = 0, seconds: float = 90.0) -> str:
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == code, output
    return output


def trained(worker: Program, file: Path, name: str, *options: str) -> subprocess.Popen[str]:
    return lora("train", str(file), "--worker", worker.address, "--name", name, *options)


QUICK = ("--epochs", "8", "--learning-rate", "0.01", "--batch-size", "4", "--seed", "3")
ADMIN = ("--server.admin", "on", "--lora.device-share", "1")


def begun(worker: Program, file: Path, name: str) -> subprocess.Popen[str]:
    """Return a training that has made a step and would make many more."""
    deadline = time.monotonic() + 60
    while True:
        training = trained(worker, file, name, "--epochs", "1000")
        assert training.stdout is not None
        said = ""
        while line := training.stdout.readline():
            if line.startswith("step"):
                return training
            said += line
        training.wait()
        assert "another training is under way" in said and time.monotonic() < deadline, said  # one that ends yet
        time.sleep(0.1)


def wait_listed(stub: InferenceServiceStub, adapter: str) -> None:
    """Wait until the gateway has heard of the adapter, and of no other."""
    deadline = time.monotonic() + 30
    while list(stub.ListModels(pb.ListModelsRequest()).models[0].lora_adapters) != [adapter]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def scored(adapter: str = "") -> pb.GenerateRequest:
    return pb.GenerateRequest(
        text="def add_3(a, b):\n",
        lora_adapter=adapter,
        sampling=pb.SamplingParams(temperature=0.0, max_tokens=12),
        output=pb.OutputOptions(logprobs=3, prompt_logprobs=1, return_token_ids=True),
    )


def figures(answer: pb.GenerateResponse) -> list[Any]:
    logprobs = [*answer.prompt_logprobs, *answer.choices[0].logprobs]
    return [list(answer.choices[0].token_ids), [(one.logprob, [top.logprob for top in one.top]) for one in logprobs]]


def test_it_learns_while_answers_keep_every_bit(service: Service, made: tuple[Path, Oracle], tmp_path: Path) -> None:
    worker = service.worker("unified", *ADMIN, "--lora.folder", str(tmp_path / "adapters")).wait_ready()
    stub = service.stub(service.gateway([], [worker]))
    before = figures(stub.Generate(scored()))
    file = write_examples(tmp_path)
    endless = begun(worker, file, "endless")
    for _ in range(3):
        assert figures(stub.Generate(scored())) == before
        assert endless.poll() is None, "its answer came only after the training"
    ended(lora("cancel", "--worker", worker.address, "--name", "endless"))
    ended(endless, 1)
    lines = ended(trained(worker, file, "adds", *QUICK)).splitlines()
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines if line.startswith("step")]
    assert len(losses) == 24 and lines[0].startswith("12 examples")
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    wait_listed(stub, "adds")
    served = stub.Generate(scored("adds"))
    assert figures(served) != before
    assert figures(stub.Generate(scored())) == before
    adapted: Any = peft.PeftModel.from_pretrained(
        copy.deepcopy(made[1]._model), str(tmp_path / "adapters" / "adds")
    ).eval()
    prompt = list(stub.Tokenize(pb.TokenizeRequest(text="def add_3(a, b):\n", add_special_tokens=True)).token_ids)
    tokens = prompt + list(served.choices[0].token_ids)
    with torch.no_grad():
        logprobs = adapted(input_ids=torch.tensor([tokens[:-1]])).logits[0].float().log_softmax(dim=-1)
    for position, one in enumerate(served.choices[0].logprobs, len(prompt) - 1):
        assert one.logprob == pytest.approx(float(logprobs[position, one.token_id]), abs=1e-3)
    assert "def add" not in worker.log(), "texts never reach the log"


def test_a_prefill_worker_trains_and_decode_loads_it(service: Service, tmp_path: Path) -> None:
    folder = ("--lora.folder", str(tmp_path / "adapters"))
    prefill = service.worker("prefill", *ADMIN, *folder).wait_ready()
    decode = service.worker("decode", *ADMIN, *folder).wait_ready()
    stub = service.stub(service.gateway([prefill], [decode]))
    file = write_examples(tmp_path)
    assert "a decode worker does not train" in ended(trained(decode, file, "adds"), 1)
    assert "is saved and served" in ended(trained(prefill, file, "adds", *QUICK))
    assert "adapter adds is served" in ended(lora("load", "--worker", decode.address, "--name", "adds"))
    assert "no adapter_config.json" in ended(lora("load", "--worker", decode.address, "--name", "other"), 1)
    wait_listed(stub, "adds")
    request = scored("adds")
    request.output.ClearField("prompt_logprobs")
    answer = stub.Generate(request)
    assert answer.timing.kv_transport == "tcp", "both sides have the same weights"
    assert [program.stop() for program in service.programs] == [0] * 3


@pytest.mark.parametrize("how", ["client", "command", "stop"])
def test_a_cancelled_training_leaves_nothing(service: Service, tmp_path: Path, how: str) -> None:
    worker = service.worker("unified", *ADMIN, "--lora.folder", str(tmp_path / "adapters")).wait_ready()
    training = begun(worker, write_examples(tmp_path), "adds")
    busy = trained(worker, write_examples(tmp_path), "others")
    assert "another training is under way" in ended(busy, 1)
    if how == "client":
        training.send_signal(signal.SIGINT)
    elif how == "command":
        assert ended(lora("cancel", "--worker", worker.address, "--name", "adds")) == "cancelled\n"
    else:
        assert worker.stop() == 0
    ended(training, 1)
    assert not list((tmp_path / "adapters").glob("*")) if (tmp_path / "adapters").exists() else True
    if how != "stop":
        again = begun(worker, write_examples(tmp_path), "adds")
        ended(lora("cancel", "--worker", worker.address, "--name", "adds"))
        ended(again, 1)
        assert "1 steps" in ended(trained(worker, write_examples(tmp_path), "adds", "--batch-size", "12"))


def test_what_cannot_be_trained_says_why(service: Service, tmp_path: Path) -> None:
    file = write_examples(tmp_path)
    bare = service.worker("unified").wait_ready()
    assert "start the worker with --server.admin on" in ended(trained(bare, file, "adds"), 1)
    worker = service.worker("unified", "--server.admin", "on").wait_ready()
    assert "no lora.folder" in ended(trained(worker, file, "adds"), 1)
    for _ in range(5):  # however far the upload had come
        assert "1 to 64 letters" in ended(trained(worker, file, "../adds"), 1)
    file.write_text(json.dumps({"text": "x" * 1000}) + "\n" + 5000 * (json.dumps({"text": "y" * 1000}) + "\n"))
    assert "1 to 64 letters" in ended(trained(worker, file, "../adds"), 1)
    assert "rank is 1000, must be between 1 and 512" in ended(trained(worker, file, "adds", "--rank", "1000"), 1)
    file.write_text('{"text": "x"}\n{"prompt": 1, "completion": "x"}\n')
    assert f"{file}:2: text, prompt and completion are strings" in ended(trained(worker, file, "adds"), 2)
