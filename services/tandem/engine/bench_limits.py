"""What a forward pass needs at least, and what this machine gives at most: probes, and the floor that follows.

The operators library brings its own probes; without it plain torch stands in, which reads and multiplies slower than
the machine can, so ratios to such a floor look better than they are. The report says which it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tandem.core.messages.plans import Row
from tandem.engine.models.spec import DecoderSpec
from tandem.engine.models.tensors import EMBEDDING, expected_tensors
from tandem.engine.native.library import NativeUnavailable, load_library
from tandem.engine.ops.cpu import CpuOperators, supported_kernels

LINEAR, HEAD, EXPERTS, ATTENTION = "linear", "output head", "experts", "attention"  # kinds of native/library.py
_PROBE_BYTES = 1 << 27
_PROBE_ROUNDS = 60_000
_TORCH_SIZE = 1024
_TILE_KERNELS, _DOT_KERNELS = "amx", "avx512bf16"
_SHOWN_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")


@dataclass(frozen=True, slots=True)
class Work:
    """What one plan needs at least: bytes read from memory, multiplications and additions (each counted as one)."""

    num_bytes: float
    flops: float


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes and operations a second, seen just now. `attend`: of the arithmetic that attention uses."""

    read: float
    multiply: float
    attend: float

    def floor_seconds(self, work: Work) -> float:
        """The least time that the work takes."""
        return max(work.num_bytes / self.read, work.flops / self.multiply)

    def part_floors(self, parts: dict[str, Work]) -> dict[str, float]:
        """The least time that each part takes, in seconds. They run one after another: a step takes their sum."""
        return {
            kind: max(work.num_bytes / self.read, work.flops / (self.attend if kind == ATTENTION else self.multiply))
            for kind, work in parts.items()
        }

    def bound(self, work: Work) -> str:
        return "memory" if work.num_bytes / self.read >= work.flops / self.multiply else "compute"


def work_of(spec: DecoderSpec, rows: Sequence[Row], bytes_per_element: int) -> Work:
    """What a plan of these rows needs: every weight and every visible key and value once, every product once."""
    parts = part_works(spec, rows, bytes_per_element).values()
    return Work(sum(part.num_bytes for part in parts), sum(part.flops for part in parts))


def part_works(spec: DecoderSpec, rows: Sequence[Row], bytes_per_element: int) -> dict[str, Work]:
    """`work_of` by part: linears of the layers (norms' weights with them), output head, experts, attention.

    Of experts it needs those that are chosen, here as many as tokens with random choices would hit.
    """
    matrices, experts, head_elements, other = 0, 0, spec.vocab_size * spec.hidden_size, 0
    for name, shape in expected_tensors(spec).items():
        if name == EMBEDDING or name == "lm_head.weight":
            continue
        if ".experts." in name:
            experts += shape[0] * shape[1]
        elif len(shape) == 2:
            matrices += shape[0] * shape[1]
        else:
            other += shape[0]
    num_tokens = sum(row.num_tokens for row in rows)
    num_samples = sum(row.sample is not None for row in rows)
    kv_elements, seen = 0, 0
    for row in rows:
        for window in spec.windows:
            kv_elements += min(row.start + row.num_tokens, (window or 1 << 62) + row.num_tokens - 1)
            seen += _visible(row, window)
    share = spec.experts.experts_per_token / spec.experts.num_experts if spec.experts else 0.0
    hit = experts * (1.0 - (1.0 - share) ** num_tokens)
    kv_elements *= 2 * spec.num_kv_heads * spec.head_dim

    def work(elements: float, flops: float) -> Work:
        return Work(float(elements * bytes_per_element), flops)

    return {
        LINEAR: work(matrices + other, 2.0 * matrices * num_tokens),
        HEAD: work(head_elements if num_samples else 0, 2.0 * head_elements * num_samples),
        EXPERTS: work(hit, 2.0 * experts * share * num_tokens),
        ATTENTION: work(kv_elements, 4.0 * spec.num_heads * spec.head_dim * seen),
    }


