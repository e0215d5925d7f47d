"""The public API over real sockets, before fake workers: streams, unary calls, chat, n, output options, metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpc import aio

from tandem.core import token_ids
from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb
from tests.fakes.worker import hashed_token, scripted
from tests.gateway.harness import Setup, byte_worker, collect, failure, run, text_request
from tests.gateway.model import END, ids_of


def test_stream_is_deltas_and_ends_with_usage_and_timing(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        messages = await collect(setup.stub.StreamGenerate(text_request("ab", max_tokens=5)))
        assert "".join(message.text for message in messages) == "hello"
        assert messages[0].request_id
        assert messages[0].model == "m"
        assert all(not message.HasField("usage") for message in messages[:-1])
        last = messages[-1]
        assert last.finish_reason == pb.FINISH_REASON_LENGTH
        assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.cached_tokens) == (2, 5, 1)
        assert last.timing.kv_bytes == 4096
        assert last.timing.decode_worker == ""
        assert not setup.worker.inflight

    run(tmp_path, scenario, byte_worker(token=scripted(ids_of("hello"))))


def test_unary_call_gives_the_same_answer_whole(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        request = text_request("ab", max_tokens=5, output=pb.OutputOptions(return_timing=True, return_token_ids=True))
        answer = await setup.stub.Generate(request)
        (choice,) = answer.choices
        assert choice.text == "hello"
        assert list(choice.token_ids) == ids_of("hello")
        assert list(answer.prompt_token_ids) == ids_of("ab")
        assert answer.timing.decode_worker == setup.worker.address
        assert answer.usage.completion_tokens == 5

    run(tmp_path, scenario, byte_worker(token=scripted(ids_of("hello"))))


def test_token_ids_in_and_out_without_text(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        prompt = [5, 6, 7]
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt),
            sampling=pb.SamplingParams(max_tokens=6),
            stop=pb.StopConditions(ignore_eos=True),
            output=pb.OutputOptions(no_text=True),
        )
        messages = await collect(setup.stub.StreamGenerate(request))
        got = [token for message in messages for token in message.token_ids]
        assert got == [hashed_token(prompt, i) % 258 for i in range(6)]
        assert list(messages[0].prompt_token_ids) == prompt
        assert all(not message.text for message in messages)

    run(tmp_path, scenario, byte_worker(token=lambda prompt, index: hashed_token(prompt, index) % 258))


def test_characters_of_several_tokens_are_never_split(tmp_path: Path) -> None:
    text = "aé€😀ü."

    async def scenario(setup: Setup) -> None:
        messages = await collect(setup.stub.StreamGenerate(text_request("x", max_tokens=len(text.encode()))))
        texts = [message.text for message in messages if message.text]
        assert "".join(texts) == text
        assert "\ufffd" not in "".join(texts)

    run(tmp_path, scenario, byte_worker(token=scripted(ids_of(text))))


def test_an_answer_cut_inside_a_character_shows_the_replacement(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        messages = await collect(setup.stub.StreamGenerate(text_request("x", max_tokens=2)))
        assert "".join(message.text for message in messages) == "a\ufffd"

    run(tmp_path, scenario, byte_worker(token=scripted(ids_of("a€"))))


def test_eos_ends_the_answer_and_is_not_shown(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        for stop, expected in (
            (pb.StopConditions(), "hi"),
            (pb.StopConditions(stop_token_ids=ids_of("i")), "h"),
            (pb.StopConditions(stop_token_ids=ids_of("i"), include_stop_in_output=True), "hi"),
        ):
            messages = await collect(setup.stub.StreamGenerate(text_request("x", stop=stop)))
            assert "".join(message.text for message in messages) == expected
            assert messages[-1].finish_reason == pb.FINISH_REASON_STOP
            assert messages[-1].stop_token_id == (stop.stop_token_ids[0] if stop.stop_token_ids else END)

    run(tmp_path, scenario, byte_worker(token=scripted([*ids_of("hi"), END])))


def test_special_tokens_are_shown_on_request(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        for skip, expected in ((None, "ab"), (True, "ab"), (False, "a<|special|>b")):
            output = pb.OutputOptions(skip_special_tokens=skip)
            answer = await setup.stub.Generate(text_request("x", max_tokens=3, output=output))
            assert answer.choices[0].text == expected

    run(tmp_path, scenario, byte_worker(token=scripted([*ids_of("a"), 1, *ids_of("b")])))


def test_n_answers_have_their_own_seeds_and_all_end(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        sampling = pb.SamplingParams(n=3, seed=7)
        messages = await collect(setup.stub.StreamGenerate(text_request("x", max_tokens=4, sampling=sampling)))
        for index in range(3):
            mine = [message for message in messages if message.index == index]
            assert "".join(message.text for message in mine) == "hell"
            assert [message.finish_reason for message in mine].count(pb.FINISH_REASON_LENGTH) == 1
        assert [message.HasField("usage") for message in messages].count(True) == 1
        assert messages[-1].usage.completion_tokens == 12
        assert messages[-1].usage.prompt_tokens == 1
        assert sorted(submit.sampling.seed for submit in setup.worker.submits) == [7, 8, 9]
        answer = await setup.stub.Generate(text_request("x", max_tokens=4, sampling=sampling))
        assert [choice.index for choice in answer.choices] == [0, 1, 2]

    run(tmp_path, scenario, byte_worker(token=scripted(ids_of("hello"))))


def test_seeds_are_minted_and_wrap(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        await setup.stub.Generate(text_request("x"))
        await setup.stub.Generate(text_request("x"))
        sampling = pb.SamplingParams(n=2, seed=2**63 - 1)
        await setup.stub.Generate(text_request("x", sampling=sampling))
        seeds = [submit.sampling.seed for submit in setup.worker.submits]
        assert seeds[0] != seeds[1]
        assert seeds[2:] == [2**63 - 1, -(2**63)]

    run(tmp_path, scenario)


def test_logprobs_name_the_tokens_bytes(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        output = pb.OutputOptions(logprobs=2, prompt_logprobs=0)
        messages = await collect(setup.stub.StreamGenerate(text_request("ab", max_tokens=3, output=output)))
        logprobs = [value for message in messages for value in message.logprobs]
        assert [value.token for value in logprobs] == [b"h", b"\xc3", b"\xa9"]
        assert [len(value.top) for value in logprobs] == [2, 2, 2]
        assert logprobs[0].top[0].token == b"<|end|>"
        (prompt,) = [message.prompt_logprobs for message in messages if message.prompt_logprobs]
        assert [value.token for value in prompt] == [b"a", b"b"]
        assert not prompt[0].HasField("logprob")
        assert prompt[1].logprob == -1.0

    run(tmp_path, scenario, byte_worker(token=scripted(ids_of("hé"))))


def test_max_tokens_zero_scores_the_prompt(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        request = text_request("abc", max_tokens=0, output=pb.OutputOptions(prompt_logprobs=1))
        answer = await setup.stub.Generate(request)
        assert answer.choices[0].text == ""
        assert answer.choices[0].finish_reason == pb.FINISH_REASON_LENGTH
        assert len(answer.prompt_logprobs) == 3
        assert answer.usage.completion_tokens == 0
        (message,) = await collect(setup.stub.StreamGenerate(request))
        assert len(message.prompt_logprobs) == 3

    run(tmp_path, scenario)


def test_output_options(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        request = text_request("ab", max_tokens=5, output=pb.OutputOptions(echo_prompt=True))
        messages = await collect(setup.stub.StreamGenerate(request))
        assert "".join(message.text for message in messages) == "abhello"
        request = text_request("ab", max_tokens=10, output=pb.OutputOptions(stream_interval=4))
        messages = await collect(setup.stub.StreamGenerate(request))
        assert "".join(message.text for message in messages) == "hellohello"
        assert len(messages[0].text) < 4  # the first token does not wait
        assert all(len(message.text) >= 4 for message in messages[1:-1])
        request = text_request("ab", max_tokens=5, output=pb.OutputOptions(usage_in_every_chunk=True))
        messages = await collect(setup.stub.StreamGenerate(request))
        counts = [message.usage.completion_tokens for message in messages]
        assert counts == sorted(counts)
        assert counts[0] >= 1
        assert counts[-1] == 5

    run(tmp_path, scenario, byte_worker(token=scripted(ids_of("hello")), step_seconds=0.005))


def test_chat_goes_through_the_template(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        request = pb.ChatRequest(
            messages=[message("system", "be brief"), message("user", "hi")], sampling=pb.SamplingParams(max_tokens=5)
        )
        assert (await setup.stub.Chat(request)).choices[0].text == "hello"
        assert "".join(m.text for m in await collect(setup.stub.StreamChat(request))) == "hello"
        prompt = token_ids.unpack(setup.worker.submits[-1].prompt_token_ids)
        assert prompt == ids_of("[system]be brief[user]hi[assistant]")
        request.chat_template_kwargs.update({"style": "poetry"})
        request.messages.append(message("assistant", "well"))
        request.continue_final_message = True
        tokenized = await setup.stub.Tokenize(pb.TokenizeRequest(chat=request))
        assert list(tokenized.token_ids) == ids_of("[system]be brief[user]hi[assistant]well")
        request.messages[0].role = "bad"
        _, error = await failure(setup.stub.Chat(request))
        assert "no such role" in error.message

    run(tmp_path, scenario, byte_worker(token=scripted(ids_of("hello"))))


def test_request_ids_are_echoed(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        async def id_of(request: pb.GenerateRequest, *metadata: tuple[str, str]) -> tuple[str, str]:
            call = setup.stub.Generate(request, metadata=metadata)
            initial = dict(await call.initial_metadata())
            return initial["x-request-id"], (await call).request_id

        assert await id_of(text_request("x", request_id="field"), ("x-request-id", "meta")) == ("meta", "meta")
        assert await id_of(text_request("x", request_id="field")) == ("field", "field")
        minted, same = await id_of(text_request("x"))
        assert minted == same
        assert len(minted) == 32
        assert [submit.request_id for submit in setup.worker.submits] == ["meta", "field", minted]
        await setup.stub.Generate(text_request("x"), metadata=(("traceparent", "00-1-2-01"),))
        assert setup.worker.submits[-1].traceparent == "00-1-2-01"

    run(tmp_path, scenario)


def test_tokenize_detokenize_and_models(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        tokenized = await setup.stub.Tokenize(pb.TokenizeRequest(text="héllo"))
        assert list(tokenized.token_ids) == ids_of("héllo")
        request = pb.DetokenizeRequest(token_ids=[*ids_of("héllo"), END], skip_special_tokens=True)
        assert (await setup.stub.Detokenize(request)).text == "héllo"
        (model,) = (await setup.stub.ListModels(pb.ListModelsRequest())).models
        assert (model.id, model.vocab_size, model.max_context_tokens) == ("m", 258, 512)
        assert list(model.eos_token_ids) == [END]
        assert (model.ready_prefill_workers, model.ready_decode_workers) == (0, 1)
        assert len(model.chat_template_sha256) == 64

    run(tmp_path, scenario)


def test_health_and_reflection(tmp_path: Path) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING

    async def status_of(channel: aio.Channel, service: str) -> int:
        health: Any = health_pb2_grpc.HealthStub(channel)
        reply = await health.Check(health_pb2.HealthCheckRequest(service=service))
        return int(reply.status)

    async def scenario(setup: Setup) -> None:
        names = ("", "tandem.inference.v1.InferenceService", "readiness")
        for name in (*names, "liveness"):
            assert await status_of(setup.channel, name) == serving
        channel: Any = setup.channel
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        reflection: Any = reflection_pb2
        requests = [reflection.ServerReflectionRequest(list_services="")]
        (reply,) = [reply async for reply in stub.ServerReflectionInfo(iter(requests))]
        services = {service.name for service in reply.list_services_response.service}
        assert {"tandem.inference.v1.InferenceService", "grpc.health.v1.Health"} <= services
        await setup.worker.kill()
        health: Any = health_pb2_grpc.HealthStub(setup.channel)
        changes = health.Watch(health_pb2.HealthCheckRequest(service=""))
        async for reply in changes:
            if reply.status == not_serving:
                break
        changes.cancel()
        for name in names:
            assert await status_of(setup.channel, name) == not_serving
        assert await status_of(setup.channel, "liveness") == serving

    run(tmp_path, scenario)


def message(role: str, text: str) -> pb.ChatMessage:
    return pb.ChatMessage(role=role, content=[pb.ContentPart(text=text)])
