"""`tandem generate` and `tandem chat`: one request to a running gateway, its answer streamed to the terminal."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from grpc import aio

from tandem.certificates import of_client
from tandem.errors import ConfigError, TandemError, Unavailable
from tandem.rpc.channels import open_channel, why_not_connected
from tandem.rpc.gen.inference.v1 import inference_service_pb2 as inference_pb2
from tandem.rpc.gen.inference.v1 import inference_service_pb2_grpc as inference_grpc
from tandem.rpc.options import GATEWAY_MESSAGE_BYTES
from tandem.rpc.status import from_rpc_error
from tandem.rpc.tls import ClientTls

_CONNECT_SECONDS = 5.0
_REMEDIES = {  # by a part of the reason
    "may want TLS": "if it has TLS, say --tls and, for an authority of your own, --tls-ca-file",
    "wants a certificate": "show one with --tls-certificate-file and --tls-key-file, or leave --tls away",
    "not from the authorities": "name the authority of its certificate with --tls-ca-file",
    "another name": "give the name in its certificate with --tls-server-name",
    "does not speak TLS": "leave --tls and its files away",
}


@dataclass(slots=True)
class Answer:
    """What a stream gave, and when: seconds are counted from the request."""

    text: str = ""
    first_token_seconds: float = 0.0
    total_seconds: float = 0.0
    num_messages: int = 0
    finish_reason: str = ""
    usage: inference_pb2.Usage = field(default_factory=inference_pb2.Usage)
    timing: inference_pb2.Timing = field(default_factory=inference_pb2.Timing)
    token_ids: list[int] = field(default_factory=list)

    @property
    def tpot_seconds(self) -> float:
        """Seconds from one token to the next, on average."""
        return (self.total_seconds - self.first_token_seconds) / max(1, self.usage.completion_tokens - 1)


async def generate(arguments: argparse.Namespace) -> int:
    """Continue a text or a list of token ids."""
    request = inference_pb2.GenerateRequest(
        model=arguments.model,
        lora_adapter=arguments.adapter,
        sampling=_sampling(arguments),
        stop=inference_pb2.StopConditions(stop=arguments.stop),
        output=inference_pb2.OutputOptions(return_timing=True, return_token_ids=True),
    )
    if arguments.token_ids:
        request.token_ids.ids.extend(_token_ids(arguments.token_ids))
    else:
        request.text = _text(arguments)
    return await _show(arguments, request)


async def chat(arguments: argparse.Namespace) -> int:
    """Answer one message, in the model's chat template."""
    request = inference_pb2.ChatRequest(
        model=arguments.model,
        lora_adapter=arguments.adapter,
        sampling=_sampling(arguments),
        stop=inference_pb2.StopConditions(stop=arguments.stop),
        output=inference_pb2.OutputOptions(return_timing=True),
    )
    if arguments.system:
        request.messages.add(role="system", content=[inference_pb2.ContentPart(text=arguments.system)])
    request.messages.add(role="user", content=[inference_pb2.ContentPart(text=_text(arguments))])
    return await _show(arguments, request)


async def ask(
    address: str,
    request: inference_pb2.GenerateRequest | inference_pb2.ChatRequest,
    write: Callable[[str], object],
    timeout_seconds: float | None = None,
    tls: ClientTls | None = None,
) -> Answer:
    """Send a request and `write` the text as it comes. Raises the error that the gateway answers with."""
    answer = Answer()
    async with open_channel(address, max_message_bytes=GATEWAY_MESSAGE_BYTES, tls=tls) as channel:
        await _connect(channel, address, tls)
        stub = inference_grpc.InferenceServiceStub(channel)
        began = time.monotonic()
        call = (
            stub.StreamChat(request, timeout=timeout_seconds)
            if isinstance(request, inference_pb2.ChatRequest)
            else stub.StreamGenerate(request, timeout=timeout_seconds)
        )
        try:
            async for message in call:
                _add(answer, message, time.monotonic() - began)
                write(message.text)
        except aio.AioRpcError as error:
            raise from_rpc_error(error) from error
    return answer


