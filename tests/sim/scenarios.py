"""Random runs by seed, and what is printed of one that fails."""

from __future__ import annotations

from random import Random
from typing import Any

from tandem.config import HandoffConfig
from tandem.core.messages.handoff import Sharding
from tests.sim.world import Options, World

TRANSCRIPT_LINES = 200
STORM = {"faults": 0.2, "lost_releases": 0.1, "cancels": 0.2, "deadlines": 0.1}


def random_options(random: Random, **fixed: Any) -> Options:
    page_tokens = random.choice([1, 2, 4, 8])
    tight = random.random() < 0.5
    longest = -(-80 // page_tokens)
    pages = longest + (random.randint(0, 8) if tight else 60)
    values: dict[str, Any] = {
        "page_tokens": page_tokens,
        "prefill_pages": pages,
        "decode_pages": pages,
        "budget_tokens": random.choice([1, 3, 7, 16, 64]),
        "microbatch_tokens_min": random.choice([1, 1, 4, 64]),
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
        "prefill_sharding": Sharding(random.choice([1, 2, 4]), random.choice([1, 2, 4])),
        "decode_sharding": Sharding(random.choice([1, 2, 4]), random.choice([1, 2, 4])),
    }
    return Options(**{**values, **fixed})


def simulate(seed: int, **fixed: Any) -> World:
    """Run one seed to quiescence; raises AssertionError, with its last lines printed, if anything is wrong."""
    world = World(seed, random_options(Random(seed), **fixed))
    try:
        world.run()
    except Exception:
        print(f"seed {seed}, {world.options}")
        print("\n".join(line[:300] for line in world.transcript[-TRANSCRIPT_LINES:]))
        raise
    return world


def stormy(seed: int, **fixed: Any) -> World:
    """Run a seed with every kind of fault."""
    return simulate(seed, **{**STORM, **deaths(seed, 3), **fixed})


def crowded(seed: int, **fixed: Any) -> World:
    """Run a stormy seed in which many requests share few pages: everything that can happen, happens often."""
    crowd = {
        "page_tokens": 4,
        "prefill_pages": 24,
        "decode_pages": 22,
        "max_running": 16,
        "num_decode": 1 + seed % 2,
        "num_requests": 16,
        "lost_releases": 0.5,
    }
    return stormy(seed, **{**crowd, **deaths(seed, 4), **fixed})


def deaths(seed: int, most: int) -> dict[str, int]:
    """Return how many workers and transfer processes die, and how many workers drain, in the run of a seed."""
    return {"kills": seed % most, "transfer_kills": seed % 2, "drains": int(seed % 3 == 1)}
