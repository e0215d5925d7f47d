"""What every transport promises, whatever it is made of."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import pytest

from tandem.core.messages.transfer import PullEnded, PullStatus, Revoke, Revoked
from tandem.transfer import hashing
from tandem.transfer.pages import Pages, PageSpace
from tests.fakes.transport_loopback import LOOPBACK
from tests.transfer.conftest import ALL_TRANSPORTS, NewPeer
from tests.transfer.peer import TCP_TLS, Peer

Pair = tuple[Peer, Peer]

every = pytest.mark.parametrize("pair", ALL_TRANSPORTS, indirect=True)
guarded = pytest.mark.parametrize("pair", [LOOPBACK, "tcp", TCP_TLS], indirect=True)  # who know who may read


@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
@pytest.mark.parametrize(("page_bytes", "num_pages"), [(512, 2500), (32 << 10, 300), (48 << 10, 7), (5 << 20, 4)])
def test_pages_arrive(transport: str, page_bytes: int, num_pages: int, new_peer: NewPeer) -> None:
    exporter = new_peer(transport, page_bytes=page_bytes, num_pages=num_pages, seed=1)
    importer = new_peer(transport, page_bytes=page_bytes, num_pages=num_pages, seed=2)
    order = random.Random(3)
    for count in sorted({1, num_pages // 2, num_pages}):
        sources, targets = order.sample(range(num_pages), count), order.sample(range(num_pages), count)
        importer.rows[:] = 0
        shared = exporter.export(os.urandom(16), sources)
        ended = importer.pull(shared, targets)
        assert (ended.status, ended.good_ordinals, ended.bad_ordinals) == (PullStatus.DONE, tuple(range(count)), ())
        assert ended.num_bytes == count * page_bytes
        assert ended.transport == importer.transport
        assert 0 < ended.seconds < 60
        assert np.array_equal(importer.rows[targets], exporter.rows[sources])
        others = np.setdiff1d(np.arange(num_pages), targets)
        assert not importer.rows[others].any()
        exporter.revoke(shared.handoff_id)


@every
def test_checksums_are_xxh3_of_the_page(pair: Pair) -> None:
    exporter, _ = pair
    shared = exporter.export(os.urandom(16), [5, 3])
    space = PageSpace(exporter.memory.view, exporter.layout.page_bytes)
    assert shared.checksums == hashing.pack(hashing.hashes(Pages.of(space, [5, 3])))


@every
def test_chunks_of_one_handoff_come_in_order_and_can_be_pulled_in_any(pair: Pair) -> None:
    exporter, importer = pair
    handoff_id = os.urandom(16)
    chunks = [exporter.export(handoff_id, range(begin, begin + 7), first_ordinal=begin) for begin in (0, 7, 14)]
    tickets = [(importer.begin_pull(chunk, chunk.pages), chunk) for chunk in reversed(chunks)]
    for ticket, chunk in tickets:
        ended = importer.end_pull(ticket)
        assert (ended.status, ended.good_ordinals) == (PullStatus.DONE, tuple(chunk.pages))
    assert np.array_equal(importer.rows[:21], exporter.rows[:21])


@every
def test_a_subset_of_ordinals_in_any_order(pair: Pair) -> None:
    exporter, importer = pair
    shared = exporter.export(os.urandom(16), range(20, 40))
    wanted = [17, 2, 3, 11]
    checksums = hashing.pack(hashing.unpack(shared.checksums)[wanted])
    remote = np.array([20 + ordinal for ordinal in wanted], dtype="<u4").tobytes()
    ended = importer.pull(shared, [0, 1, 2, 3], ordinals=tuple(wanted), checksums=checksums, remote_pages=remote)
    assert (ended.status, ended.good_ordinals) == (PullStatus.DONE, (17, 2, 3, 11))
    assert np.array_equal(importer.rows[:4], exporter.rows[[37, 22, 23, 31]])


@every
def test_a_page_that_differs_is_named(pair: Pair) -> None:
    exporter, importer = pair
    shared = exporter.export(os.urandom(16), range(10))
    exporter.rows[4, 100] ^= 1  # written after it was announced
    ended = importer.pull(shared, range(10))
    exporter.rows[4, 100] ^= 1
    assert (ended.status, ended.bad_ordinals) == (PullStatus.MISMATCH, (4,))
    assert ended.good_ordinals == (0, 1, 2, 3, 5, 6, 7, 8, 9)
    assert importer.pull(shared, range(10)).status is PullStatus.DONE


@guarded
@pytest.mark.parametrize("change", ["handoff_id", "attempt", "token", "ordinals", "nothing exported"])
def test_what_is_not_announced_is_refused(pair: Pair, change: str) -> None:
    exporter, importer = pair
    shared = exporter.export(os.urandom(16), range(3), attempt=5)
    all_changes: dict[str, dict[str, Any]] = {
        "handoff_id": {"handoff_id": os.urandom(16)},
        "attempt": {"attempt": 4},
        "token": {"token": b"tokem"},
        "ordinals": {"ordinals": (0, 1, 3)},
        "nothing exported": {"handoff_id": b""},
    }
    before = importer.rows.copy()
    ended = importer.pull(shared, range(3), **all_changes[change])
    assert ended.status is PullStatus.REFUSED, ended
    if change != "ordinals" or exporter.transport != LOOPBACK:
        assert np.array_equal(importer.rows, before)
    assert importer.pull(shared, range(3)).status is PullStatus.DONE  # nothing else was disturbed


@guarded
def test_a_revoked_handoff_is_refused_and_can_be_exported_again(pair: Pair) -> None:
    exporter, importer = pair
    shared = exporter.export(os.urandom(16), range(3))
    assert importer.pull(shared, range(3)).status is PullStatus.DONE
    exporter.revoke(shared.handoff_id)
    assert importer.pull(shared, range(3)).status is PullStatus.REFUSED
    again = exporter.export(shared.handoff_id, range(3))
    assert importer.pull(again, range(3)).status is PullStatus.DONE


@guarded
def test_a_higher_attempt_replaces_the_token(pair: Pair) -> None:
    exporter, importer = pair
    handoff_id = os.urandom(16)
    first = exporter.export(handoff_id, range(3), attempt=1, token=b"one")
    second = exporter.export(handoff_id, range(3), attempt=2, token=b"two")
    assert importer.pull(first, range(3)).status is PullStatus.REFUSED
    assert importer.pull(second, range(3)).status is PullStatus.DONE
    exporter.export(handoff_id, range(3), attempt=1, token=b"one")  # stale: answered, never served
    assert importer.pull(first, range(3)).status is PullStatus.REFUSED
    assert importer.pull(second, range(3)).status is PullStatus.DONE


@every
def test_revoking_what_is_unknown_is_acknowledged(pair: Pair) -> None:
    exporter, _ = pair
    exporter.revoke(os.urandom(16))


@every
def test_a_revocation_right_behind_an_export_leaves_nothing(pair: Pair) -> None:
    exporter, importer = pair
    for _ in range(20):
        handoff_id = os.urandom(16)
        shared = exporter.export(handoff_id, range(64))
        exporter.pipe.send(Revoke(handoff_id))
        exporter.wait(Revoked, lambda outcome, wanted=handoff_id: outcome.handoff_id == wanted)  # type: ignore[misc]
    if exporter.transport in (LOOPBACK, "tcp"):
        assert importer.pull(shared, range(64)).status is PullStatus.REFUSED


@every
def test_another_instance_id_is_not_pulled_from(pair: Pair) -> None:
    exporter, importer = pair
    shared = exporter.export(os.urandom(16), range(3))
    endpoint = type(exporter.endpoint)(
        transport=exporter.endpoint.transport, address=exporter.endpoint.address, instance_id=os.urandom(16)
    )
    assert importer.pull(shared, range(3), endpoint=endpoint).status is PullStatus.FAILED


@every
def test_an_unknown_transport_fails(pair: Pair) -> None:
    exporter, importer = pair
    shared = exporter.export(os.urandom(16), range(3))
    endpoint = type(exporter.endpoint)(transport="pigeon", address="loft", instance_id=os.urandom(16))
    ended = importer.pull(shared, range(3), endpoint=endpoint)
    assert (ended.status, "pigeon" in ended.message) == (PullStatus.FAILED, True)


@every
def test_a_cancel_of_what_is_over_or_unknown_is_ignored(pair: Pair) -> None:
    exporter, importer = pair
    shared = exporter.export(os.urandom(16), range(3))
    ticket = importer.begin_pull(shared, range(3))
    assert importer.end_pull(ticket).status is PullStatus.DONE
    importer.cancel(ticket)
    importer.cancel(10**9)
    assert [outcome for outcome in importer.drain(0.05) if isinstance(outcome, PullEnded)] == []


@every
def test_random_pulls_cancels_and_revocations_leave_every_page_to_its_owner(pair: Pair) -> None:
    """Pages are given to the next pull the moment the last one ended; a canary in free pages shows late bytes."""
    exporter, importer = pair
    chooser = random.Random(7)
    num_pages, canary = importer.layout.num_pages, 0xA5
    importer.rows[:] = canary
    free = set(range(num_pages))
    running: dict[int, tuple[list[int], list[int]]] = {}  # ticket: sources, targets
    num_done = 0

    def settle(ended: PullEnded) -> None:
        nonlocal num_done
        sources, targets = running.pop(ended.ticket)
        for ordinal in ended.good_ordinals:
            assert np.array_equal(importer.rows[targets[ordinal]], exporter.rows[sources[ordinal]])
        if ended.status is PullStatus.DONE:
            assert len(ended.good_ordinals) == len(targets)
            num_done += 1
        importer.rows[targets] = canary
        free.update(targets)

    for _ in range(150):
        handoff_id = os.urandom(16)
        sources = chooser.sample(range(num_pages), chooser.randint(1, 24))
        shared = exporter.export(handoff_id, sources)
        while len(free) < len(sources):
            settle(importer.wait(PullEnded))
        targets = chooser.sample(sorted(free), len(sources))
        free.difference_update(targets)
        ticket = importer.begin_pull(shared, targets)
        running[ticket] = (sources, targets)
        if chooser.random() < 0.4:
            importer.cancel(chooser.choice(list(running)))
        if chooser.random() < 0.3:
            exporter.revoke(handoff_id)
        assert (importer.rows[sorted(free)] == canary).all()
    while running:
        settle(importer.wait(PullEnded))
    assert num_done > 20
    for outcome in importer.drain(0.1):
        assert not isinstance(outcome, PullEnded)
    assert (importer.rows == canary).all()
