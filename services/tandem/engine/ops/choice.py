"""Which operator set an engine uses. Decided once, at its start; nothing else asks what the CPU can do."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tandem.config import OperatorChoice
from tandem.engine.host import has_bf16_instructions
from tandem.engine.native.library import NativeUnavailable
from tandem.engine.ops.contract import Operators
from tandem.engine.ops.cpu import CpuOperators
from tandem.engine.ops.reference import ReferenceOperators
from tandem.errors import ConfigError

_NATIVE_PREFIX = "cpu-"


def choose_operators(
    choice: OperatorChoice, dtype: str, device: torch.device, num_threads: int, progress: Callable[[str], None]
) -> Operators:
    """Return the operator set for weights of `dtype`; raises ConfigError if the one asked for cannot run here.

    `auto` takes the C++ operators with the best kernels of this CPU, and says why if it has to do without.
    """
    if device.type != "cpu":
        if choice.startswith(_NATIVE_PREFIX):
            raise ConfigError(f"model.ops: {choice} asked for, and the model runs on {device.type}")
        return _reference(dtype, device)
    if choice == "reference":
        return _reference(dtype, device)
    try:
        return CpuOperators("auto" if choice == "auto" else choice.removeprefix(_NATIVE_PREFIX), num_threads)
    except NativeUnavailable as missing:
        if choice != "auto":
            raise ConfigError(f"model.ops: {choice} asked for: {missing}") from missing
        progress(f"operators: reference, several times slower than the C++ ones: {missing}")
        return _reference(dtype, device)


def _reference(dtype: str, device: torch.device) -> ReferenceOperators:
    """bfloat16 activations only where the device multiplies them; elsewhere each linear widens its weights."""
    narrow = dtype == "bfloat16" and (device.type == "cuda" or has_bf16_instructions())
    return ReferenceOperators(torch.bfloat16 if narrow else torch.float32)
