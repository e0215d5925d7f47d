"""Every kind of bad input is INVALID_ARGUMENT with its field, over the wire, and disturbs nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import uvloop
from google.protobuf import struct_pb2

from tandem.core.messages.sampling import SamplingParams
from tandem.errors import InvalidRequest, NotFound
from tandem.gateway import validation
from tandem.gateway.limits import ModelLimits
from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb
from tests.gateway.harness import Setup, byte_worker, failure, run, running, text_request
from tests.gateway.model import model_folder

NAN, INFINITY = math.nan, math.inf


def sampled(**values: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="x", sampling=pb.SamplingParams(**values))  # type: ignore[arg-type]


def stopped(**values: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="x", stop=pb.StopConditions(**values))  # type: ignore[arg-type]


def said(*parts: pb.ContentPart, role: str = "user") -> pb.ChatMessage:
    return pb.ChatMessage(role=role, content=parts)


CASES: list[tuple[str, pb.GenerateRequest]] = [
    ("prompt", pb.GenerateRequest()),
    ("text", pb.GenerateRequest(text="")),
    ("token_ids", pb.GenerateRequest(token_ids=pb.TokenIds())),
    ("token_ids", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 258]))),
    ("token_ids", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[2**32 - 1]))),
    ("token_ids", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 501))),
    ("text", pb.GenerateRequest(text="x" * 501)),
    ("text", pb.GenerateRequest(text="x" * 10_000_000)),
    ("text", pb.GenerateRequest(text="é" * 4_500_000)),
    ("sampling.temperature", sampled(temperature=NAN)),
    ("sampling.temperature", sampled(temperature=-0.1)),
    ("sampling.temperature", sampled(temperature=INFINITY)),
    ("sampling.top_p", sampled(top_p=0.0)),
    ("sampling.top_p", sampled(top_p=1.1)),
    ("sampling.top_p", sampled(top_p=NAN)),
    ("sampling.top_k", sampled(top_k=-2)),
    ("sampling.min_p", sampled(min_p=-0.1)),
    ("sampling.min_p", sampled(min_p=1.5)),
    ("sampling.presence_penalty", sampled(presence_penalty=2.5)),
    ("sampling.frequency_penalty", sampled(frequency_penalty=-3)),
    ("sampling.frequency_penalty", sampled(frequency_penalty=NAN)),
    ("sampling.repetition_penalty", sampled(repetition_penalty=0)),
    ("sampling.repetition_penalty", sampled(repetition_penalty=-INFINITY)),
    ("sampling.max_tokens", sampled(max_tokens=512)),
    ("sampling.max_tokens", sampled(max_tokens=2**32 - 1)),
    ("sampling.min_tokens", sampled(min_tokens=9, max_tokens=8)),
    ("sampling.n", sampled(n=0)),
    ("sampling.n", sampled(n=65)),
    ("sampling.n", sampled(n=2**32 - 1)),
    ("sampling.logit_bias", sampled(logit_bias={258: 1.0})),
    ("sampling.logit_bias", sampled(logit_bias={3: 101.0})),
    ("sampling.logit_bias", sampled(logit_bias={3: NAN})),
    ("sampling.logit_bias", sampled(logit_bias=dict.fromkeys(range(1025), 1.0))),
    ("sampling.json_schema", sampled(json_schema="{}")),
    ("sampling.json_object", sampled(json_object=True)),
    ("sampling.regex", sampled(regex="a*")),
    ("sampling.ebnf_grammar", sampled(ebnf_grammar="a")),
    ("sampling.structural_tag", sampled(structural_tag="a")),
    ("sampling.choice", sampled(choice=pb.Choices(choices=["a"]))),
    ("sampling.extra", sampled(extra=struct_pb2.Struct(fields={"beam": struct_pb2.Value(number_value=1)}))),
    ("stop.stop", stopped(stop=[""])),
    ("stop.stop", stopped(stop=["x" * 257])),
    ("stop.stop", stopped(stop=[str(i) for i in range(33)])),
    ("stop.stop_token_ids", stopped(stop_token_ids=[258])),
    ("stop.stop_token_ids", stopped(stop_token_ids=[1] * 257)),
    ("output.logprobs", pb.GenerateRequest(text="x", output=pb.OutputOptions(logprobs=21))),
    ("output.prompt_logprobs", pb.GenerateRequest(text="x", output=pb.OutputOptions(prompt_logprobs=21))),
    ("hints.cache_salt", pb.GenerateRequest(text="x", hints=pb.RoutingHints(cache_salt="s" * 257))),
    ("request_id", pb.GenerateRequest(text="x", request_id="a\nb")),
    ("request_id", pb.GenerateRequest(text="x", request_id="a" * 129)),
]
CHATS: list[tuple[str, pb.ChatRequest]] = [
    ("messages", pb.ChatRequest()),
    ("messages", pb.ChatRequest(messages=[said(pb.ContentPart(text="x" * 10_000_000))])),
    ("messages", pb.ChatRequest(messages=[said() for _ in range(4097)])),
    ("messages", pb.ChatRequest(messages=[said(role="bad")])),
    ("messages[1].role", pb.ChatRequest(messages=[said(), said(role="")])),
    ("messages[0].content", pb.ChatRequest(messages=[said(pb.ContentPart(image=pb.MediaRef(url="u")))])),
    ("messages[0].content", pb.ChatRequest(messages=[said(pb.ContentPart(audio=pb.MediaRef(url="u")))])),
    ("tools", pb.ChatRequest(messages=[said()], tools=[pb.Tool(name="t")] * 257)),
    ("tool_choice", pb.ChatRequest(messages=[said()], tool_choice="required")),
    (
        "chat_template_kwargs",
        pb.ChatRequest(
            messages=[said()], chat_template_kwargs=struct_pb2.Struct(fields={"messages": struct_pb2.Value()})
        ),
    ),
    ("continue_final_message", pb.ChatRequest(messages=[said()], continue_final_message=True)),
    ("sampling.top_p", pb.ChatRequest(messages=[said()], sampling=pb.SamplingParams(top_p=2))),
]


def test_every_bad_input_names_its_field_and_disturbs_nothing(tmp_path: Path) -> None:
    async def check(setup: Setup, field: str, call: object, what: str) -> None:
        code, error = await failure(call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT, (what, error)
        assert isinstance(error, InvalidRequest)
        assert error.field == field, (what, error)
        assert error.message, what

    async def scenario(setup: Setup) -> None:
        good = setup.stub.StreamGenerate(text_request("ab", max_tokens=300))
        for field, request in CASES:
            await check(setup, field, setup.stub.Generate(request), str(request)[:100])
            await check(setup, field, setup.stub.StreamGenerate(request), str(request)[:100])
        for field, chat in CHATS:
            await check(setup, field, setup.stub.Chat(chat), str(chat)[:100])
            await check(setup, field, setup.stub.StreamChat(chat), str(chat)[:100])
        assert len(setup.worker.submits) == 1
        messages = [message async for message in good]
        assert messages[-1].usage.completion_tokens == 300
        assert setup.gateway.admission.inflight == 0

    run(tmp_path, scenario, byte_worker(step_seconds=0.001))


def test_other_calls_check_their_input_too(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        stub = setup.stub
        for field, call in (
            ("input", stub.Tokenize(pb.TokenizeRequest())),
            ("text", stub.Tokenize(pb.TokenizeRequest(text=""))),
            ("text", stub.Tokenize(pb.TokenizeRequest(text="x" * 10_000_000))),
            ("messages", stub.Tokenize(pb.TokenizeRequest(chat=pb.ChatRequest()))),
            ("token_ids", stub.Detokenize(pb.DetokenizeRequest(token_ids=[258]))),
        ):
            code, error = await failure(call)
            assert (code, getattr(error, "field", None)) == (grpc.StatusCode.INVALID_ARGUMENT, field)
        for call in (
            stub.Generate(pb.GenerateRequest(model="other", text="x")),
            stub.Tokenize(pb.TokenizeRequest(model="other", text="x")),
        ):
            code, error = await failure(call)
            assert code is grpc.StatusCode.NOT_FOUND
            assert isinstance(error, NotFound)

    run(tmp_path, scenario)


def test_unsupported_features_say_so(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        _, error = await failure(setup.stub.Generate(sampled(regex="a*")))
        assert error.reason == "UNSUPPORTED"
        assert "regex" in error.message

    run(tmp_path, scenario)


def test_a_model_without_a_chat_template_refuses_chats(tmp_path: Path) -> None:
    model_folder(tmp_path, template=None)

    async def scenario(setup: Setup) -> None:
        code, error = await failure(setup.stub.Chat(pb.ChatRequest(messages=[said()])))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "no chat template" in error.message

    run(tmp_path, scenario)


def test_defaults_come_from_the_generation_config(tmp_path: Path) -> None:
    model_folder(tmp_path, temperature=0.25, top_p=0.5, top_k=20, repetition_penalty=1.5, do_sample=False)

    async def main() -> None:
        async with running(tmp_path, [byte_worker()]) as setup:
            await setup.stub.Generate(text_request("x"))
            await setup.stub.Generate(sampled(temperature=0.0, top_k=-1, max_tokens=1))
            first, second = (submit.sampling for submit in setup.worker.submits)
            assert (first.temperature, first.top_p, first.top_k, first.repetition_penalty) == (0.25, 0.5, 20, 1.5)
            assert (second.temperature, second.top_p, second.top_k) == (0.0, 0.5, 0)

    uvloop.run(main())


def resolve(limits: ModelLimits, prompt_tokens: int, **values: object) -> SamplingParams:
    return validation.resolve_sampling(
        pb.SamplingParams(**values),  # type: ignore[arg-type]
        pb.StopConditions(),
        pb.OutputOptions(),
        defaults=SamplingParams(),
        seed=3,
        prompt_tokens=prompt_tokens,
        limits=limits,
    )


def test_without_max_tokens_the_answer_may_fill_the_context() -> None:
    assert resolve(ModelLimits(max_context_tokens=100, max_total_tokens=1000), 30).max_tokens == 70
    assert resolve(ModelLimits(max_context_tokens=100, max_total_tokens=50), 30).max_tokens == 20
    with pytest.raises(InvalidRequest, match="no room"):
        resolve(ModelLimits(max_context_tokens=100), 100)
    assert resolve(ModelLimits(max_context_tokens=100), 100, max_tokens=0).max_tokens == 0
    with pytest.raises(InvalidRequest, match="only 20 fit"):
        resolve(ModelLimits(max_context_tokens=100, max_total_tokens=50), 30, max_tokens=21)


def test_sampling_details() -> None:
    unlimited = ModelLimits()
    params = resolve(unlimited, 1, temperature=1e-9)
    assert (params.temperature, params.seed) == (0.0, 3)
    assert resolve(unlimited, 1, seed=-5).seed == -5


@pytest.mark.parametrize(
    ("check", "text"),
    [(validation.check_text, "x" * 11), (validation.check_text, "é" * 6), (validation.check_text, "")],
)
def test_text_is_measured_in_bytes(check: Callable[[str, int, str], None], text: str) -> None:
    check("x" * 10, 10, "text")
    check("é" * 5, 10, "text")
    with pytest.raises(InvalidRequest):
        check(text, 10, "text")


def test_model_defaults_out_of_range_are_refused() -> None:
    with pytest.raises(InvalidRequest):
        validation.default_sampling({"temperature": -1.0})
    assert validation.default_sampling({"temperature": None, "top_k": -1, "eos_token_id": 3}) == SamplingParams()