async def _connect(channel: aio.Channel, address: str, tls: ClientTls | None) -> None:
    """Wait for the connection. Raises Unavailable with the reason and what to do about it."""
    try:
        await asyncio.wait_for(channel.channel_ready(), _CONNECT_SECONDS)
    except TimeoutError:
        reason = await why_not_connected(channel, secure=tls is not None)
        advice = "start one with `tandem up`, or name it with --address"
        for sign, remedy in _REMEDIES.items():
            if sign in reason:
                advice = remedy
        told = f" ({reason})" if reason else ""
        raise Unavailable(f"no gateway answers at {address}{told}; {advice}") from None


def tls_of(arguments: argparse.Namespace) -> ClientTls | None:
    """Return what the flags ask for, None for plaintext. Raises ConfigError."""
    files = (arguments.tls_ca_file, arguments.tls_certificate_file, arguments.tls_key_file)
    if not arguments.tls and not arguments.tls_server_name and not any(files):
        return None
    pem = of_client(*files)
    return ClientTls(lambda: pem, arguments.tls_server_name)


def _add(answer: Answer, message: inference_pb2.StreamGenerateResponse, seconds: float) -> None:
    if not answer.num_messages:
        answer.first_token_seconds = seconds
    answer.num_messages += 1
    answer.total_seconds = seconds
    answer.text += message.text
    answer.token_ids.extend(message.token_ids)
    if message.finish_reason:
        name = inference_pb2.FinishReason.Name(message.finish_reason)
        answer.finish_reason = name.removeprefix("FINISH_REASON_").lower()
    if message.HasField("usage"):
        answer.usage = message.usage
    if message.HasField("timing"):
        answer.timing = message.timing


async def _show(
    arguments: argparse.Namespace, request: inference_pb2.GenerateRequest | inference_pb2.ChatRequest
) -> int:
    written = False
    tls = tls_of(arguments)

    def write(text: str) -> None:
        nonlocal written
        written = written or bool(text)
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        answer = await ask(arguments.address, request, write, arguments.timeout, tls)
    except TandemError as error:
        if written:
            print()
        print(f"tandem: {error.message}", file=sys.stderr)
        return 1
    print()
    if arguments.stats:
        print("\n".join(statistics(answer)), file=sys.stderr)
        if answer.token_ids:
            print("token ids   " + ",".join(str(token_id) for token_id in answer.token_ids), file=sys.stderr)
    return 0


def statistics(answer: Answer) -> list[str]:
    """Return how an answer came about, a line for each fact."""
    usage, timing = answer.usage, answer.timing
    lines = [
        f"tokens      {usage.prompt_tokens} prompt ({usage.cached_tokens} cached), {usage.completion_tokens} answer, "
        f"ended by {answer.finish_reason or 'nothing'}",
        f"TTFT        {answer.first_token_seconds * 1000:.1f} ms",
        f"TPOT        {answer.tpot_seconds * 1000:.1f} ms ({1 / max(answer.tpot_seconds, 1e-9):.0f} tokens/s)",
    ]
    if timing.kv_bytes:
        seconds = timing.kv_transfer.ToNanoseconds() / 1e9
        rate = f", {timing.kv_bytes / seconds / 1e6:.0f} MB/s" if seconds > 0 else ""
        lines.append(
            f"KV          {timing.kv_bytes / 1e6:.2f} MB handed over in {seconds * 1000:.1f} ms{rate}, "
            f"over {timing.kv_transport}"
        )
    else:
        lines.append("KV          nothing handed over: the prompt was computed where it was decoded")
    return lines


def _sampling(arguments: argparse.Namespace) -> inference_pb2.SamplingParams:
    return inference_pb2.SamplingParams(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )


def _text(arguments: argparse.Namespace) -> str:
    text = arguments.text if arguments.text is not None else sys.stdin.read()
    if not text:
        raise ConfigError('give a text, as in `tandem generate "def main("`, or write it to stdin')
    return str(text)


def _token_ids(text: str) -> list[int]:
    try:
        token_ids = [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ConfigError(f"--token-ids {text}: write numbers with commas between them") from None
    if any(not 0 <= token_id < 1 << 32 for token_id in token_ids):
        raise ConfigError("--token-ids: ids are not negative and fit 32 bits")
    return token_ids
