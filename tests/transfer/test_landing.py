"""The landing ring over an engine that writes late, out of order, and after it reported failure."""

from __future__ import annotations

import itertools
import os
import queue
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tandem.core.messages.handoff import RankEndpoint
from tandem.core.messages.transfer import PullEnded, PullStatus, RankPull, Slab, Source
from tandem.transfer import hashing
from tandem.transfer.engine_pool import MAX_PARKED, EnginePool
from tandem.transfer.landing_importer import LandingImporter
from tandem.transfer.landing_link import MAX_OUTSTANDING_READS
from tandem.transfer.landing_ring import NUM_SLOTS, SLOT_BYTES, LandingRing, cut_at_arenas
from tandem.transfer.one_sided import PROBE_BYTES, OneSidedAddress, probe_pattern
from tandem.transfer.pages import Pages
from tandem.transfer.self_test import scratch
from tandem.transfer.tcp_exporter import TcpExporter, listen
from tandem.transfer.tcp_stream import TcpSettings
from tests.fakes.one_sided_engine import Behaviour, FakeEngines

# A busy machine must not end a pull, so nothing is broken off, or idle, within the seconds that it may stop a thread.
PATIENT = TcpSettings(connect_seconds=30.0, progress_seconds=30.0, idle_seconds=30.0, connections=1)
HASTY = replace(PATIENT, progress_seconds=4.0)  # for tests that wait for a break-off
END_SECONDS = 20.0  # a patient importer breaks nothing off within them
_tickets = itertools.count(1)


class Setting:
    """An exporter's memory, an importer with fake engines, and the control port that it dials first."""

    def __init__(self, num_pages: int = 64, page_bytes: int = 64 << 10, settings: TcpSettings = PATIENT) -> None:
        self.instance_id = os.urandom(16)
        self.control = TcpExporter(listen("127.0.0.1", 0), "127.0.0.1", self.instance_id, settings)
        self.source = scratch(num_pages, page_bytes)
        self.source.rows[:] = np.random.default_rng(1).integers(0, 256, self.source.rows.shape, dtype=np.uint8)
        self.probe = scratch(1, PROBE_BYTES)
        self.probe.rows[0] = np.frombuffer(probe_pattern(self.instance_id), dtype=np.uint8)
        self.target = scratch(num_pages, page_bytes)
        self.fake = FakeEngines()
        self.engines = EnginePool(self.fake.new_engine)
        self.importer = LandingImporter(self.target, "fake", self.engines, settings)
        self.outcomes: queue.Queue[PullEnded] = queue.Queue()

    @property
    def endpoint(self) -> RankEndpoint:
        address = OneSidedAddress("session", self.source.address, self.probe.address, self.control.endpoint.address)
        return RankEndpoint(transport="fake", address=address.encode(), instance_id=self.instance_id)

    def begin(self, sources: Sequence[int], targets: Sequence[int], **changes: Any) -> int:
        pull = RankPull(
            ticket=next(_tickets),
            endpoint=self.endpoint,
            handoff_id=b"",
            attempt=1,
            token=b"",
            ordinals=tuple(range(len(sources))),
            checksums=hashing.pack(hashing.hashes(Pages.of(self.source, sources))),
            remote_pages=np.array(sources, dtype="<u4").tobytes(),
            pages=tuple(targets),
        )
        self.importer.pull(replace(pull, **changes), self.outcomes.put)
        return pull.ticket

    def end(self, seconds: float = END_SECONDS) -> PullEnded:
        return self.outcomes.get(timeout=seconds)

    def pull(self, sources: Sequence[int], targets: Sequence[int], **changes: Any) -> PullEnded:
        self.begin(sources, targets, **changes)
        return self.end()

    def wait_for_reads(self, more_than: int = 1) -> None:
        """Until something of a pull was submitted; the first read is the probe."""
        deadline = time.monotonic() + END_SECONDS
        while not (self.fake.engines and self.fake.engines[-1].num_reads > more_than):
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def cancel_amid_frozen_reads(self, num_pages: int) -> None:
        """Let no read end from now on, begin a pull, and cancel it when its first read was submitted."""
        self.fake.behaviour.is_frozen = True
        reads = self.fake.engines[0].num_reads
        ticket = self.begin(range(num_pages), range(num_pages))
        self.wait_for_reads(more_than=reads)
        self.importer.cancel(ticket)
        assert self.end().status is PullStatus.CANCELLED

    def wait_for_engines(self, num_spare: int = 0, num_parked: int = 0) -> None:
        """Until so many were given back, clean or not."""
        deadline = time.monotonic() + END_SECONDS
        while (self.engines.num_spare, self.engines.num_parked) != (num_spare, num_parked):
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def close(self) -> None:
        self.importer.close()
        self.control.close()


