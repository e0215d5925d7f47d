"""Requests of the public API to `Prepared`: checked, tokenized, every default resolved."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from google.protobuf import json_format, struct_pb2

from tandem.core.messages.sampling import SamplingParams
from tandem.gateway import validation
from tandem.gateway.limits import SEED_BITS, ModelLimits
from tandem.gateway.model_files import ModelFiles
from tandem.gateway.prepared import Output, Prepared
from tandem.gateway.tokenizer import Tokenizer
from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb


class Preparation:
    """Prepares requests for one model. `limits()` is what the workers take now; `seed()` mints a seed.

    `adapters()` are those that workers serve now, name to digest.
    """

    def __init__(
        self,
        files: ModelFiles,
        tokenizer: Tokenizer,
        *,
        limits: Callable[[], ModelLimits],
        max_prompt_bytes: int,
        seed: Callable[[], int] = lambda: secrets.randbits(SEED_BITS),
        adapters: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self.model = files.name
        self.default_sampling: SamplingParams = validation.default_sampling(files.generation_config)
        self._eos_token_ids = files.eos_token_ids
        self._vocab_size = int(files.config.get("vocab_size") or tokenizer.vocab_size)
        self._tokenizer = tokenizer
        self._limits = limits
        self._max_prompt_bytes = max_prompt_bytes
        self._seed = seed
        self._adapters = adapters

    def limits(self) -> ModelLimits:
        """What the workers take, with the model's own facts where no worker has spoken yet."""
        limits = self._limits()
        if limits.vocab_size:
            return limits
        return ModelLimits(vocab_size=self._vocab_size, eos_token_ids=self._eos_token_ids)

    async def generate(self, request: pb.GenerateRequest, request_id: str, traceparent: str = "") -> Prepared:
        """Return the request ready for dispatch; raises InvalidRequest or NotFound."""
        validation.check_model(request.model, (self.model,))
        validation.check_generate(request, self._max_prompt_bytes)
        field = request.WhichOneof("prompt") or "prompt"
        if field == "text":
            ids = await self._tokenizer.encode(request.text, add_special_tokens=True)
        else:
            ids = list(request.token_ids.ids)
        return self._prepare(request, ids, field, request_id, traceparent, echo=request.text)

    async def chat(self, request: pb.ChatRequest, request_id: str, traceparent: str = "") -> Prepared:
        """Return the chat ready for dispatch; raises InvalidRequest or NotFound."""
        validation.check_model(request.model, (self.model,))
        validation.check_chat(request, self._max_prompt_bytes)
        text, ids = await self.chat_prompt(request)
        return self._prepare(request, ids, "messages", request_id, traceparent, echo=text)

    async def chat_prompt(self, request: pb.ChatRequest) -> tuple[str, list[int]]:
        """Return the prompt that the chat template makes, as text and as ids."""
        return await self._tokenizer.encode_chat(
            [_message(message) for message in request.messages],
            tools=[] if request.tool_choice == "none" else [_tool(tool) for tool in request.tools],
            arguments=_struct(request.chat_template_kwargs),
            continue_final_message=request.continue_final_message,
        )

    def _prepare(
        self,
        request: pb.GenerateRequest | pb.ChatRequest,
        token_ids: Sequence[int],
        field: str,
        request_id: str,
        traceparent: str,
        *,
        echo: str,
    ) -> Prepared:
        digest = validation.adapter_digest(request.lora_adapter, self._adapters())
        limits = self.limits()
        validation.check_prompt(token_ids, limits, field)
        sampling = validation.resolve_sampling(
            request.sampling,
            request.stop,
            request.output,
            defaults=self.default_sampling,
            seed=self._seed(),
            prompt_tokens=len(token_ids),
            limits=limits,
        )
        output = _output(request.output, request.stop)
        if request.output.echo_prompt and not echo:
            echo = self._tokenizer.decode(token_ids, skip_special=output.skip_special)
        eos_token_ids = () if sampling.ignore_eos else limits.eos_token_ids or self._eos_token_ids
        return Prepared(
            request_id=request_id,
            model=self.model,
            prompt_token_ids=tuple(token_ids),
            sampling=sampling,
            num_sequences=request.sampling.n if request.sampling.HasField("n") else 1,
            stop_strings=tuple(dict.fromkeys(request.stop.stop)),
            end_token_ids=frozenset((*eos_token_ids, *sampling.stop_token_ids)),
            output=output,
            echo=echo if request.output.echo_prompt else "",
            priority=request.hints.priority,
            cache_salt=request.hints.cache_salt,
            adapter=request.lora_adapter,
            adapter_digest=digest,
            traceparent=traceparent,
        )


def _output(output: pb.OutputOptions, stop: pb.StopConditions) -> Output:
    return Output(
        token_ids=output.return_token_ids or output.no_text,
        text=not output.no_text,
        skip_special=output.skip_special_tokens if output.HasField("skip_special_tokens") else True,
        include_stop=stop.include_stop_in_output,
        interval_tokens=max(1, output.stream_interval),
        usage_in_every_message=output.usage_in_every_chunk,
        worker_names=output.return_timing,
    )


def _message(message: pb.ChatMessage) -> dict[str, Any]:
    """A message as templates know it: OpenAI's keys, absent where not set."""
    fields: dict[str, Any] = {"role": message.role, "content": "".join(part.text for part in message.content)}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if value := getattr(message, name):
            fields[name] = value
    if message.tool_calls:
        fields["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": _arguments(call)}}
            for call in message.tool_calls
        ]
    return fields


def _arguments(call: pb.ToolCall) -> Any:
    """Arguments as an object, which is what templates print; text that is no JSON stays text."""
    try:
        return json.loads(call.arguments)
    except ValueError:
        return call.arguments


def _tool(tool: pb.Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": _struct(tool.parameters)}
    return {"type": "function", "function": function}


def _struct(struct: struct_pb2.Struct) -> dict[str, Any]:
    """A Struct as plain values; its numbers are all doubles, so whole ones become ints."""
    return {key: _whole(value) for key, value in json_format.MessageToDict(struct).items()}


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
