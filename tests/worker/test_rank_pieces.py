"""Hand-offs between workers of any two shapes, over real transfer processes: every byte of every rank is right."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tandem.core.messages.handoff import Sharding
from tandem.core.messages.transfer import CancelPull, PullStatus, Revoke, Revoked, Slab, TransferLost, TransferReady
from tandem.core.sharding import KvPart, pieces
from tandem.transfer.choice import mooncake_absence
from tandem.transfer.layout import KvLayout
from tests.worker.group_rig import MODEL, RankedWorker, model_kv

SHAPES = [Sharding(tensor, stages) for tensor in (1, 2, 4) for stages in (1, 2)]
PAIRS = list(itertools.product(SHAPES, SHAPES))
SOURCES, TARGETS = (5, 1, 2, 7), (9, 15, 10, 8)
KV = model_kv(1)
Workers = Callable[[Sharding], RankedWorker]


def named(sharding: Sharding) -> str:
    return f"tp{sharding.tensor_size}pp{sharding.pipeline_size}"


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    """One worker a shape; each exports to all and imports from all."""
    made: dict[Sharding, RankedWorker] = {}

    def get(sharding: Sharding) -> RankedWorker:
        if sharding not in made:
            made[sharding] = RankedWorker(sharding)
        return made[sharding]

    yield get
    for worker in made.values():
        worker.close()


def hand_over(exporter: RankedWorker, importer: RankedWorker) -> None:
    """One hand-off, and what must be true of it; raises AssertionError where it is not.

    This is the check of the planted fault `wrong head range`: run it with the fault in place.
    """
    exporter.hold(KV)
    importer.hold(model_kv(9))
    before = [pool.copy() for pool in importer.pools]
    handoff_id = os.urandom(16)
    shared = exporter.export(handoff_id, SOURCES, importer.sharding)
    num_pieces = len(pieces(exporter.sharding, importer.sharding, MODEL.num_layers, MODEL.num_kv_heads))
    assert len(shared.checksums) == 8 * num_pieces * len(SOURCES)
    ended = importer.pull(shared, TARGETS)
    assert ended.status is PullStatus.DONE, ended
    assert (ended.good_ordinals, ended.bad_ordinals) == (tuple(range(len(SOURCES))), ())
    assert ended.num_bytes == len(SOURCES) * MODEL.page_bytes, "every byte once, whoever read it"
    assert ended.transport == importer.ready.imports[0]
    assert importer.holds(KV, TARGETS, SOURCES)
    others = np.setdiff1d(np.arange(MODEL.num_pages), TARGETS)
    for pool, old in zip(importer.pools, before, strict=True):
        assert np.array_equal(pool[others], old[others]), "no other page was touched"
    exporter.group.send(Revoke(handoff_id))
    exporter.wait(Revoked, lambda outcome: outcome.handoff_id == handoff_id)


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=[f"{named(one)}-{named(two)}" for one, two in PAIRS])
def test_every_byte_of_every_rank_arrives(workers: Workers, source: Sharding, target: Sharding) -> None:
    exporter = workers(source)
    importer = workers(target) if target != source else RankedWorker(target)
    try:
        hand_over(exporter, importer)
    finally:
        if target == source:
            importer.close()


def test_a_flipped_bit_in_one_piece_is_found_and_pulled_again(workers: Workers) -> None:
    exporter, importer = workers(Sharding(2, 1)), workers(Sharding(1, 2))
    exporter.hold(KV)
    importer.hold(model_kv(9))
    shared = exporter.export(os.urandom(16), SOURCES, importer.sharding)
    for adopted in importer.adopted:
        adopted.clear()
    exporter.pools[1][2, 2, 0, 1, 3, 0] ^= 1 << 30  # page 2 has ordinal 2; layer 2 is the second stage's
    ended = importer.pull(shared, TARGETS)
    assert (ended.status, ended.bad_ordinals, ended.good_ordinals) == (PullStatus.MISMATCH, (2,), (0, 1, 3))
    assert all(adopted == [9, 15, 8] for adopted in importer.adopted), "what is not whole is told to no device"
    exporter.hold(KV)
    size = 8 * len(SOURCES)
    checksums = b"".join(shared.checksums[begin + 16 : begin + 24] for begin in range(0, len(shared.checksums), size))
    again = importer.pull(
        shared, TARGETS[2:3], ordinals=(2,), checksums=checksums, remote_pages=np.array([2], "<u4").tobytes()
    )
    assert (again.status, again.good_ordinals) == (PullStatus.DONE, (2,))
    assert importer.holds(KV, TARGETS, SOURCES)


@pytest.mark.parametrize("target", [Sharding(1, 1), Sharding(4, 1), Sharding(1, 2)], ids=named)
def test_chunks_are_pulled_as_they_come(workers: Workers, target: Sharding) -> None:
    exporter, importer = workers(Sharding(2, 2)), workers(target)
    exporter.hold(KV)
    importer.hold(model_kv(9))
    handoff_id = os.urandom(16)
    chunks = [exporter.export(handoff_id, SOURCES[:3], target), exporter.export(handoff_id, (7,), target, 1, 3)]
    tickets = [importer.begin_pull(chunks[1], TARGETS[3:]), importer.begin_pull(chunks[0], TARGETS[:3])]
    assert [importer.end_pull(ticket).status for ticket in tickets] == [PullStatus.DONE] * 2
    assert importer.holds(KV, TARGETS, SOURCES)


def plant_wrong_head_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a rank has more heads than the piece, take those beside it."""
    slab_of = KvLayout.slab

    def slab(layout: KvLayout, part: KvPart) -> Slab:
        spare = layout.num_kv_heads - part.num_heads
        first = part.first_head if spare == 0 else (part.first_head + part.num_heads) % layout.num_kv_heads
        return slab_of(layout, KvPart(part.first_layer, part.num_layers, first, part.num_heads))

    monkeypatch.setattr(KvLayout, "slab", slab)


