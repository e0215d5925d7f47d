"""Opens a checkpoint's safetensors files, checks them against a spec, and brings the tensors into memory one by one.

Tensors that already have the wanted type stay mapped from the file: they cost no copy, and workers on one machine
share them in the page cache. Whoever packs them needs them only once: what was read some tensors ago is given back,
so that a model is in memory once while it is loaded, not twice.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tandem.engine.mapped import MappedFiles
from tandem.engine.models.fields import read_json
from tandem.engine.models.part import ModelPart
from tandem.engine.models.spec import DecoderSpec
from tandem.engine.models.tensors import (
    EMBEDDING,
    OUTPUT_HEAD,
    expected_tensors,
    fused_tensors,
    is_ignored,
    is_kept_wide,
)
from tandem.engine.place import RankPlace
from tandem.errors import ConfigError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SHOWN = 8  # tensors named in one line of an error
_SAMPLES, _SAMPLE_BYTES = 8, 64
_RECENT_TENSORS = 8  # queries, keys and values with their biases, and some more


@dataclass(frozen=True, slots=True)
class Weights:
    """The parameters by their published names: matrices and biases in the wanted type, norms and routers in float32.

    They are read and converted when they are asked for, which is possible as long as the files are open; what was got
    stays valid after. `digest` identifies all weights as they are in the files, of whatever part; `num_bytes` is the
    part's size in memory, of which `num_mapped_bytes` are mapped from the files.
    """

    tensors: Mapping[str, torch.Tensor]
    digest: str
    num_bytes: int
    num_mapped_bytes: int


class CheckpointFiles:
    """The open safetensors files of a checkpoint folder, checked against a spec. Use as a context manager."""

    def __init__(self, folder: Path, spec: DecoderSpec) -> None:
        self._folder = folder
        self._spec = spec
        self._stack = ExitStack()
        self._paths: list[Path] = []
        self._files: dict[str, Any] = {}  # tensor name -> open file
        self._fused: dict[str, tuple[str, tuple[int | slice, ...]]] = {}  # tensor name -> where it is a part of which

    def __enter__(self) -> CheckpointFiles:
        """Open and check every file; raises ConfigError that names what is missing, unexpected or of a wrong shape."""
        try:
            self._paths = _file_paths(self._folder)
            for path in self._paths:
                self._open(path)
            self._cut_fused()
            self._check()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def dtype(self) -> str:
        """The floating-point type of the embedding in the file."""
        return _FLOATS[self._files[EMBEDDING].get_slice(EMBEDDING).get_dtype()]

    def load(
        self,
        dtype: torch.dtype,
        device: torch.device,
        progress: Callable[[str], None],
        part: ModelPart | None = None,
    ) -> Weights:
        """Describe a part's parameters (by default all), on `device`, as `dtype` or float32.

        They are read when they are asked for; of what belongs to other parts only samples for the digest are read.
        """
        part = part or ModelPart(self._spec, RankPlace())
        digest = hashlib.sha256()
        mapped = MappedFiles(self._paths)
        num_bytes, num_mapped_bytes = 0, 0
        converted: set[str] = set()
        for name in sorted(expected_tensors(self._spec)):
            stored = self._read(name)
            _add_to_digest(digest, name, stored)
            if not part.holds(name):
                continue
            target = _target_dtype(name, dtype)
            own = part.cut(name, stored)
            num_bytes += own.numel() * target.itemsize
            if device.type == "cpu" and stored.dtype == target and own.is_contiguous():
                num_mapped_bytes += own.nbytes
            elif stored.dtype != target and target == dtype:
                converted.add(str(stored.dtype).removeprefix("torch."))
        self._check_tied_head(mapped, part)
        if converted:
            progress(f"converts {', '.join(sorted(converted))} weights to {str(dtype).removeprefix('torch.')}")
        tensors = _Tensors(self._read, part, dtype, device, mapped)
        return Weights(tensors, digest.hexdigest()[:32], num_bytes, num_mapped_bytes)

    def _open(self, path: Path) -> None:
        try:
            opened = self._stack.enter_context(safe_open(path, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path}: not a readable safetensors file: {error}") from error
        for name in opened.keys():  # noqa: SIM118 - not a mapping
            if name in self._files:
                raise ConfigError(f"{path}: tensor {name} is in another file of this checkpoint, too")
            self._files[name] = opened

    def _read(self, name: str) -> torch.Tensor:
        stored, place = self._fused.get(name, (name, ()))
        tensor: torch.Tensor = self._files[name].get_tensor(stored)
        return tensor[place] if place else tensor

    def _cut_fused(self) -> None:
        """Know the parts of fused tensors by their published names."""
        for fused_name, fused in fused_tensors(self._spec).items():
            if fused_name not in self._files:
                continue
            file = self._files.pop(fused_name)
            shape = tuple(file.get_slice(fused_name).get_shape())
            if shape != fused.shape:
                raise ConfigError(
                    f"{self._folder}: tensor {fused_name} has shape {shape}, the config asks for {fused.shape}"
                )
            for name, place in fused.parts.items():
                if name in self._files:
                    raise ConfigError(f"{self._folder}: tensor {name} is there twice, alone and in {fused_name}")
                self._files[name] = file
                self._fused[name] = (fused_name, place)

    def _check(self) -> None:
        expected = expected_tensors(self._spec)
        faults = list(_difference_faults(self._files, expected, self._spec))
        for name in sorted(self._files.keys() & expected.keys()):
            found = self._files[name].get_slice(self._fused[name][0] if name in self._fused else name)
            shape = tuple(found.get_shape())
            if name not in self._fused and shape != expected[name]:
                faults.append(f"tensor {name} has shape {shape}, the config asks for {expected[name]}")
            if found.get_dtype() not in _FLOATS:
                faults.append(f"tensor {name} has type {found.get_dtype()}, supported are {', '.join(_FLOATS)}")
        if faults:
            raise ConfigError("\n".join(f"{self._folder}: {fault}" for fault in faults[: 4 * _SHOWN]))

    def _check_tied_head(self, mapped: MappedFiles, part: ModelPart) -> None:
        """A head that the config calls tied may be in the file, but only as the embedding's equal."""
        if not self._spec.tied_embeddings or OUTPUT_HEAD not in self._files or not part.has_head:
            return
        head, embedding = (self._read(name) for name in (OUTPUT_HEAD, EMBEDDING))
        if not torch.equal(part.cut(OUTPUT_HEAD, head), part.cut(EMBEDDING, embedding)):
            raise ConfigError(
                f"{self._folder}: tie_word_embeddings is set, but {OUTPUT_HEAD} is there and differs from {EMBEDDING}"
            )
        for tensor in (head, embedding):
            mapped.forget(tensor)


