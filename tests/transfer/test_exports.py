"""The order of things on the exporting side: what a revocation waits for, and what it takes back."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from tandem.core.messages.handoff import RankEndpoint
from tandem.core.messages.transfer import Exported, RankExport, Revoke, Revoked, Slab
from tandem.transfer import hashing
from tandem.transfer.export_queue import ExportQueue
from tandem.transfer.grants import Grant, GrantTable
from tandem.transfer.pages import Pages
from tandem.transfer.self_test import scratch
from tandem.transfer.tcp_stream import Stream

SPACE = scratch(8, 4096)
WHOLE = (SPACE.whole,)
ONE, TWO = np.array([0]), np.array([0, 1])


@pytest.fixture
def stream() -> Iterator[Stream]:
    near, far = _tcp_pair()
    stream = Stream(near, 1.0)
    yield stream
    stream.close()
    far.close()


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        return near, listener.accept()[0]


def granted(table: GrantTable, attempt: int = 1) -> Grant:
    found = table.select(b"handoff", attempt, b"token", ONE)
    assert not isinstance(found, str)
    return found[0]


def table_with_pages() -> GrantTable:
    table = GrantTable()
    table.open(b"handoff", 1, b"token", WHOLE)
    table.add(b"handoff", 1, 0, Pages.of(SPACE, [3, 4]))
    return table


# ---- grants ------------------------------------------------------------------------------------------------------


def test_a_revocation_waits_for_every_frame_and_lets_no_new_one_begin(stream: Stream) -> None:
    table, done = table_with_pages(), threading.Event()
    grant = granted(table)
    assert table.begin(grant, stream)
    table.revoke(b"handoff", done.set)
    assert not done.is_set()
    assert stream.wait_readable(1.0)  # it was cut
    assert not table.begin(grant, stream)
    table.end(grant, stream)
    assert done.is_set()


def test_a_revocation_also_waits_for_a_frame_of_an_older_attempt(stream: Stream) -> None:
    table, done = table_with_pages(), threading.Event()
    old = granted(table)
    assert table.begin(old, stream)
    table.open(b"handoff", 2, b"token", WHOLE)
    assert not table.begin(old, stream)  # superseded in the middle of a response
    table.revoke(b"handoff", done.set)
    assert not done.is_set()
    table.end(old, stream)
    assert done.is_set()


def test_a_revocation_of_what_nobody_reads_is_done_at_once() -> None:
    table, done = table_with_pages(), threading.Event()
    table.revoke(b"handoff", done.set)
    assert done.is_set()


def test_a_frame_of_another_handoff_is_not_cut(stream: Stream) -> None:
    table, done = table_with_pages(), threading.Event()
    table.open(b"other", 1, b"token", WHOLE)
    assert table.begin(granted(table), stream)
    table.revoke(b"other", done.set)
    assert done.is_set()
    assert not stream.wait_readable(0.05)


def test_only_announced_ordinals_of_the_open_attempt_are_found() -> None:
    table = table_with_pages()
    table.add(b"handoff", 1, 5, Pages.of(SPACE, [6]))
    found = table.select(b"handoff", 1, b"token", np.array([5, 0]))
    assert not isinstance(found, str)
    assert found[1].numbers.tolist() == [6, 3]
    for ordinals in ([2], [4], [6], [0, 3], [-1], [2**31]):
        assert isinstance(table.select(b"handoff", 1, b"token", np.array(ordinals)), str)
    table.open(b"handoff", 2, b"newer", WHOLE)
    table.add(b"handoff", 1, 0, Pages.of(SPACE, [1]))  # late: of an attempt that is over
    assert isinstance(table.select(b"handoff", 2, b"newer", ONE), str)


# ---- the queue ---------------------------------------------------------------------------------------------------


class RecordingExporter:
    def __init__(self) -> None:
        self.endpoint = RankEndpoint(transport="none", address="", instance_id=bytes(16))
        self.calls: list[tuple[Any, ...]] = []

    def open(self, handoff_id: bytes, attempt: int, token: bytes, pieces: Sequence[Slab]) -> None:
        self.calls.append(("open", handoff_id, attempt))

    def add(self, handoff_id: bytes, attempt: int, first_ordinal: int, pages: Pages) -> None:
        self.calls.append(("add", handoff_id, attempt, first_ordinal))

    def revoke(self, handoff_id: bytes, done: Callable[[], None]) -> None:
        self.calls.append(("revoke", handoff_id))
        done()

    def close(self) -> None:
        pass


class Setting:
    """A queue whose hashing waits for `go`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.outcomes: queue.Queue[Any] = queue.Queue()
        self.is_hashing, self.go = threading.Event(), threading.Event()
        real = hashing.hashes

        def hashes(pages: Pages) -> Any:
            self.is_hashing.set()
            assert self.go.wait(10)
            return real(pages)

        monkeypatch.setattr(hashing, "hashes", hashes)
        self.exporter = RecordingExporter()
        self.queue = ExportQueue(SPACE, [self.exporter], self.outcomes.put)

    def next(self) -> Any:
        return self.outcomes.get(timeout=5)

    def is_quiet(self) -> bool:
        try:
            self.outcomes.get(timeout=0.05)
        except queue.Empty:
            return True
        return False


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Setting]:
    made = Setting(monkeypatch)
    yield made
    made.go.set()
    made.queue.close()


def test_exports_are_answered_in_order(setting: Setting) -> None:
    setting.go.set()
    for number in range(20):
        setting.queue.export(RankExport(b"handoff", 1, b"token", number, (number % 8,)))
    assert [setting.next().first_ordinal for _ in range(20)] == list(range(20))


def test_a_higher_attempt_takes_over_before_its_pages_are_hashed(setting: Setting) -> None:
    setting.queue.export(RankExport(b"handoff", 1, b"token", 0, (1,)))
    assert setting.is_hashing.wait(5)
    setting.queue.export(RankExport(b"handoff", 2, b"newer", 0, (1,)))
    assert ("open", b"handoff", 2) in setting.exporter.calls
    assert not [call for call in setting.exporter.calls if call[0] == "add"]


def test_revoked_comes_after_the_hash_that_reads_the_pages(setting: Setting) -> None:
    setting.queue.export(RankExport(b"handoff", 1, b"token", 0, (1,)))
    assert setting.is_hashing.wait(5)
    setting.queue.revoke(Revoke(b"handoff"))
    assert ("revoke", b"handoff") in setting.exporter.calls  # served no longer, at once
    assert setting.is_quiet()
    setting.go.set()
    assert setting.next() == Revoked(b"handoff")
    assert not [call for call in setting.exporter.calls if call[0] == "add"]
    assert setting.is_quiet()


def test_what_waits_for_its_hash_is_forgotten_when_revoked(setting: Setting) -> None:
    setting.queue.export(RankExport(b"first", 1, b"token", 0, (1,)))
    assert setting.is_hashing.wait(5)
    setting.queue.export(RankExport(b"second", 1, b"token", 0, (2,)))
    setting.queue.revoke(Revoke(b"second"))
    assert setting.next() == Revoked(b"second")  # does not wait for the first one's hash
    setting.go.set()
    outcome = setting.next()
    assert isinstance(outcome, Exported)
    assert outcome.handoff_id == b"first"
    assert setting.is_quiet()
    assert not [call for call in setting.exporter.calls if call[:2] == ("add", b"second")]
