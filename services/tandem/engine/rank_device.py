"""Which device a rank computes on, with how many threads. Decided, and checked, before any weight is read."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from tandem.config import Config, ModelConfig, ParallelConfig
from tandem.engine.host import usable_cpus
from tandem.engine.place import RankPlace
from tandem.errors import ConfigError


def rank_device(config: Config, place: RankPlace) -> torch.device:
    """The device of a rank; raises ConfigError if it is not there. Ranks get GPUs in their order by default."""
    named = config.parallel.devices
    if named and len(named) != place.num_ranks:
        raise ConfigError(f"parallel.devices: {len(named)} named for {place.num_ranks} ranks")
    if named:
        return _named_device(named[place.rank], place.rank)
    if _device_kind(config.model) == "cpu":
        return torch.device("cpu")
    return _named_device(f"cuda:{place.rank}", place.rank)


def replica_devices(config: Config, replica: int) -> Config:
    """Settings of a replica that name its GPUs: those after the replica's before it, or shared where there are too few.

    On GPUs of its own it need not leave room for others: then its data_size is 1.
    """
    parallel = config.parallel
    num_ranks = ranks_here(parallel)
    if parallel.devices or _device_kind(config.model) == "cpu":
        return config
    found = torch.cuda.device_count()
    names = tuple(f"cuda:{(replica * num_ranks + rank) % found}" for rank in range(num_ranks))
    lodgers = -(-parallel.data_size * num_ranks // found) if parallel.data_size * num_ranks > found else 1
    return replace(config, parallel=replace(parallel, devices=names, data_size=lodgers))


def uses_nccl(config: ParallelConfig, device: torch.device) -> bool:
    """Whether tensors travel by NCCL, which needs a GPU for each rank."""
    if config.backend == "nccl" and device.type != "cuda":
        raise ConfigError(f"parallel.backend: nccl asked for, and a rank is on {device.type}")
    if config.backend == "auto":
        return device.type == "cuda" and len(set(config.devices)) == len(config.devices)
    return config.backend == "nccl"


def rank_threads(config: Config) -> int:
    """Compute threads of one rank: its share of the replica's, at least one."""
    return max(1, (config.model.threads or usable_cpus()) // ranks_here(config.parallel))


def ranks_here(config: ParallelConfig) -> int:
    """How many ranks of a replica share this host's CPUs and memory."""
    return config.tensor_size * config.pipeline_size - config.remote_ranks


def _named_device(name: str, rank: int) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"parallel.devices: {name!r} of rank {rank} is no device; cpu and cuda:N are") from None
    if device.type == "cpu":
        return device
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type != "cuda" or (device.index or 0) >= found:
        raise ConfigError(f"parallel.devices: rank {rank} is to run on {name}, torch finds {found} CUDA devices")
    return torch.device("cuda", device.index or 0)


def _device_kind(config: ModelConfig) -> Literal["cpu", "cuda"]:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device: cuda asked for, but torch finds no CUDA device")
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device