class _Tensors(Mapping[str, torch.Tensor]):
    """Reads and converts a tensor when it is asked for, and gives back the pages of those asked for before."""

    def __init__(
        self,
        read: Callable[[str], torch.Tensor],
        part: ModelPart,
        dtype: torch.dtype,
        device: torch.device,
        mapped: MappedFiles,
    ) -> None:
        self._read = read
        self._part = part
        self._names = frozenset(part.shapes())
        self._dtype = dtype
        self._device = device
        self._mapped = mapped
        self._recent: deque[torch.Tensor] = deque()  # as stored; one operator may need as many at once

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        stored = self._read(name)
        self._recent.append(stored)
        if len(self._recent) > _RECENT_TENSORS:
            self._mapped.forget(self._recent.popleft())
        own = self._part.cut(name, stored).contiguous()  # of cut columns a copy, else still mapped
        return own.to(device=self._device, dtype=_target_dtype(name, self._dtype))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


def _target_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if is_kept_wide(name) else dtype


def _file_paths(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise ConfigError(f"{index}: no weight_map of tensor names to files")
        paths = [folder / name for name in sorted(set(names.values()))]
    elif (folder / _SINGLE).is_file():
        paths = [folder / _SINGLE]
    else:
        other = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in folder.glob(pattern))
        hint = f" (other formats are not supported: {', '.join(other[:_SHOWN])})" if other else ""
        raise ConfigError(f"{folder}: neither {_SINGLE} nor {_INDEX}{hint}")
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ConfigError(f"{folder}: missing files of the checkpoint: {', '.join(missing[:_SHOWN])}")
    return paths


def _difference_faults(found: Mapping[str, object], expected: Mapping[str, object], spec: DecoderSpec) -> Iterator[str]:
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(name for name in found.keys() - expected.keys() if not is_ignored(name))
    if spec.tied_embeddings:
        unexpected = [name for name in unexpected if name != OUTPUT_HEAD]
    for word, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            yield f"{word} tensors for {spec.architecture}: {', '.join(names[:_SHOWN])}{more}"


def _add_to_digest(digest: Any, name: str, tensor: torch.Tensor) -> None:
    """Add the tensor's name, type and shape, and a sample of its bytes: reading all of them would take seconds a GB."""
    digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
    content = tensor.reshape(-1).view(torch.uint8)
    last = max(0, content.numel() - _SAMPLE_BYTES)
    for sample in range(_SAMPLES):
        start = last * sample // (_SAMPLES - 1)
        digest.update(content[start : start + _SAMPLE_BYTES].numpy().tobytes())
