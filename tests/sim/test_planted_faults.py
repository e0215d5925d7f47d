"""Proof that the proof can fail: each of the planted faults makes a simulation fail.

A fault that no run notices means that a check is missing.
"""

from __future__ import annotations

import pytest

from tests.sim import token_plants
from tests.sim.plants import PLANTS
from tests.sim.scenarios import crowded

FIRST_SEED, MAX_SEEDS = 3000, 120
assert token_plants.__doc__, "imported for what it plants"


@pytest.mark.parametrize("name", list(PLANTS))
def test_a_planted_fault_is_found(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    PLANTS[name](monkeypatch)
    found = None
    for seed in range(FIRST_SEED, FIRST_SEED + MAX_SEEDS):
        try:
            crowded(seed)
        except (AssertionError, KeyError, IndexError, ValueError) as fault:
            found = fault
            break
    capsys.readouterr()
    assert found is not None, f"{name}: not noticed in {MAX_SEEDS} runs"
