"""The C++ operators against this machine's limits, measured in the same run: linears and attention of a 0.5B model.

Linears read their weights from memory (several layers' worth, more than a cache holds); attention reads its keys and
values. What bounds them is either that reading or the multiplications, whichever takes longer; the table gives limit
over time, so 1.00 is perfect. Every repetition measures the limits next to the operator: on a shared machine only
such ratios mean something. Run: python bench/operators.py [--kernels avx2] [--threads 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from tandem.config import CacheConfig
from tandem.engine.host import usable_cpus
from tandem.engine.ops.contract import AttentionShape, TokenBatch
from tandem.engine.ops.cpu import KERNELS, CpuOperators

HIDDEN, MIDDLE, HEADS, KV_HEADS, HEAD_DIM = 896, 4864, 14, 2, 64
LAYERS = 4
# Rows, context, tokens of each.
ATTENTION = ((1, 512, 1), (8, 512, 1), (32, 512, 1), (1, 8192, 1), (8, 8192, 1), (1, 32768, 1), (1, 0, 1024))
PROBE_BYTES = 1 << 27
PROBE_ROUNDS = 60_000


@dataclass(frozen=True, slots=True)
class Work:
    """One thing to measure: what it reads at least, and how often it multiplies and adds (counted as two)."""

    name: str
    num_bytes: float
    flops: float
    dot_products: bool
    run: Callable[[], None]
    repetitions: int


@dataclass(frozen=True, slots=True)
class Measured:
    name: str
    milliseconds: float
    gigabytes_per_second: float
    gigaflops: float
    bound: str  # what takes longer at the measured limits
    limit_over_time: float


class Limits:
    """Probes of one operator set: the best of what was seen just now."""

    def __init__(self, operators: CpuOperators) -> None:
        self._operators = operators
        self._has_dot_products = operators.multiplies_pairs

    def measure(self) -> tuple[float, float, float]:
        """Bytes, float32 operations and bf16 operations a second."""
        read = max(self._operators.read_rate(PROBE_BYTES) for _ in range(2))
        floats = self._operators.multiply_rate(dot_products=False, rounds=PROBE_ROUNDS)
        if not self._has_dot_products:
            return read, floats, floats
        return read, floats, self._operators.multiply_rate(dot_products=True, rounds=PROBE_ROUNDS)


def measure(work: Work, limits: Limits) -> Measured:
    times, ratios, bounds = [], [], []
    work.run()
    for _ in range(work.repetitions):
        read, floats, dots = limits.measure()
        began = time.perf_counter()
        work.run()
        times.append(time.perf_counter() - began)
        reading, multiplying = work.num_bytes / read, work.flops / (dots if work.dot_products else floats)
        ratios.append(max(reading, multiplying) / times[-1])
        bounds.append("read" if reading > multiplying else "multiply")
    seconds = statistics.median(times)
    return Measured(
        work.name,
        seconds * 1e3,
        work.num_bytes / seconds / 1e9,
        work.flops / seconds / 1e9,
        max(set(bounds), key=bounds.count),
        statistics.median(ratios),
    )


def linear_works(operators: CpuOperators, repetitions: int) -> Iterator[Work]:
    dots = operators.multiplies_pairs
    generator = torch.Generator().manual_seed(0)

    def weight(outputs: int, inputs: int) -> torch.Tensor:
        return torch.randn(outputs, inputs, generator=generator).bfloat16()

    layers = [
        (
            operators.linear([weight((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN)], [None]),
            operators.linear([weight(HIDDEN, HEADS * HEAD_DIM)], [None]),
            operators.gated_linear([weight(MIDDLE, HIDDEN), weight(MIDDLE, HIDDEN)], [None, None]),
            operators.linear([weight(HIDDEN, MIDDLE)], [None]),
        )
        for _ in range(LAYERS)
    ]
    num_bytes = sum(linear.num_bytes for layer in layers for linear in layer)
    for rows in (1, 2, 4, 8, 16, 32, 256, 1024):
        narrow = torch.randn(rows, HIDDEN, generator=generator)
        wide = torch.randn(rows, MIDDLE, generator=generator)

        def run(narrow: torch.Tensor = narrow, wide: torch.Tensor = wide) -> None:
            for qkv, output, gate_up, down in layers:
                qkv(narrow)
                output(narrow)
                gate_up(narrow)
                down(wide)

        count = repetitions if rows < 256 else 3
        yield Work(f"linears of {LAYERS} layers, {rows} rows", num_bytes, num_bytes * rows, dots, run, count)


def attention_works(operators: CpuOperators, repetitions: int, page_tokens: int) -> Iterator[Work]:
    shape = AttentionShape(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        windows=(None,) * LAYERS,
        frequencies=torch.full((HEAD_DIM // 2,), 1e-3),
        attention_factor=1.0,
    )
    for rows, context, chunk in ATTENTION:
        batch = batch_of(rows, context, chunk, page_tokens)
        pages = int(batch.page_table.max()) + 1
        pool = torch.full((pages, LAYERS, 2, KV_HEADS, page_tokens, HEAD_DIM), 0.01, dtype=torch.bfloat16)
        step = operators.begin(batch, pool, shape)
        queries = torch.randn(batch.num_tokens, HEADS, HEAD_DIM)

        def run(step: object = step, queries: torch.Tensor = queries) -> None:
            for layer in range(LAYERS):
                step.attend(layer, queries)  # type: ignore[attr-defined]

        seen = rows * sum(context + token + 1 for token in range(chunk))  # keys seen by all query tokens
        num_bytes = LAYERS * rows * (context + chunk) * 2 * KV_HEADS * HEAD_DIM * 2
        flops = 4.0 * LAYERS * seen * HEADS * HEAD_DIM
        kind = f"attention, decode, {rows} at {context}" if chunk == 1 else f"attention, prompt of {chunk}"
        yield Work(kind, num_bytes, flops, operators.multiplies_pairs, run, repetitions)


def batch_of(rows: int, context: int, chunk: int, page_tokens: int) -> TokenBatch:
    pages = -(-(context + chunk) // page_tokens)
    table = np.arange(rows * pages).reshape(rows, pages)
    positions = np.tile(np.arange(context, context + chunk), rows)
    row_of_token = np.repeat(np.arange(rows), chunk)
    slots = table[row_of_token, positions // page_tokens] * page_tokens + positions % page_tokens
    return TokenBatch(
        page_tokens=page_tokens,
        offsets=np.arange(rows + 1) * chunk,
        starts=np.full(rows, context),
        positions=positions,
        slots=slots,
        page_table=table,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", choices=("auto", *KERNELS), default="auto")
    parser.add_argument("--threads", type=int, default=0, help="0: the CPUs this process may use")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--only", choices=("linears", "attention"))
    parser.add_argument("--page-tokens", type=int, default=CacheConfig().page_tokens)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    num_threads = given.threads or usable_cpus()
    operators = CpuOperators(given.kernels, num_threads)
    limits = Limits(operators)
    seen = [limits.measure() for _ in range(5)]
    read, floats, dots = (statistics.median(values) for values in zip(*seen, strict=True))
    print(f"{operators.name}, {num_threads} threads, numerics {operators.numerics}")
    print(f"limits: read {read / 1e9:.1f} GB/s, float32 {floats / 1e9:.0f} GFLOP/s, bf16 {dots / 1e9:.0f} GFLOP/s")
    print(f"{'':34} {'ms':>9} {'GB/s':>7} {'GFLOP/s':>8}  bound by  limit/time")
    results = []
    with torch.inference_mode():
        attention = attention_works(operators, given.repetitions, given.page_tokens)
        for name, works in (("linears", linear_works(operators, given.repetitions)), ("attention", attention)):
            if given.only not in (None, name):
                continue
            for work in works:
                one = measure(work, limits)
                results.append(one)
                print(
                    f"{one.name:34} {one.milliseconds:9.2f} {one.gigabytes_per_second:7.1f} {one.gigaflops:8.1f}"
                    f"  {one.bound:8}  {one.limit_over_time:10.2f}"
                )
                sys.stdout.flush()
    if given.json:
        summary = {"operators": operators.name, "threads": num_threads, "read": read, "float32": floats, "bf16": dots}
        given.json.write_text(json.dumps({**summary, "results": [asdict(one) for one in results]}, indent=1))


if __name__ == "__main__":
    main()
