"""The built-in model through the whole path: its greedy answers are fixed expectations."""

from __future__ import annotations

from pathlib import Path

from tandem.demo import examples, model_path
from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb
from tests.e2e.service import Service


def test_greedy_answers_through_prefill_and_decode(tmp_path: Path) -> None:
    service = Service(model_path(), tmp_path)
    try:
        prefill, decode = service.worker("prefill"), service.worker("decode")
        prefill.wait_ready(), decode.wait_ready()
        stub = service.stub(service.gateway([prefill], [decode]))
        for example in examples.load():
            request = pb.GenerateRequest(
                text=example.prompt,
                sampling=pb.SamplingParams(temperature=0.0, max_tokens=len(example.token_ids)),
                output=pb.OutputOptions(return_token_ids=True),
            )
            messages = list(stub.StreamGenerate(request))
            assert [token for message in messages for token in message.token_ids] == list(example.token_ids)
            assert "".join(message.text for message in messages) == example.text
            assert messages[-1].timing.kv_transport
    finally:
        service.close()
