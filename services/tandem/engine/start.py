"""Builds the model execution of one rank from the configuration: checkpoint, weights, pool, device."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from fractions import Fraction

import torch

from tandem.config import Config, ModelConfig, ParallelConfig
from tandem.engine.collectives import Meeting, RankLinks, connect
from tandem.engine.cpu import CpuDevice
from tandem.engine.cuda import CudaDevice
from tandem.engine.device import Device
from tandem.engine.heap import keep_freed_memory
from tandem.engine.host import available_memory_bytes
from tandem.engine.location import Checkpoint, locate_checkpoint
from tandem.engine.lora.start import LoraEngine, load_adapters
from tandem.engine.models.decoder import Decoder
from tandem.engine.models.part import ModelPart
from tandem.engine.models.spec import DecoderSpec, read_spec
from tandem.engine.ops.choice import choose_operators
from tandem.engine.ops.contract import Operators, Profiler
from tandem.engine.place import RankPlace
from tandem.engine.pool import TORCH_DTYPES, host_pool, sized_layout, take_pool
from tandem.engine.rank_device import rank_device, rank_threads, ranks_here, uses_nccl
from tandem.engine.runner import PlanRunner
from tandem.engine.sampler import sampling_bytes
from tandem.engine.weights import CheckpointFiles, Weights
from tandem.errors import ConfigError
from tandem.transfer.layout import KvLayout
from tandem.transfer.memory import PoolMemory

_NO_PART_OF_KV = ("eos_token_ids", "max_context_tokens", "dtype")


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A device that is ready for plans, and what the worker has to know about it. The caller closes the device.

    `memory` is what a transfer process maps. `fingerprint` is equal for workers that may hand KV to each other;
    `numerics` is empty unless the operators are bit-exact. `weight_bytes` counts memory, not the files. `profiler` may
    be used while the device has no plan.
    """

    device: Device
    memory: PoolMemory
    layout: KvLayout
    spec: DecoderSpec
    fingerprint: str
    numerics: str
    operators: str
    weight_bytes: int
    lora: LoraEngine
    profiler: Profiler | None


@dataclass(frozen=True, slots=True)
class _Loaded:
    spec: DecoderSpec
    weights: Weights
    dtype: str  # of weights and KV
    digest: str


def start_engine(
    config: Config, progress: Callable[[str], None], place: RankPlace | None = None, meeting: Meeting | None = None
) -> Engine:
    """Load the configured model and size its pool; raises ConfigError that says what cannot be served, and why.

    `progress` gets a line of text for people now and then. Sets torch's number of threads and the C library's
    allocator for this process.
    One of several ranks (`place`) needs to know where they meet; it waits for the others, before it loads and again
    before the pool is sized. Raises CollectiveFailed if one of them is lost.
    """
    keep_freed_memory()
    place = place or RankPlace()
    device = rank_device(config, place)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL takes this thread's
    num_threads = rank_threads(config)
    checkpoint = locate_checkpoint(config.model, progress)
    with torch.inference_mode():
        spec = _spec(config.model, checkpoint)
        part = ModelPart(spec, place, config.parallel.expert_size)
        links = RankLinks()
        if meeting is not None:
            progress("meeting the other ranks")
            nccl = uses_nccl(config.parallel, device)
            links = connect(place, meeting, spec.vocab_size, on_gpu=device.type == "cuda", nccl=nccl)
        with CheckpointFiles(checkpoint.folder, spec) as files:
            loaded = _load(config, checkpoint, part, files, device, progress)
            operators = choose_operators(config.model.ops, loaded.dtype, device, num_threads, progress)
            progress(f"operators: {operators.name}, numerics {operators.numerics or 'not claimed'}")
            # The C++ operators have threads of their own; torch has little left to do, its pool would be in the way.
            plan_threads = 1 if operators.packs_weights else num_threads
            torch.set_num_threads(plan_threads)
            decoder = _build_decoder(loaded, part, operators, links, progress)
        lora = load_adapters(config, loaded.spec, decoder, operators, checkpoint.folder, device, progress)
        numerics = numerics_id(operators.numerics, loaded.dtype, config.parallel)
        one_page = _one_page(config, loaded, part)
        fingerprint = one_page.fingerprint(loaded.digest, spec.num_layers, spec.num_kv_heads)
        _require_equal(links, fingerprint=fingerprint, numerics=numerics, operators=operators.name)
        free_bytes = _free_for_pool(config, loaded, one_page, operators, decoder, device)
        share = Fraction(part.kv.num_layers * part.kv.num_heads, spec.num_layers * spec.num_kv_heads)
        layout = _agree(links, sized_layout(one_page, config.cache, free_bytes, share))
        memory = take_pool(layout, config.cache, free_bytes, progress, on_gpu=device.type == "cuda")
        ready = _build_device(config, decoder, lora, memory, layout, device, (num_threads, plan_threads), links)
    return Engine(
        device=ready,
        memory=memory,
        layout=layout,
        spec=loaded.spec,
        fingerprint=fingerprint,
        numerics=numerics,
        operators=operators.name,
        weight_bytes=loaded.weights.num_bytes,
        lora=lora,
        profiler=operators.profiler,
    )


