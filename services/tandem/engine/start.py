"""Builds the model execution of one rank from the configuration: checkpoint, weights, pool, device."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch

from tandem.config import Config, ModelConfig
from tandem.engine.cpu import CpuDevice
from tandem.engine.cuda import CudaDevice
from tandem.engine.device import Device
from tandem.engine.host import available_memory_bytes, usable_cpus
from tandem.engine.location import Checkpoint, locate_checkpoint
from tandem.engine.models.decoder import Decoder
from tandem.engine.models.spec import DecoderSpec, read_spec
from tandem.engine.models.tensors import expected_bytes
from tandem.engine.ops.choice import choose_operators
from tandem.engine.ops.contract import Operators
from tandem.engine.pool import TORCH_DTYPES, host_pool, sized_layout
from tandem.engine.runner import PlanRunner
from tandem.engine.weights import CheckpointFiles, Weights
from tandem.errors import ConfigError
from tandem.transfer.layout import KvLayout
from tandem.transfer.memory import PoolMemory

_NO_PART_OF_KV = ("eos_token_ids", "max_context_tokens", "dtype")


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A device that is ready for plans, and what the worker has to know about it. The caller closes the device.

    `memory` is what a transfer process maps. `fingerprint` is equal for workers that may hand KV to each other;
    `numerics` is empty unless the operators are bit-exact. `weight_bytes` counts memory, not the files.
    """

    device: Device
    memory: PoolMemory
    layout: KvLayout
    spec: DecoderSpec
    fingerprint: str
    numerics: str
    operators: str
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class _Loaded:
    spec: DecoderSpec
    weights: Weights
    dtype: str  # of weights and KV
    digest: str


def start_engine(config: Config, progress: Callable[[str], None]) -> Engine:
    """Load the configured model and size its pool; raises ConfigError that says what cannot be served, and why.

    `progress` gets a line of text for people now and then. Sets torch's number of threads for this process.
    """
    kind = _device_kind(config.model)
    num_threads = config.model.threads or usable_cpus()
    torch.set_num_threads(num_threads)
    checkpoint = locate_checkpoint(config.model, progress)
    device = torch.device("cuda" if kind == "cuda" else "cpu")
    with torch.inference_mode():
        loaded = _load(config.model, checkpoint, device, progress)
        one_page = KvLayout(
            num_pages=1,
            num_layers=loaded.spec.num_layers,
            num_kv_heads=loaded.spec.num_kv_heads,
            page_tokens=config.cache.page_tokens,
            head_dim=loaded.spec.head_dim,
            dtype=loaded.dtype,
        )
        # Mapped weights are not resident yet, but will be.
        free_bytes = max(0, _free_bytes(device) - loaded.weights.num_mapped_bytes)
        layout = sized_layout(one_page, config.cache, free_bytes)
        progress(f"KV pool: {layout.num_pages} pages of {layout.page_tokens} tokens, {layout.pool_bytes / 1e9:.2f} GB")
        memory = PoolMemory.create(layout.pool_bytes)
        operators = choose_operators(config.model.ops, loaded.dtype, device, num_threads, progress)
        progress(f"operators: {operators.name}, numerics {operators.numerics or 'not claimed'}")
        decoder = Decoder(loaded.spec, loaded.weights.tensors, operators)
        ready = _build_device(config, decoder, memory, layout, device, num_threads)
    return Engine(
        device=ready,
        memory=memory,
        layout=layout,
        spec=loaded.spec,
        fingerprint=layout.fingerprint(loaded.digest),
        numerics=_numerics(operators, loaded.dtype),
        operators=operators.name,
        weight_bytes=loaded.weights.num_bytes,
    )


def _build_device(
    config: Config, decoder: Decoder, memory: PoolMemory, layout: KvLayout, device: torch.device, num_threads: int
) -> Device:
    shared = host_pool(memory, layout)
    if device.type == "cpu":
        runner = PlanRunner(decoder, shared, config.scheduler.max_running_requests)
        runner.warm_up()
        return CpuDevice(runner, num_threads)
    pool = torch.zeros(shared.shape, dtype=shared.dtype, device=device)
    runner = PlanRunner(decoder, pool, config.scheduler.max_running_requests)
    runner.warm_up()
    return CudaDevice(runner, pool, shared)


def _device_kind(config: ModelConfig) -> Literal["cpu", "cuda"]:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device: cuda asked for, but torch finds no CUDA device")
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device


def _load(
    config: ModelConfig, checkpoint: Checkpoint, device: torch.device, progress: Callable[[str], None]
) -> _Loaded:
    spec = read_spec(checkpoint.folder)
    if config.max_context_tokens > spec.max_context_tokens:
        raise ConfigError(
            f"model.max_context_tokens: {config.max_context_tokens} asked for, "
            f"the model's context is {spec.max_context_tokens}"
        )
    digest = _spec_digest(spec)
    if config.max_context_tokens:
        spec = replace(spec, max_context_tokens=config.max_context_tokens)
    began = time.monotonic()
    with CheckpointFiles(checkpoint.folder, spec) as files:
        dtype = _dtype(config, spec.dtype or files.dtype)
        progress(f"loading {spec.architecture} from {checkpoint.folder} as {dtype}")
        _check_memory(expected_bytes(spec, TORCH_DTYPES[dtype].itemsize), device)
        weights = files.load(TORCH_DTYPES[dtype], device, progress)
    progress(f"loaded {weights.num_bytes / 1e9:.2f} GB of weights in {time.monotonic() - began:.1f} s")
    whole = hashlib.sha256(f"{digest}/{weights.digest}/{checkpoint.revision}".encode()).hexdigest()[:32]
    return _Loaded(spec, weights, dtype, whole)


def _check_memory(num_bytes: int, device: torch.device) -> None:
    free_bytes = _free_bytes(device)
    if num_bytes > free_bytes:
        raise ConfigError(
            f"model.path: the weights take {num_bytes / 1e9:.2f} GB, {free_bytes / 1e9:.2f} GB of memory are free"
        )


def _spec_digest(spec: DecoderSpec) -> str:
    values = {name: value for name, value in sorted(asdict(spec).items()) if name not in _NO_PART_OF_KV}
    return hashlib.sha256(repr(values).encode()).hexdigest()


def _dtype(config: ModelConfig, checkpoint_dtype: str) -> str:
    """The type of weights and KV. float16 checkpoints become bfloat16: as small, and no overflow to guard against."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if checkpoint_dtype == "float32" else "bfloat16"


def _numerics(operators: Operators, dtype: str) -> str:
    """What must be equal for two workers' bits to be equal; empty where nothing is claimed."""
    return f"{operators.numerics}-{dtype}-tensor1-expert1" if operators.numerics else ""


def _free_bytes(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available_memory_bytes()