def _visible(row: Row, window: int | None) -> int:
    """Keys seen by all tokens of a row together, in one layer."""
    if window is None:
        return row.num_tokens * row.start + row.num_tokens * (row.num_tokens + 1) // 2
    return sum(min(position + 1, window) for position in range(row.start, row.start + row.num_tokens))


class Probes:
    """Measures the limits again and again, as the machine's other tenants move them.

    `operators` is the name of the operator set under test: its own instruction set is its limit, that of the machine
    for one that has none. `matrix_rates` gives operations a second by instruction set.
    """

    def __init__(self, operators: str, dtype: str, num_threads: int) -> None:
        self._dtype = dtype
        self._native: dict[str, CpuOperators] = {}
        try:
            library = load_library()
            for kernels in supported_kernels(library):
                self._native[kernels] = CpuOperators(kernels, num_threads, library)
        except NativeUnavailable:
            pass  # `source` says so
        own = operators.removeprefix("cpu-")
        self._kernels = own if own in self._native else next(iter(self._native), "")
        self.source = f"operators library, {self._kernels}" if self._native else "torch"

    def measure(self) -> Rates:
        """Read bandwidth, and the matrix rate that bounds the operators under test."""
        if not self._native:
            multiply = max(_torch_rates().values())
            return Rates(_torch_read_rate(), multiply, multiply)
        own = self._native[self._kernels]
        read = max(own.read_rate(_PROBE_BYTES) for _ in range(2))
        pairs = self._dtype == "bfloat16"
        multiply = self._multiply_rate(own, dots=pairs)
        # Tiles multiply for linears only: attention has the dot products of registers there.
        dots = self._native.get(_DOT_KERNELS) if pairs and self._kernels == _TILE_KERNELS else None
        return Rates(read, multiply, multiply if dots is None else self._multiply_rate(dots, dots=True))

    def matrix_rates(self) -> dict[str, float]:
        if not self._native:
            return _torch_rates()
        rates = {}
        for kernels, operators in self._native.items():
            if _has_dots(operators):
                rates[f"{kernels} bfloat16"] = self._multiply_rate(operators, dots=True)
            else:
                rates[f"{kernels} float32"] = self._multiply_rate(operators, dots=False)
        return rates

    def _multiply_rate(self, operators: CpuOperators, *, dots: bool) -> float:
        dots = dots and _has_dots(operators)
        return max(operators.multiply_rate(dot_products=dots, rounds=_PROBE_ROUNDS) for _ in range(2))


def _has_dots(operators: CpuOperators) -> bool:
    return operators.multiplies_pairs


def _torch_read_rate() -> float:
    values = torch.ones(_PROBE_BYTES // 4)
    return values.nbytes / min(_seconds(values.sum) for _ in range(3))


def _torch_rates() -> dict[str, float]:
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        left = torch.ones(_TORCH_SIZE, _TORCH_SIZE, dtype=dtype)
        seconds = min(_seconds(lambda left=left: torch.mm(left, left)) for _ in range(3))  # type: ignore[misc]
        rates[f"torch {str(dtype).removeprefix('torch.')}"] = 2.0 * _TORCH_SIZE**3 / seconds
    return rates


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@dataclass(frozen=True, slots=True)
class Machine:
    """The processor in words; `flags` are those that matter to the operators."""

    cpu: str
    flags: tuple[str, ...]
    num_threads: int


def describe_machine(num_threads: int, cpuinfo: Path = Path("/proc/cpuinfo")) -> Machine:
    values: dict[str, str] = {}
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []:
        name, _, value = line.partition(":")
        values.setdefault(name.strip(), value.strip())
    flags = set((values.get("flags") or values.get("Features") or "").split())
    family = f" (family {values['cpu family']}, model {values['model']})" if "cpu family" in values else ""
    return Machine(
        cpu=values.get("model name", "unknown") + family,
        flags=tuple(flag for flag in _SHOWN_FLAGS if flag in flags),
        num_threads=num_threads,
    )