@pytest.fixture
def setting() -> Iterator[Setting]:
    made = Setting()
    yield made
    made.close()


@pytest.fixture
def hasty() -> Iterator[Setting]:
    made = Setting(settings=HASTY)
    yield made
    made.close()


@pytest.mark.parametrize(("page_bytes", "num_pages"), [(512, 3000), (64 << 10, 200), (3 << 20, 5), ((9 << 20) + 8, 3)])
def test_pages_arrive_whatever_the_order_of_reads(page_bytes: int, num_pages: int) -> None:
    setting = Setting(num_pages, page_bytes)
    setting.fake.behaviour.max_polls = 20
    order = random.Random(1)
    for count in (1, num_pages):
        sources, targets = order.sample(range(num_pages), count), order.sample(range(num_pages), count)
        ended = setting.pull(sources, targets)
        assert (ended.status, len(ended.good_ordinals)) == (PullStatus.DONE, count)
        assert np.array_equal(setting.target.rows[targets], setting.source.rows[sources])
    assert 0 < setting.fake.max_outstanding <= MAX_OUTSTANDING_READS
    assert len(setting.fake.engines) == 1
    setting.close()


def test_many_pulls_at_once_share_an_engine() -> None:
    setting = Setting()
    setting.fake.behaviour.max_polls = 10
    for number in range(16):
        setting.begin(range(number * 4, number * 4 + 4), range(number * 4, number * 4 + 4))
    assert {setting.end().status for _ in range(16)} == {PullStatus.DONE}
    assert np.array_equal(setting.target.rows, setting.source.rows)
    assert len(setting.fake.engines) == 1
    setting.close()


def test_a_page_that_differs_is_named(setting: Setting) -> None:
    checksums = bytearray(hashing.pack(hashing.hashes(Pages.of(setting.source, range(10)))))
    checksums[8 * 3] ^= 1
    ended = setting.pull(range(10), range(10), checksums=bytes(checksums))
    assert (ended.status, ended.bad_ordinals, len(ended.good_ordinals)) == (PullStatus.MISMATCH, (3,), 9)


def test_bytes_that_come_after_a_failure_hit_no_page(setting: Setting) -> None:
    """The engine says FAILED and writes later, while another pull uses the same ring."""
    setting.target.rows[:] = 0xA5
    both_wait = threading.Event()
    setting.fake.behaviour = Behaviour(max_polls=60, fails=lambda number: number == 5, blocked=both_wait)
    tickets = [setting.begin(range(0, 64, 2), range(32)), setting.begin(range(1, 64, 2), range(32, 64))]
    both_wait.set()
    late = 0
    outcomes: dict[int, PullEnded] = {}
    while len(outcomes) < 2:
        late += setting.fake.write_late()
        try:
            ended = setting.end(0.001)
        except queue.Empty:
            continue
        outcomes[ended.ticket] = ended
    assert outcomes[tickets[0]].status is PullStatus.FAILED
    assert late == 1
    good = [(tickets[0], ordinal) for ordinal in outcomes[tickets[0]].good_ordinals]
    for ordinal in range(32):
        expected = setting.source.rows[2 * ordinal] if (tickets[0], ordinal) in good else 0xA5
        assert (setting.target.rows[ordinal] == expected).all()
    assert outcomes[tickets[1]].status is PullStatus.DONE
    assert np.array_equal(setting.target.rows[32:], setting.source.rows[1::2])
    setting.wait_for_engines(num_parked=1)
    setting.fake.behaviour = Behaviour()
    assert setting.pull(range(64), range(64)).status is PullStatus.DONE  # over a new engine
    assert len(setting.fake.engines) == 2


def test_a_failed_read_that_goes_on_writing_spoils_no_other_pull() -> None:
    setting = Setting(num_pages=1024)
    both_wait = threading.Event()
    setting.fake.behaviour = Behaviour(
        max_polls=2, fails=lambda number: number == 1, keeps_writing=True, blocked=both_wait
    )
    first = setting.begin([0], [0])  # read 0 is the probe
    second = setting.begin(range(1, 1024), range(1, 1024))  # twice as much as the ring
    both_wait.set()
    outcomes = {ended.ticket: ended.status for ended in (setting.end(), setting.end())}
    assert outcomes == {first: PullStatus.FAILED, second: PullStatus.DONE}
    assert len(setting.fake.engines) == 1
    setting.close()


