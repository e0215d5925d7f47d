"""Routes are decided by load, role, state and fit, and by nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tandem.core.routing import Route, WorkerView, choose_route
from tandem.core.stats import LoadSnapshot, PageCounts


def worker(address: str, role: str = "decode", **changes: Any) -> WorkerView:
    view = WorkerView(
        address=address,
        role=role,
        ready=True,
        instance_id=address.encode(),
        fingerprint="f",
        max_req_input_len=100,
        max_running_requests=10,
    )
    return replace(view, **changes)


def route(*fleet: WorkerView, **options: Any) -> Route | None:
    settings: dict[str, Any] = {"prompt_tokens": 10, "max_prefill_peers": 2} | options
    return choose_route(fleet, **settings)


def test_nobody_to_own_the_request() -> None:
    assert route() is None
    assert route(worker("p", "prefill")) is None
    assert route(worker("d", ready=False)) is None
    assert route(worker("d", load=LoadSnapshot(draining=True))) is None
    assert route(worker("d", max_req_input_len=9)) is None
    assert route(worker("d"), excluded=frozenset([b"d"])) is None
    assert route(worker("d", max_req_input_len=0)) == Route("d")
    assert route(worker("d", instance_id=b"next life"), excluded=frozenset([b"d"])) == Route("d")


def test_the_least_loaded_owner() -> None:
    busy, idle = worker("a", load=LoadSnapshot(running_requests=3, waiting_requests=1)), worker("b", inflight=3)
    assert route(busy, idle) == Route("b")
    assert route(busy, replace(idle, inflight=5)) == Route("a")
    assert route(replace(busy, dispatched_since_load=2), replace(idle, inflight=5)) == Route("b")
    assert route(replace(busy, max_running_requests=100), idle) == Route("a")
    full = LoadSnapshot(pages=PageCounts(free=1, held=9, total=10))
    assert route(worker("a", load=full), worker("b")) == Route("b")
    assert route(worker("b"), worker("a")) == Route("a")


def test_evictable_pages_are_no_load() -> None:
    cached = LoadSnapshot(pages=PageCounts(cached=10, total=10))
    assert route(worker("a", load=cached), worker("b")) == Route("a")


def test_prefill_peers_least_loaded_first() -> None:
    peers = [
        worker("p1", "prefill", load=LoadSnapshot(waiting_uncached_tokens=50)),
        worker("p2", "prefill", inflight_tokens=20, inflight=1),
        worker("p3", "prefill", inflight=2),
    ]
    assert route(worker("d"), *peers) == Route("d", ("p3", "p2"))
    assert route(worker("d"), *peers, max_prefill_peers=1) == Route("d", ("p3",))
    assert route(worker("d"), *peers, excluded=frozenset([b"p3"])) == Route("d", ("p2", "p1"))
    assert route(worker("u", "unified"), *peers) == Route("u")


def test_peers_that_cannot_pair_are_not_named() -> None:
    fenced = worker("d", load=LoadSnapshot(fenced_instance_ids=(b"p1",)))
    unfit = [
        worker("p1", "prefill"),
        worker("p2", "prefill", fingerprint="other"),
        worker("p3", "prefill", ready=False),
        worker("p4", "prefill", load=LoadSnapshot(draining=True)),
        worker("p5", "prefill", max_req_input_len=9),
    ]
    assert route(fenced, *unfit) == Route("d")
    assert route(fenced, *unfit, worker("p6", "prefill")) == Route("d", ("p6",))


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.integers(1, 200))
def test_dispatching_one_by_one_fills_evenly(loads: list[int], count: int) -> None:
    """With own counts only, the most loaded worker never gets a request while another has less."""
    counts = list(loads)
    for _ in range(count):
        chosen = route(*(worker(str(i), inflight=n) for i, n in enumerate(counts)))
        assert chosen is not None
        index = int(chosen.decode)
        assert counts[index] == min(counts)
        counts[index] += 1


def test_both_sides_have_the_adapter() -> None:
    having: dict[str, Any] = {"adapters": frozenset({"a"})}
    fleet = (
        worker("d1"),
        worker("d2", inflight=5, **having),
        worker("p1", "prefill"),
        worker("p2", "prefill", **having),
    )
    assert route(*fleet) == Route("d1", ("p1", "p2"))
    assert route(*fleet, adapter="a") == Route("d2", ("p2",))
    assert route(*fleet, adapter="b") is None
