"""Adapters as PEFT writes them: a folder with adapter_config.json and adapter_model.safetensors.

What this engine cannot compute exactly is refused by name; nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tandem.engine.lora.weights import TARGETS, LoraMatrices, LoraShape, LoraWeights, target_shapes
from tandem.engine.models.fields import read_json
from tandem.engine.models.spec import DecoderSpec
from tandem.engine.models.tensors import layer_prefix
from tandem.errors import ConfigError

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
RANK_MAX = 512
TENSOR_BYTES_MAX = 4 << 30
_CONFIG_BYTES_MAX = 1 << 20
_PREFIX = "base_model.model."
_FLOATS = ("F32", "F16", "BF16")
_SHOWN = 6
# Settings that change nothing of what an adapter computes, or that the tensors' own names and shapes tell.
_NEUTRAL = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "target_modules",
    "exclude_modules",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "bias",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "runtime_config",
    "ensure_weight_tying",
}
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal")  # others change the base model's weights as well


def read_adapter(folder: Path, spec: DecoderSpec) -> LoraWeights:
    """Read an adapter for a model; raises ConfigError with everything that is missing, wrong or not supported."""
    shape = _read_shape(folder)
    path = folder / TENSORS
    if not path.is_file():
        pickled = f": {PICKLED} may hold code and is not read; save it as safetensors"
        raise ConfigError(f"{folder}: no {TENSORS}{pickled if (folder / PICKLED).is_file() else ''}")
    if path.stat().st_size > TENSOR_BYTES_MAX:
        raise ConfigError(f"{path}: more than {TENSOR_BYTES_MAX} bytes")
    try:
        with safe_open(path, framework="pt") as opened:
            matrices = _read_matrices(opened, folder, shape, spec)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: not a readable safetensors file: {error}") from error
    return LoraWeights(shape, matrices)


def write_adapter(folder: Path, weights: LoraWeights, base_model: str) -> None:
    """Write an adapter as PEFT reads it, at once: `folder` is the whole of it, or what it was before."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    targets = sorted({target for _, target in weights.matrices})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": weights.shape.rank,
        "lora_alpha": weights.shape.alpha,
        "lora_dropout": 0.0,
        "use_rslora": weights.shape.rslora,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    tensors = {}
    for (layer, target), pair in weights.matrices.items():
        name = f"{_PREFIX}{layer_prefix(layer)}{TARGETS[target]}"
        tensors[f"{name}.lora_A.weight"] = pair.a.detach().cpu().contiguous()
        tensors[f"{name}.lora_B.weight"] = pair.b.detach().cpu().contiguous()
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        (fresh / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, fresh / TENSORS, metadata={"format": "pt"})
        for path in (fresh / CONFIG, fresh / TENSORS):
            _flush(path)
        fresh.chmod(0o755)
        _replace(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _flush(path: Path) -> None:
    with path.open("rb+") as opened:
        os.fsync(opened.fileno())


def _replace(fresh: Path, folder: Path) -> None:
    """Put a folder in the place of another one, which is moved out of the way first: folders do not replace others."""
    if not folder.exists():
        fresh.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    folder.rename(old / "adapter")
    try:
        fresh.rename(folder)
    except OSError:
        (old / "adapter").rename(folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


# ---- the configuration --------------------------------------------------------------------------------------------


def _read_shape(folder: Path) -> LoraShape:
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigError(f"{folder}: no {CONFIG}: not an adapter in PEFT format")
    if path.stat().st_size > _CONFIG_BYTES_MAX:
        raise ConfigError(f"{path}: more than {_CONFIG_BYTES_MAX} bytes")
    config: dict[str, Any] = read_json(path)
    faults = list(_config_faults(config))
    if faults:
        raise ConfigError("\n".join(f"{path}: {fault}" for fault in faults))
    return LoraShape(rank=config["r"], alpha=float(config["lora_alpha"]), rslora=bool(config.get("use_rslora")))


def _config_faults(config: dict[str, Any]) -> Iterator[str]:
    if config.get("peft_type") != "LORA":
        yield f"peft_type {config.get('peft_type')!r} is not supported (supported: LORA)"
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        yield f"task_type {config['task_type']!r} is not supported (supported: CAUSAL_LM)"
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= RANK_MAX:
        yield f"r is {rank!r}, must be a whole number from 1 to {RANK_MAX}"
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        yield f"lora_alpha is {alpha!r}, must be a number"
    if config.get("bias", "none") != "none":
        yield f"bias {config['bias']!r} is not supported (supported: none)"
    start = config.get("init_lora_weights")
    if not any(start is plain or start == plain for plain in _PLAIN_STARTS):
        yield f"init_lora_weights {start!r} is not supported: it changes the base model's weights"
    targets = config.get("target_modules")
    if isinstance(targets, list):
        unknown = sorted(str(name) for name in targets if str(name).rpartition(".")[2] not in TARGETS)
        if unknown:
            yield f"target_modules {', '.join(unknown[:_SHOWN])}: not supported (supported: {', '.join(TARGETS)})"
    for name in sorted(config.keys() - _NEUTRAL):
        if config[name]:
            yield f"{name} is not supported"


# ---- the tensors --------------------------------------------------------------------------------------------------


def _read_matrices(
    opened: Any, folder: Path, shape: LoraShape, spec: DecoderSpec
) -> dict[tuple[int, str], LoraMatrices]:
    expected = target_shapes(spec)
    names = {f"{_PREFIX}{layer_prefix(layer)}{TARGETS[target]}": (layer, target) for layer, target in expected}
    found = set(opened.keys())
    faults: list[str] = []
    matrices: dict[tuple[int, str], LoraMatrices] = {}
    for module, place in names.items():
        a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        if a not in found and b not in found:
            continue
        outputs, inputs = expected[place]
        wanted = {a: (shape.rank, inputs), b: (outputs, shape.rank)}
        own = [fault for name, size in wanted.items() for fault in _tensor_faults(opened, name, size, found)]
        found -= wanted.keys()
        faults += own
        if not own:
            pair = LoraMatrices(opened.get_tensor(a).float(), opened.get_tensor(b).float())
            if not (pair.a.isfinite().all() and pair.b.isfinite().all()):
                faults.append(f"{module}: values that are not finite")
            matrices[place] = pair
    if found:
        shown = ", ".join(sorted(found)[:_SHOWN])
        faults.append(f"{len(found)} tensors are for no linear that can have an adapter in this model: {shown}")
    if not matrices and not faults:
        faults.append(f"{TENSORS} holds no adapter")
    if faults:
        raise ConfigError("\n".join(f"{folder}: {fault}" for fault in faults[: 2 * _SHOWN]))
    return matrices


def _tensor_faults(opened: Any, name: str, size: tuple[int, int], found: set[str]) -> Iterator[str]:
    if name not in found:
        yield f"tensor {name} is missing"
        return
    stored = opened.get_slice(name)
    if tuple(stored.get_shape()) != size:
        yield f"tensor {name} has shape {tuple(stored.get_shape())}, this model asks for {size}"
    if stored.get_dtype() not in _FLOATS:
        yield f"tensor {name} has type {stored.get_dtype()}, supported are {', '.join(_FLOATS)}"


def random_adapter(spec: DecoderSpec, shape: LoraShape, targets: tuple[str, ...], seed: int) -> LoraWeights:
    """The start of a training: A as PEFT draws it, from `seed`; B zero, so that nothing is changed yet."""
    generator = torch.Generator().manual_seed(seed)
    matrices = {}
    for (layer, target), (outputs, inputs) in target_shapes(spec).items():
        if target in targets:
            bound = 1 / math.sqrt(inputs)  # kaiming_uniform with a = sqrt(5)
            a = (torch.rand(shape.rank, inputs, generator=generator) * 2 - 1) * bound
            matrices[layer, target] = LoraMatrices(a, torch.zeros(outputs, shape.rank))
    return LoraWeights(shape, matrices)
