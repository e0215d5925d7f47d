"""A pipeline is full: on a long steady load its stages compute nearly all the time, and the more, the faster."""

from __future__ import annotations

import pytest

from tandem.core.microbatches import Microbatches, Share
from tests.sim.steady import LOADS, Steady, run_steady

# Most of a stage's time without a plan, by stages. Plans of one length would have none.
BUBBLES = {2: 0.06, 4: 0.12}
WITH_JITTER = {2: 0.12, 4: 0.18}


def found(stages: int, name: str) -> Steady:
    return run_steady(stages, LOADS[name])


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("name", [name for name in LOADS if "jitter" not in name])
def test_the_bubbles_of_a_steady_load_are_bounded(name: str, stages: int) -> None:
    steady = found(stages, name)
    assert max(steady.bubbles) <= BUBBLES[stages]
    assert steady.most_in_flight == stages


@pytest.mark.parametrize("stages", [2, 4])
def test_the_bubbles_are_bounded_where_plans_take_longer_than_predicted(stages: int) -> None:
    assert max(found(stages, "jitter of a quarter").bubbles) <= WITH_JITTER[stages]


def test_stages_bring_nearly_their_number() -> None:
    """A plan's own cost counts once a plan, so smaller plans cost something even without bubbles."""
    rates = [found(stages, "steady").tokens_per_second for stages in (1, 2, 4)]
    assert rates[1] / rates[0] >= 1.8
    assert rates[2] / rates[0] >= 3.3


def test_a_plan_that_takes_everything_leaves_the_stages_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the bounds above would say nothing."""
    everything = Share(float("inf"), 0.0, float("inf"), 1)
    monkeypatch.setattr(Microbatches, "share", lambda self, decode, prompts: everything)
    assert min(found(4, "steady").bubbles) > 0.5
