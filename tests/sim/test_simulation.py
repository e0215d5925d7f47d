"""Proof by simulation: whatever the loops, budgets, faults and deaths, every client hears the reference's tokens.

The runs are by seed: TANDEM_SIM_SEEDS says how many of each kind.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

from tests.sim.scenarios import STORM, crowded, simulate

SEEDS = int(os.environ.get("TANDEM_SIM_SEEDS", "80"))
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


@pytest.mark.parametrize("prefill_loop", ["normal", "overlap"])
@pytest.mark.parametrize("decode_loop", ["normal", "overlap"])
def test_calm(prefill_loop: str, decode_loop: str) -> None:
    for seed in range(SEEDS):
        world = simulate(seed, prefill_loop=prefill_loop, decode_loop=decode_loop)
        # Between two attempts, after decode took a prefix back, a hand-off is on its lease: prefill may need its pages.
        assert world.seen["local_prefills"] <= world.seen["made room on decode"], "every peer was well"
        assert world.seen["leases_started"] <= world.seen["made room on decode"], "every stream was released"


@pytest.mark.parametrize("prefill_loop", ["normal", "overlap"])
@pytest.mark.parametrize("decode_loop", ["normal", "overlap"])
def test_stormy(prefill_loop: str, decode_loop: str) -> None:
    for seed in range(1000, 1000 + SEEDS):
        simulate(
            seed,
            **STORM,
            prefill_loop=prefill_loop,
            decode_loop=decode_loop,
            kills=seed % 3,
            transfer_kills=seed % 2,
            drains=seed % 3 == 1,
        )


@pytest.mark.parametrize("loop", ["normal", "overlap"])
def test_unified(loop: str) -> None:
    for seed in range(2000, 2000 + SEEDS):
        simulate(seed, unified=True, num_prefill=0, decode_loop=loop, cancels=0.2, deadlines=0.1, drains=seed % 2)


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
