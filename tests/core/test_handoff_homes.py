"""Where hand-offs live: every attempt of an id finds the replica of the first, for as long as it may matter."""

from __future__ import annotations

import pytest

from tandem.core import handoff_homes
from tandem.core.handoff_homes import HandoffHomes


def test_a_home_is_found_while_a_stream_is_open_and_for_a_while_after() -> None:
    homes = HandoffHomes(remember_seconds=10.0)
    assert homes.find(b"a", 0.0) is None
    homes.opened(b"a", 1, 2)
    assert homes.find(b"a", 1000.0) == 2
    assert homes.of_stream(1) == (b"a", 2)
    assert homes.closed(1, 1000.0)
    assert homes.of_stream(1) is None
    assert homes.find(b"a", 1009.9) == 2
    assert homes.find(b"a", 1010.0) is None
    assert len(homes) == 0


def test_an_attach_keeps_it_and_the_older_stream_ends_later() -> None:
    homes = HandoffHomes(remember_seconds=10.0)
    homes.opened(b"a", 1, 0)
    homes.opened(b"a", 2, 0)
    assert not homes.closed(1, 5.0), "the second stream is open still"
    assert homes.find(b"a", 100.0) == 0
    assert homes.closed(2, 100.0)
    homes.opened(b"a", 3, 0)  # within the lease
    assert homes.find(b"a", 1000.0) == 0
    assert homes.closed(3, 1000.0)
    assert not homes.closed(3, 1000.0), "a stream ends once"
    assert homes.find(b"a", 1009.0) == 0


def test_the_number_of_ids_without_a_stream_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff_homes, "MAX_REMEMBERED", 3)
    homes = HandoffHomes(remember_seconds=10.0)
    homes.opened(b"live", 0, 1)
    for number in range(1, 6):
        homes.opened(bytes([number]), number, 1)
        homes.closed(number, float(number))
    assert len(homes) == 4
    assert [homes.find(bytes([number]), 6.0) for number in range(1, 6)] == [None, None, 1, 1, 1]
    assert homes.find(b"live", 6.0) == 1