@pytest.mark.parametrize("pair", [(Sharding(2, 1), Sharding(1, 1)), (Sharding(1, 1), Sharding(2, 1))], ids=str)
def test_a_wrong_head_range_is_caught(
    workers: Workers, monkeypatch: pytest.MonkeyPatch, pair: tuple[Sharding, Sharding]
) -> None:
    exporter, importer = workers(pair[0]), workers(pair[1])
    plant_wrong_head_range(monkeypatch)
    with pytest.raises(AssertionError):
        hand_over(exporter, importer)


def test_one_ranks_process_is_replaced_and_the_hand_off_attached_again() -> None:
    """On both sides: what the group had in hand is over when TransferLost comes, and a higher attempt goes on."""
    exporter, importer = RankedWorker(Sharding(2, 1)), RankedWorker(Sharding(1, 2))
    try:
        exporter.hold(KV)
        importer.hold(model_kv(9))
        handoff_id = os.urandom(16)
        old = exporter.export(handoff_id, SOURCES, importer.sharding)
        for worker, rank in ((exporter, 1), (importer, 0)):
            os.kill(worker.pid(rank), signal.SIGKILL)
            lost = worker.wait(TransferLost)
            assert f"rank {rank}" in lost.message
            before, worker.ready = worker.ready, worker.wait(TransferReady)
            lives = zip(before.endpoints, worker.ready.endpoints, strict=True)
            assert [one == other for one, other in lives] == [index != rank for index in range(2)]
        ended = importer.pull(old, TARGETS)
        assert ended.status in (PullStatus.REFUSED, PullStatus.FAILED), "no rank serves what was lost on one"
        new = exporter.export(handoff_id, SOURCES, importer.sharding, attempt=2)
        assert importer.pull(new, TARGETS).status is PullStatus.DONE
        assert importer.holds(KV, TARGETS, SOURCES)
    finally:
        exporter.close()
        importer.close()


def test_a_rank_that_stands_still_fails_the_pull_and_ends_its_siblings() -> None:
    exporter, importer = RankedWorker(Sharding(2, 1)), RankedWorker(Sharding(1, 1), patience_seconds=3.0)
    stopped = exporter.pid(1)
    try:
        exporter.hold(KV)
        importer.hold(model_kv(9))
        shared = exporter.export(os.urandom(16), SOURCES, importer.sharding)
        os.kill(stopped, signal.SIGSTOP)
        ticket = importer.begin_pull(shared, TARGETS)
        ended = importer.end_pull(ticket)
        assert (ended.status, ended.good_ordinals) == (PullStatus.FAILED, ()), "half of a page is no page"
        assert importer.adopted == [[]]
        os.kill(stopped, signal.SIGCONT)
        assert importer.pull(shared, TARGETS).status is PullStatus.DONE
        assert importer.holds(KV, TARGETS, SOURCES)
        cancelled = importer.begin_pull(shared, TARGETS)
        importer.group.send(CancelPull(cancelled))
        assert importer.end_pull(cancelled).status in (PullStatus.CANCELLED, PullStatus.DONE)
    finally:
        os.kill(stopped, signal.SIGCONT)
        exporter.close()
        importer.close()


@pytest.mark.mooncake
@pytest.mark.skipif(bool(mooncake_absence()), reason=mooncake_absence() or "Mooncake is there")
@pytest.mark.parametrize("pair", [(Sharding(2, 1), Sharding(1, 2)), (Sharding(1, 1), Sharding(2, 1))], ids=str)
def test_one_sided_reads_take_the_same_pieces(pair: tuple[Sharding, Sharding]) -> None:
    exporter, importer = (RankedWorker(sharding, "mooncake-tcp") for sharding in pair)
    try:
        assert importer.ready.imports[0] == "mooncake-tcp", importer.ready.notes
        hand_over(exporter, importer)
    finally:
        exporter.close()
        importer.close()
