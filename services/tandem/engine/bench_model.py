"""Writes a checkpoint with random weights in the form that models are published in: for benchmarks, nothing else.

One tensor is in memory at a time, and of a large one only some rows. A tensor's values depend on the seed and its
name alone, so the same request gives the same files.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tandem.demo import model_path
from tandem.engine.models.spec import DecoderSpec, parse_spec
from tandem.engine.models.tensors import expected_tensors
from tandem.errors import ConfigError

_CHUNK_ELEMENTS = 1 << 22  # generated at a time
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_STORED = {"bfloat16": (torch.bfloat16, "BF16"), "float32": (torch.float32, "F32")}
_HEADER_ALIGNMENT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeModelRequest:
    """`config` is the checkpoint's config.json. A file holds at most `shard_bytes`, or one tensor."""

    config: dict[str, Any]
    folder: str
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    seed: int = 0
    shard_bytes: int = 2 << 30


def make_model(request: MakeModelRequest, progress: Callable[[str], None]) -> int:
    """Write the checkpoint and return the bytes of its weights.

    Raises ConfigError if the folder is not empty, the disk is too small, or the config is not understood.
    """
    folder = Path(request.folder)
    spec = parse_spec(dict(request.config), {})
    shards = _shards(spec, _STORED[request.dtype][0].itemsize, request.shard_bytes)
    num_bytes = sum(_num_bytes(shape, request.dtype) for shard in shards for shape in shard.values())
    _check_folder(folder, num_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    names = _file_names(len(shards))
    written = 0
    for file_name, shard in zip(names, shards, strict=True):
        _write_shard(folder / file_name, shard, request)
        written += sum(_num_bytes(shape, request.dtype) for shape in shard.values())
        progress(f"{file_name}: {written / 1e9:.2f} of {num_bytes / 1e9:.2f} GB")
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        _write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))},
        )
    _write_rest(folder, request)
    return num_bytes


def _check_folder(folder: Path, num_bytes: int) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--out: {folder} is there already and is not an empty folder")
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if num_bytes > free_bytes:
        raise ConfigError(f"--out: {num_bytes / 1e9:.2f} GB to write, {free_bytes / 1e9:.2f} GB of the disk are free")


def _shards(spec: DecoderSpec, itemsize: int, shard_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in expected_tensors(spec).items():
        num_bytes = itemsize * math.prod(shape)
        if shards[-1] and size + num_bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += num_bytes
    return shards


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]


def _num_bytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * _STORED[dtype][0].itemsize


def _write_shard(path: Path, shard: dict[str, tuple[int, ...]], request: MakeModelRequest) -> None:
    """Write the format by hand: a length, a JSON header, the tensors. The library's writer wants all at once."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shard.items():
        end = offset + _num_bytes(shape, request.dtype)
        header[name] = {"dtype": _STORED[request.dtype][1], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _HEADER_ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in shard.items():
            for values in _values(name, shape, request.seed):
                stored: Any = values.to(_STORED[request.dtype][0]).view(torch.uint8).numpy()
                file.write(stored)


def _values(name: str, shape: tuple[int, ...], seed: int) -> Iterator[torch.Tensor]:
    """Flat float32 pieces of a tensor, scaled so that every layer's outputs are about as large as its inputs."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))  # it knows 32 bits
    scale, centre = 1.0 / math.sqrt(shape[-1]), 0.0
    if len(shape) == 1:
        scale, centre = (0.1, 1.0) if name.endswith("norm.weight") else (0.02, 0.0)
    left = math.prod(shape)
    while left:
        count = min(left, _CHUNK_ELEMENTS)
        yield torch.randn(count, generator=generator) * scale + centre
        left -= count


def _write_rest(folder: Path, request: MakeModelRequest) -> None:
    config = {**request.config, "torch_dtype": request.dtype}
    _write_json(folder / "config.json", config)
    special: dict[str, Any] = {name: config[name] for name in ("bos_token_id", "eos_token_id") if name in config}
    _write_json(folder / "generation_config.json", {**special, "do_sample": False})
    for name in _TOKENIZER_FILES:
        shutil.copyfile(model_path() / name, folder / name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
