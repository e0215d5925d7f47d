"""Proof that the proof can fail: each of the planted faults makes the slice of the simulation fail that it belongs to.

A fault that its slice does not notice means that a check is missing there.
"""

from __future__ import annotations

import pytest

from tests.sim import token_plants
from tests.sim.plants import PLANTS, SLICE_OF
from tests.sim.slices import SLICES

FIRST_SEED, MAX_SEEDS, CLEAN_SEEDS = 3000, 40, 8
assert token_plants.__doc__, "imported for what it plants"


def fault_in(part: str, num_seeds: int) -> Exception | None:
    """Run a slice until it fails; return how."""
    for seed in range(FIRST_SEED, FIRST_SEED + num_seeds):
        try:
            SLICES[part](seed)
        except (AssertionError, KeyError, IndexError, ValueError) as fault:
            return fault
    return None


@pytest.mark.parametrize("name", list(PLANTS))
def test_a_planted_fault_is_found_by_its_slice(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    PLANTS[name](monkeypatch)
    found = fault_in(SLICE_OF[name], MAX_SEEDS)
    capsys.readouterr()
    assert found is not None, f"{name}: not noticed in {MAX_SEEDS} runs of {SLICE_OF[name]}"


@pytest.mark.parametrize("part", list(SLICES))
def test_a_slice_without_a_fault_is_well(part: str) -> None:
    fault = fault_in(part, CLEAN_SEEDS)
    assert fault is None, f"{part}: {fault!r}"


def test_every_slice_has_faults_of_its_own() -> None:
    assert set(SLICE_OF.values()) == set(SLICES)
    assert len(PLANTS) >= 25
