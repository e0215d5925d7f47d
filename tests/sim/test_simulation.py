"""Proof by simulation: whatever the loops, budgets, faults and deaths, every client hears the reference's tokens."""

from __future__ import annotations

import os
from random import Random
from typing import Any

import pytest

from tandem.config import HandoffConfig
from tests.sim.world import Options, World

SEEDS = int(os.environ.get("TANDEM_SIM_SEEDS", "150"))


def random_options(random: Random, **fixed: Any) -> Options:
    page_tokens = random.choice([1, 2, 4, 8])
    tight = random.random() < 0.5
    longest = -(-80 // page_tokens)
    pages = longest + (random.randint(0, 8) if tight else 120)
    values: dict[str, Any] = {
        "page_tokens": page_tokens,
        "prefill_pages": pages,
        "decode_pages": pages,
        "budget_tokens": random.choice([1, 3, 7, 16, 64]),
        "max_running": random.choice([2, 5, 16]),
        "num_prefill": random.randint(1, 3),
        "num_decode": random.randint(1, 3),
        "num_requests": random.randint(4, 16),
        "prefill_seconds_per_token": random.choice([0.0001, 0.001, 0.005]),
        "decode_seconds_per_token": random.choice([0.0001, 0.001, 0.005]),
        "handoff": HandoffConfig(
            lease_seconds=random.choice([0.05, 0.5, 2.0]),
            importer_share=random.choice([0.1, 0.5, 1.0]),
            pull_pages_max=random.choice([1, 3, 64]),
            fence_seconds=0.2,
        ),
    }
    return Options(**{**values, **fixed})


def simulate(seed: int, **fixed: Any) -> World:
    world = World(seed, random_options(Random(seed), **fixed))
    try:
        world.run()
    except AssertionError:
        print(f"seed {seed}, {world.options}")
        print("\n".join(world.transcript[-80:]))
        raise
    return world


@pytest.mark.parametrize("prefill_loop", ["normal", "overlap"])
@pytest.mark.parametrize("decode_loop", ["normal", "overlap"])
def test_calm(prefill_loop: str, decode_loop: str) -> None:
    for seed in range(SEEDS):
        simulate(seed, prefill_loop=prefill_loop, decode_loop=decode_loop)


@pytest.mark.parametrize("prefill_loop", ["normal", "overlap"])
@pytest.mark.parametrize("decode_loop", ["normal", "overlap"])
def test_stormy(prefill_loop: str, decode_loop: str) -> None:
    for seed in range(1000, 1000 + SEEDS):
        simulate(
            seed,
            prefill_loop=prefill_loop,
            decode_loop=decode_loop,
            faults=0.2,
            kills=seed % 3,
            transfer_kills=seed % 2,
            cancels=0.2,
        )


@pytest.mark.parametrize("loop", ["normal", "overlap"])
def test_unified(loop: str) -> None:
    for seed in range(2000, 2000 + SEEDS):
        simulate(seed, unified=True, num_prefill=0, decode_loop=loop, cancels=0.2)


def test_same_seed_same_transcript() -> None:
    first = simulate(7, faults=0.2, kills=2, cancels=0.2)
    second = simulate(7, faults=0.2, kills=2, cancels=0.2)
    assert first.transcript == second.transcript
    assert len(first.transcript) > 100
