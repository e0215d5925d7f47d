"""Pages as one stream of bytes: the numbers that the kernel is given."""

from __future__ import annotations

import ctypes
import random
import socket
import threading

import numpy as np
import pytest

from tandem.transfer import iovec
from tandem.transfer.iovec import MAX_IOVECS, Runs
from tandem.transfer.pages import Pages
from tandem.transfer.self_test import scratch


def gather(vectors: iovec.Iovecs) -> bytes:
    return b"".join(ctypes.string_at(int(address), int(length)) for address, length in vectors)


@pytest.mark.parametrize("seed", range(20))
def test_any_cut_of_the_stream_names_its_bytes(seed: int) -> None:
    chooser = random.Random(seed)
    page_bytes, num_pages = chooser.choice([1, 8, 100, 4096]), chooser.randint(1, 40)
    space = scratch(num_pages, page_bytes)
    space.rows[:] = np.random.default_rng(seed).integers(0, 256, space.rows.shape, dtype=np.uint8)
    numbers = [chooser.randrange(num_pages) for _ in range(chooser.randint(1, 60))]
    if chooser.random() < 0.5:
        numbers.sort()  # adjacent ones, and the same one twice
    runs, stream = Runs.of(Pages.of(space, numbers)), space.rows[numbers].tobytes()
    for _ in range(50):
        begin = chooser.randrange(len(stream))
        end = chooser.randint(begin + 1, len(stream))
        vectors = runs.iovecs(begin, end)
        assert gather(vectors) == stream[begin:end]
        done = chooser.randint(0, end - begin)
        assert gather(iovec.advance(vectors, done)) == stream[begin + done : end]


def test_adjacent_pages_are_one_run() -> None:
    space = scratch(10, 4096)
    assert len(Runs.of(Pages.of(space, [2, 3, 4, 7, 8, 1])).iovecs(0, 6 * 4096)) == 3


@pytest.mark.parametrize("numbers", [[-1], [4], [0, 1, 2**40]])
def test_a_page_that_is_none_is_an_error(numbers: list[int]) -> None:
    with pytest.raises(ValueError, match="outside"):
        Pages.of(scratch(4, 64), numbers)


def test_more_runs_than_the_kernel_takes_at_once() -> None:
    num_pages = MAX_IOVECS * 3
    source, target = scratch(num_pages, 8), scratch(num_pages, 8)
    source.rows[:] = np.random.default_rng(1).integers(0, 256, source.rows.shape, dtype=np.uint8)
    order = random.Random(1).sample(range(num_pages), num_pages)
    near, far = socket.socketpair()
    with near, far:

        def send() -> None:
            vectors = Runs.of(Pages.of(source, order)).iovecs(0, num_pages * 8)
            while len(vectors):
                vectors = iovec.advance(vectors, iovec.send(near, vectors))

        sender = threading.Thread(target=send)
        sender.start()
        vectors = Runs.of(Pages.of(target, order)).iovecs(0, num_pages * 8)
        while len(vectors):
            vectors = iovec.advance(vectors, iovec.receive(far, vectors))
        sender.join()
    assert np.array_equal(source.rows, target.rows)


def test_the_end_and_errors_are_exceptions() -> None:
    near, far = socket.socketpair()
    space = scratch(1, 64)
    vectors = Runs.of(Pages.of(space, [0])).iovecs(0, 64)
    far.close()
    with pytest.raises(ConnectionResetError):
        iovec.receive(near, vectors)
    with pytest.raises(BrokenPipeError):
        iovec.send(near, vectors)
    near.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        iovec.receive(near, vectors)