def test_the_slot_of_a_failed_read_is_not_used_again() -> None:
    ring = LandingRing(num_slots=2, slot_bytes=4096)
    first, second = ring.take(), ring.take()
    assert ring.take() is None
    assert first is not None
    assert second is not None
    ring.give_back(second)
    assert ring.take() == second


def test_a_cancelled_pull_ends_at_once_and_its_late_reads_hit_nothing(setting: Setting) -> None:
    setting.fake.behaviour.max_polls = 1
    assert setting.pull([0], [0]).status is PullStatus.DONE
    setting.target.rows[:] = 0xA5
    setting.cancel_amid_frozen_reads(64)
    setting.fake.behaviour.is_frozen = False  # now they come
    time.sleep(0.05)
    assert (setting.target.rows == 0xA5).all()
    assert setting.pull(range(64), range(64)).status is PullStatus.DONE  # the slots came back
    assert len(setting.fake.engines) == 1


def test_a_cancel_disturbs_no_sibling(setting: Setting) -> None:
    setting.fake.behaviour.max_polls = 100
    first = setting.begin(range(32), range(32))
    second = setting.begin(range(32, 64), range(32, 64))
    setting.wait_for_reads()
    setting.importer.cancel(first)
    outcomes = {ended.ticket: ended.status for ended in (setting.end(), setting.end())}
    assert outcomes[second] is PullStatus.DONE
    assert outcomes[first] in (PullStatus.CANCELLED, PullStatus.DONE)
    assert len(setting.fake.engines) == 1


def test_a_pull_without_progress_is_broken_off_and_the_engine_replaced(hasty: Setting) -> None:
    assert hasty.pull([0], [0]).status is PullStatus.DONE
    hasty.fake.behaviour.is_frozen = True
    start = time.monotonic()
    for number in range(4):
        hasty.begin(range(16), range(number * 16, number * 16 + 16))
    for _ in range(4):
        ended = hasty.end()
        assert (ended.status, "progress" in ended.message) == (PullStatus.FAILED, True)
    assert time.monotonic() - start > HASTY.progress_seconds * 0.9
    hasty.wait_for_engines(num_parked=1)
    hasty.fake.behaviour.is_frozen = False
    assert hasty.pull(range(64), range(64)).status is PullStatus.DONE
    assert len(hasty.fake.engines) == 2


def test_an_engine_that_blocks_holds_nobody_for_long(hasty: Setting) -> None:
    assert hasty.pull([0], [0]).status is PullStatus.DONE
    hasty.fake.behaviour.blocked = threading.Event()
    assert hasty.pull(range(8), range(8)).status is PullStatus.FAILED
    hasty.fake.behaviour.blocked.set()
    hasty.fake.behaviour.blocked = None
    assert hasty.pull(range(8), range(8)).status is PullStatus.DONE


def test_an_engine_that_takes_nothing_fails_the_pull(setting: Setting) -> None:
    assert setting.pull([0], [0]).status is PullStatus.DONE
    setting.fake.behaviour.refuses = True
    assert setting.pull(range(8), range(8)).status is PullStatus.FAILED
    setting.wait_for_engines(num_parked=1)


def test_another_process_behind_the_session_is_noticed(setting: Setting) -> None:
    setting.probe.rows[0, 77] ^= 1
    ended = setting.pull([0], [0])
    assert (ended.status, "probe" in ended.message) == (PullStatus.FAILED, True)


def test_a_dead_control_port_keeps_the_session_from_the_engine(setting: Setting) -> None:
    setting.control.close()
    assert setting.pull([0], [0]).status is PullStatus.FAILED
    assert setting.fake.engines == []


@pytest.mark.parametrize(
    "address", ["", "a/b/c", "s/zz/1/c", "s/0/1/c", "s/-1/1/c", "s/1/ffffffffffffffffff/c", "a/1/1/b/c"]
)
def test_an_address_that_is_none_fails_the_pull(setting: Setting, address: str) -> None:
    assert setting.pull([0], [0], endpoint=replace(setting.endpoint, address=address)).status is PullStatus.FAILED


def test_missing_page_numbers_fail_the_pull(setting: Setting) -> None:
    assert setting.pull([0], [0], remote_pages=b"").status is PullStatus.FAILED
    assert setting.pull([0], [0], remote_pages=bytes(3)).status is PullStatus.FAILED