def _build_device(
    config: Config,
    decoder: Decoder,
    lora: LoraEngine,
    memory: PoolMemory,
    layout: KvLayout,
    device: torch.device,
    threads: tuple[int, int],
    links: RankLinks,
) -> Device:
    """`threads` of torch: for gradients, and for plans."""
    shared = host_pool(memory, layout)
    if device.type == "cpu":
        runner = PlanRunner(decoder, shared, config.scheduler.max_running_requests, links, lora.store)
        runner.warm_up()
        return CpuDevice(runner, num_threads=threads[0], plan_threads=threads[1])
    pool = torch.zeros(shared.shape, dtype=shared.dtype, device=device)
    runner = PlanRunner(decoder, pool, config.scheduler.max_running_requests, links, lora.store)
    runner.warm_up()
    return CudaDevice(runner, pool, shared)


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
    part: ModelPart,
    files: CheckpointFiles,
    device: torch.device,
    progress: Callable[[str], None],
) -> _Loaded:
    spec = part.spec
    digest = _spec_digest(spec)
    if config.model.max_context_tokens:
        spec = replace(spec, max_context_tokens=config.model.max_context_tokens)
    dtype = _dtype(config.model, spec.dtype or files.dtype)
    progress(f"loading {spec.architecture} from {checkpoint.folder} as {dtype}")
    _check_memory(part.num_bytes(TORCH_DTYPES[dtype].itemsize), config.parallel.data_size, device)
    weights = files.load(TORCH_DTYPES[dtype], device, progress, part)
    whole = hashlib.sha256(f"{digest}/{weights.digest}/{checkpoint.revision}".encode()).hexdigest()[:32]
    return _Loaded(spec, weights, dtype, whole)


def _build_decoder(
    loaded: _Loaded, part: ModelPart, operators: Operators, links: RankLinks, progress: Callable[[str], None]
) -> Decoder:
    """Bring the weights to where they are computed with."""
    began = time.monotonic()
    decoder = Decoder(loaded.spec, loaded.weights.tensors, operators, part, links.tensor)
    verb = "packed" if operators.packs_weights else "loaded"
    progress(f"{verb} {loaded.weights.num_bytes / 1e9:.2f} GB of weights in {time.monotonic() - began:.1f} s")
    return decoder


def _one_page(config: Config, loaded: _Loaded, part: ModelPart) -> KvLayout:
    return KvLayout(
        num_pages=1,
        num_layers=part.kv.num_layers,
        num_kv_heads=part.kv.num_heads,
        page_tokens=config.cache.page_tokens,
        head_dim=loaded.spec.head_dim,
        dtype=loaded.dtype,
    )


def _free_for_pool(
    config: Config,
    loaded: _Loaded,
    one_page: KvLayout,
    operators: Operators,
    decoder: Decoder,
    device: torch.device,
) -> int:
    """Bytes that weights and workspace leave; both are there by now, though not all touched."""
    spec = loaded.spec
    budget_tokens = config.scheduler.budget_tokens
    shaped_pool = torch.empty((1, *one_page.page_shape), dtype=TORCH_DTYPES[loaded.dtype], device=device)
    decoder.reserve(budget_tokens, shaped_pool)
    sampled = min(budget_tokens, config.scheduler.max_running_requests)
    logits_bytes = sampled * spec.vocab_size * 4
    taken = operators.workspace_bytes + logits_bytes + sampling_bytes(device, spec.vocab_size)
    taken += config.parallel.tensor_size * budget_tokens * spec.hidden_size * 4  # the ranks' parts of a sum
    if not operators.packs_weights:
        taken += loaded.weights.num_mapped_bytes  # not resident yet, but they will be
    taken += (config.parallel.data_size - 1) * loaded.weights.num_bytes  # of replicas that start after this one
    free_bytes = _free_bytes(device)
    if device.type == "cpu":
        free_bytes //= ranks_here(config.parallel)  # all of them measure now
    return max(0, free_bytes - taken) // config.parallel.data_size  # the pools of replicas that start later


def _require_equal(links: RankLinks, **facts: str) -> None:
    """Raise ConfigError if a rank differs in one of these. Waits until all ranks have loaded."""
    if links.start is None:
        return
    theirs = [json.loads(text) for text in links.start.exchange(json.dumps(facts))]
    for rank, other in enumerate(theirs):
        for name, value in theirs[0].items():
            if other[name] != value:
                raise ConfigError(f"parallel: rank {rank} has {name} {other[name]!r}, rank 0 has {value!r}")


def _agree(links: RankLinks, layout: KvLayout) -> KvLayout:
    """The layout with as many pages as every rank has room for."""
    if links.start is None:
        return layout
    return replace(layout, num_pages=min(int(text) for text in links.start.exchange(str(layout.num_pages))))


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


def numerics_id(operators: str, dtype: str, parallel: ParallelConfig) -> str:
    """What must be equal for two workers' bits to be equal; empty where nothing is claimed.

    `operators` is their own part. Ranks that share a layer add up partial sums, so their number counts; stages do not.
    """
    return f"{operators}-{dtype}-tensor{parallel.tensor_size}-expert{parallel.expert_size}" if operators else ""


def _free_bytes(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available_memory_bytes()
