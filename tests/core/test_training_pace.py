"""Training takes its share of the device's time, and no more, however long its pieces are."""

from __future__ import annotations

import random

import pytest

from tandem.core.training_pace import TrainingPace


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_the_share_is_kept(share: float) -> None:
    source, pace, now = random.Random(1), TrainingPace(share), 100.0
    pace.begin(now)
    taken = 0.0
    while now < 400.0:
        now = max(now, pace.due()) + source.choice((0.0, 0.2))  # plans may be in the way
        seconds = source.uniform(0.001, 0.5)
        taken += seconds
        now += seconds
        pace.resolved(seconds, now)
    assert pace.share(now) == pytest.approx(taken / (now - 100.0))
    assert pace.share(max(now, pace.due())) <= share + 1e-9
    assert taken > 0.5 * share * (now - 100.0)


def test_the_first_piece_waits_for_nothing() -> None:
    pace = TrainingPace(0.5)
    pace.begin(7.0)
    assert pace.due() == 7.0
    pace.resolved(1.0, 8.0)
    assert pace.due() == 9.0
    pace.begin(8.5)
    assert (pace.due(), pace.share(8.5)) == (8.5, 0.0)