def test_an_idle_engine_is_used_again() -> None:
    """Destroying one would stop the whole process for a second."""
    setting = Setting(settings=replace(PATIENT, idle_seconds=0.5))
    assert setting.pull([0], [0]).status is PullStatus.DONE
    setting.wait_for_engines(num_spare=1)
    assert setting.pull([0], [0]).status is PullStatus.DONE
    assert len(setting.fake.engines) == 1
    assert not setting.fake.engines[0].is_closed
    setting.close()


def test_an_engine_with_reads_that_never_end_is_parked(hasty: Setting) -> None:
    hasty.fake.behaviour.max_polls = 1
    assert hasty.pull([0], [0]).status is PullStatus.DONE
    hasty.cancel_amid_frozen_reads(8)
    hasty.wait_for_engines(num_parked=1)


def test_parked_engines_are_bounded() -> None:
    fake = FakeEngines()
    engines = EnginePool(fake.new_engine)
    for _ in range(MAX_PARKED + 3):
        engines.give_back(engines.take(), has_failed=True)
    assert engines.num_parked == MAX_PARKED
    assert [engine.is_closed for engine in fake.engines] == [True] * 3 + [False] * MAX_PARKED
    engines.close()
    assert all(engine.is_closed for engine in fake.engines)


@pytest.mark.parametrize("seed", range(8))
def test_random_schedules_leave_every_page_to_its_owner(seed: int) -> None:
    setting = Setting(num_pages=48, page_bytes=32 << 10)
    chooser = random.Random(seed)
    setting.fake.behaviour = Behaviour(seed=seed, max_polls=15, fails=lambda number: number % 97 == 96)
    setting.target.rows[:] = 0xA5
    free = set(range(48))
    running: dict[int, tuple[list[int], list[int]]] = {}
    num_done = 0

    def settle(ended: PullEnded) -> None:
        nonlocal num_done
        sources, targets = running.pop(ended.ticket)
        for ordinal in ended.good_ordinals:
            assert np.array_equal(setting.target.rows[targets[ordinal]], setting.source.rows[sources[ordinal]])
        num_done += ended.status is PullStatus.DONE
        setting.target.rows[targets] = 0xA5
        free.update(targets)

    for _ in range(120):
        count = chooser.randint(1, 12)
        while len(free) < count:
            settle(setting.end())
        sources, targets = chooser.sample(range(48), count), chooser.sample(sorted(free), count)
        free.difference_update(targets)
        running[setting.begin(sources, targets)] = (sources, targets)
        if chooser.random() < 0.3:
            setting.importer.cancel(chooser.choice(list(running)))
        setting.fake.write_late()
        assert (setting.target.rows[sorted(free)] == 0xA5).all()
    while running:
        settle(setting.end())
    setting.fake.write_late()
    assert (setting.target.rows == 0xA5).all()
    assert num_done > 40
    setting.close()
    assert setting.engines.num_spare + setting.engines.num_parked == len(setting.fake.engines)


def test_no_read_crosses_a_registration() -> None:
    runs = np.array([[1000, 50], [1090, 25], [1200, 250]], dtype=np.uint64)
    pieces = cut_at_arenas(runs, base=1000, arena=100)
    assert pieces == [(1000, 50), (1090, 10), (1100, 15), (1200, 100), (1300, 100), (1400, 50)]


def test_the_ring_is_bounded() -> None:
    assert NUM_SLOTS * SLOT_BYTES <= 256 << 20


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (Slab(1024, 512, 2048, 32), Slab(1024, 512, 2048, 32)),
        (Slab(1024, 512, 2048, 32), Slab(0, 16 << 10, 16 << 10, 1)),
        (Slab(8 << 10, 16 << 10, 16 << 10, 1), Slab(0, 512, 1024, 32)),
        (Slab(3, 100, 300, 200), Slab(7, 200, 300, 100)),
    ],
)
def test_a_piece_is_picked_out_of_what_was_read(source: Slab, target: Slab) -> None:
    """One read a page, its bytes split anywhere between slots; what lies between the runs goes nowhere."""
    setting = Setting(num_pages=200)
    sources, targets = [*range(0, 200, 2), 1], list(range(99, 200))
    setting.target.rows[:] = 0
    expected = Pages.of(setting.source, sources, source)
    ended = setting.pull(
        sources,
        targets,
        checksums=hashing.pack(hashing.hashes(expected)),
        slab=target,
        source=Source(64 << 10, source),
    )
    assert ended.status is PullStatus.DONE, ended
    assert np.array_equal(hashing.hashes(Pages.of(setting.target, targets, target)), hashing.hashes(expected))
    assert np.count_nonzero(setting.target.rows) <= len(targets) * target.num_bytes
    assert not setting.target.rows[:99].any()
