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

_SAMPLING_COPIES = 2  # float32 copies of a plan's logits: themselves, and what sampling makes of them
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
    checkpoint = locate_checkpoint(config.model, progress)
    device = torch.device("cuda" if kind == "cuda" else "cpu")
    with torch.inference_mode():
        spec = _spec(config.model, checkpoint)
        with CheckpointFiles(checkpoint.folder, spec) as files:
            loaded = _load(config, checkpoint, spec, files, device, progress)
            operators = choose_operators(config.model.ops, loaded.dtype, device, num_threads, progress)
            progress(f"operators: {operators.name}, numerics {operators.numerics or 'not claimed'}")
            # The C++ operators have threads of their own; torch has little left to do, its pool would be in the way.
            torch.set_num_threads(1 if operators.packs_weights else num_threads)
            decoder = _build_decoder(loaded, operators, progress)
        layout = _sized_layout(config, loaded, operators, decoder, device)
        progress(f"KV pool: {layout.num_pages} pages of {layout.page_tokens} tokens, {layout.pool_bytes / 1e9:.2f} GB")
        memory = PoolMemory.create(layout.pool_bytes)
        ready = _build_device(config, decoder, memory, layout, device, num_threads)
    return Engine(
        device=ready,
        memory=memory,
        layout=layout,
        spec=loaded.spec,
        fingerprint=layout.fingerprint(loaded.digest, loaded.spec.num_layers, loaded.spec.num_kv_heads),
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


def _spec(config: ModelConfig, checkpoint: Checkpoint) -> DecoderSpec:
    spec = read_spec(checkpoint.folder)
    if config.max_context_tokens > spec.max_context_tokens:
        raise ConfigError(
            f"model.max_context_tokens: {config.max_context_tokens} asked for, "
            f"the model's context is {spec.max_context_tokens}"
        )
    return spec


def _load(
    config: Config,
    checkpoint: Checkpoint,
    spec: DecoderSpec,
    files: CheckpointFiles,
    device: torch.device,
    progress: Callable[[str], None],
) -> _Loaded:
    digest = _spec_digest(spec)
    if config.model.max_context_tokens:
        spec = replace(spec, max_context_tokens=config.model.max_context_tokens)
    dtype = _dtype(config.model, spec.dtype or files.dtype)
    progress(f"loading {spec.architecture} from {checkpoint.folder} as {dtype}")
    _check_memory(expected_bytes(spec, TORCH_DTYPES[dtype].itemsize), config.parallel.data_size, device)
    weights = files.load(TORCH_DTYPES[dtype], device, progress)
    whole = hashlib.sha256(f"{digest}/{weights.digest}/{checkpoint.revision}".encode()).hexdigest()[:32]
    return _Loaded(spec, weights, dtype, whole)


def _build_decoder(loaded: _Loaded, operators: Operators, progress: Callable[[str], None]) -> Decoder:
    """Bring the weights to where they are computed with."""
    began = time.monotonic()
    decoder = Decoder(loaded.spec, loaded.weights.tensors, operators)
    verb = "packed" if operators.packs_weights else "loaded"
    progress(f"{verb} {loaded.weights.num_bytes / 1e9:.2f} GB of weights in {time.monotonic() - began:.1f} s")
    return decoder


def _sized_layout(
    config: Config, loaded: _Loaded, operators: Operators, decoder: Decoder, device: torch.device
) -> KvLayout:
    """The pool takes its share of what weights and workspace leave; both are there by now, though not all touched."""
    spec = loaded.spec
    one_page = KvLayout(
        num_pages=1,
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        page_tokens=config.cache.page_tokens,
        head_dim=spec.head_dim,
        dtype=loaded.dtype,
    )
    budget_tokens = config.scheduler.budget_tokens
    shaped_pool = torch.empty((1, *one_page.page_shape), dtype=TORCH_DTYPES[loaded.dtype], device=device)
    decoder.reserve(budget_tokens, shaped_pool)
    sampled = min(budget_tokens, config.scheduler.max_running_requests)
    taken = operators.workspace_bytes + _SAMPLING_COPIES * sampled * spec.vocab_size * 4
    if not operators.packs_weights:
        taken += loaded.weights.num_mapped_bytes  # not resident yet, but they will be
    taken += (config.parallel.data_size - 1) * loaded.weights.num_bytes  # of replicas that start after this one
    return sized_layout(one_page, config.cache, max(0, _free_bytes(device) - taken))


def _check_memory(num_bytes: int, num_replicas: int, device: torch.device) -> None:
    free_bytes = _free_bytes(device)
    if num_replicas * num_bytes > free_bytes:
        times = f"{num_replicas} (parallel.data_size) times " if num_replicas > 1 else ""
        raise ConfigError(
            f"model.path: the weights take {times}{num_bytes / 1e9:.2f} GB, {free_bytes / 1e9:.2f} GB of memory are "
            "free"
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
