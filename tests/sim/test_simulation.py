"""Proof by simulation: whatever the loops, budgets, faults and deaths, every client hears the reference's tokens.

The runs are by seed: TANDEM_SIM_SEEDS multiplies how many there are. By default 2,500, over every pair of loops and of
1, 2 and 4 stages; chunk budgets, page sizes, pools and delays are drawn by the seed.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

from tandem.core.roles import Pacing
from tests.sim.scenarios import crowded, simulate, stormy

TIMES = float(os.environ.get("TANDEM_SIM_SEEDS", "1"))
LOOPS: tuple[tuple[Pacing, int], ...] = (
    ("normal", 1),
    ("overlap", 1),
    ("pipelined", 1),
    ("pipelined", 2),
    ("pipelined", 4),
)
each_prefill = pytest.mark.parametrize(("prefill_loop", "prefill_stages"), LOOPS)
each_decode = pytest.mark.parametrize(("decode_loop", "decode_stages"), LOOPS)
HAPPENS = (
    "attach",
    "checksum_mismatches",
    "discarded_rows",
    "end cancelled",
    "end deadline",
    "end drained",
    "end length",
    "end stop",
    "failed_pulls",
    "held prefix",
    "lease",
    "leases_expired",
    "local_prefills",
    "made room on decode",
    "made room on prefill",
    "prefix_hit_tokens",
    "prompt logprobs",
    "resumed beyond the first Open",
    "retraction",
    "skipped by the cap",
    "speculative row",
)


def seeds(first: int, count: int) -> range:
    return range(first, first + max(1, int(count * TIMES)))


@each_prefill
@each_decode
def test_calm(prefill_loop: Pacing, prefill_stages: int, decode_loop: Pacing, decode_stages: int) -> None:
    for seed in seeds(0, 20):
        world = simulate(
            seed,
            prefill_loop=prefill_loop,
            decode_loop=decode_loop,
            prefill_stages=prefill_stages,
            decode_stages=decode_stages,
        )
        assert world.seen["local_prefills"] == 0, "every peer was well"
        assert world.seen["leases_started"] <= world.seen["made room on decode"], "every stream was released"


@each_prefill
@each_decode
def test_stormy(prefill_loop: Pacing, prefill_stages: int, decode_loop: Pacing, decode_stages: int) -> None:
    for seed in seeds(1000, 50):
        stormy(
            seed,
            prefill_loop=prefill_loop,
            decode_loop=decode_loop,
            prefill_stages=prefill_stages,
            decode_stages=decode_stages,
        )


@each_prefill
@each_decode
def test_crowded(prefill_loop: Pacing, prefill_stages: int, decode_loop: Pacing, decode_stages: int) -> None:
    for seed in seeds(4000, 24):
        crowded(
            seed,
            prefill_loop=prefill_loop,
            decode_loop=decode_loop,
            prefill_stages=prefill_stages,
            decode_stages=decode_stages,
        )


@each_decode
def test_unified(decode_loop: Pacing, decode_stages: int) -> None:
    for seed in seeds(2000, 40):
        simulate(
            seed,
            unified=True,
            num_prefill=0,
            decode_loop=decode_loop,
            decode_stages=decode_stages,
            cancels=0.2,
            deadlines=0.1,
            drains=seed % 2,
        )


def test_everything_happens() -> None:
    """A simulation in which nothing ever goes wrong proves little: each remedy is used in these runs."""
    seen: Counter[str] = Counter()
    for seed in range(3000, 3100):
        seen.update(crowded(seed).seen)
    assert {what for what in HAPPENS if not seen[what]} == set(), seen


def test_same_seed_same_transcript() -> None:
    first, second = crowded(7), crowded(7)
    assert first.transcript == second.transcript
    assert len(first.transcript) > 100
