"""Ids of one answer's hand-offs: what can still be of use is named again, with a higher attempt."""

from __future__ import annotations

from tandem.gateway.handoffs import Handoffs


def counting() -> Handoffs:
    numbers = iter(range(1, 100))
    return Handoffs(lambda size: next(numbers).to_bytes(size, "big"))


def named(handoffs: Handoffs, num_outputs: int, *, takes_new: bool = True) -> list[tuple[int, int, int]]:
    peers = handoffs.name("host:1", b"life", num_outputs, takes_new=takes_new)
    assert all((peer.address, peer.instance_id) == ("host:1", b"life") for peer in peers)
    return [(int.from_bytes(peer.handoff_id, "big"), peer.attempt, peer.output_tokens) for peer in peers]


def test_a_handoff_is_of_use_until_its_second_token() -> None:
    handoffs = counting()
    assert named(handoffs, 0) == [(1, 1, 0)]
    assert named(handoffs, 0) == [(1, 2, 0), (2, 1, 0)]
    assert named(handoffs, 1) == [(1, 3, 0), (2, 2, 0), (3, 1, 1)]
    assert named(handoffs, 2) == [(3, 2, 1), (4, 1, 2)]
    assert named(handoffs, 9) == [(5, 1, 9)]


def test_a_draining_worker_is_asked_for_what_it_has_only() -> None:
    handoffs = counting()
    assert named(handoffs, 0) == [(1, 1, 0)]
    assert named(handoffs, 1, takes_new=False) == [(1, 2, 0)]
    assert named(handoffs, 5, takes_new=False) == []


def test_workers_are_remembered_in_order() -> None:
    handoffs = counting()
    for life in (b"b", b"a", b"b"):
        handoffs.name("host:1", life, 0, takes_new=True)
    assert handoffs.instance_ids == (b"b", b"a")
