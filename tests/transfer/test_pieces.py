"""Parts of pages: where they lie, and what every transport promises of them."""

from __future__ import annotations

import itertools
import os
import random

import numpy as np
import numpy.typing as npt
import pytest

from tandem.core.messages.transfer import PullStatus, Slab, Source
from tandem.core.sharding import KvPart
from tandem.transfer import hashing
from tandem.transfer.iovec import Runs
from tandem.transfer.layout import KvLayout
from tandem.transfer.pages import Pages, PageSpace
from tandem.transfer.self_test import scratch
from tests.fakes.transport_loopback import LOOPBACK
from tests.transfer.conftest import ALL_TRANSPORTS
from tests.transfer.peer import TCP_TLS, Peer

Pair = tuple[Peer, Peer]
PAGE = 32 << 10  # of the peers
EVERY_SECOND = Slab(offset=1024, run_bytes=1024, stride=2048, num_runs=16)
FIRST_OF_FOUR = Slab(offset=0, run_bytes=512, stride=2048, num_runs=16)
TAIL = Slab(offset=PAGE - 4096, run_bytes=4096, stride=4096, num_runs=1)
SCATTERED = Slab(offset=8, run_bytes=4, stride=12, num_runs=1024)

every = pytest.mark.parametrize("pair", ALL_TRANSPORTS, indirect=True)
guarded = pytest.mark.parametrize("pair", [LOOPBACK, "tcp", TCP_TLS], indirect=True)


def bytes_of(row: npt.NDArray[np.uint8], slab: Slab) -> bytes:
    begins = [slab.offset + number * slab.stride for number in range(slab.num_runs)]
    return b"".join(row[begin : begin + slab.run_bytes].tobytes() for begin in begins)


def untouched(before: npt.NDArray[np.uint8], after: npt.NDArray[np.uint8], slab: Slab) -> bool:
    is_outside = np.ones(len(before), dtype=bool)
    for number in range(slab.num_runs):
        begin = slab.offset + number * slab.stride
        is_outside[begin : begin + slab.run_bytes] = False
    return np.array_equal(before[is_outside], after[is_outside])


# ---- where a part lies -----------------------------------------------------------------------------------------------


def test_a_slab_is_the_part_of_the_page() -> None:
    """Against numpy's own slicing, for every part of a small layout."""
    layout = KvLayout(num_pages=1, num_layers=3, num_kv_heads=4, page_tokens=2, head_dim=3, dtype="float16")
    page = np.arange(layout.page_bytes // 2, dtype=np.uint16).reshape(layout.page_shape)
    row = page.view(np.uint8).reshape(-1)
    for first, last in itertools.combinations(range(4), 2):
        for head, end in itertools.combinations(range(5), 2):
            slab = layout.slab(KvPart(first, last - first, head, end - head))
            assert bytes_of(row, slab) == page[first:last, :, head:end].tobytes()
            assert (slab.num_runs == 1) == (end - head == 4), "all heads of a run of layers are one run of bytes"
            assert slab.end <= layout.page_bytes


@pytest.mark.parametrize("seed", range(20))
def test_a_stream_of_parts_is_cut_at_any_byte(seed: int) -> None:
    chooser = random.Random(seed)
    space = scratch(12, 600)
    space.rows[:] = np.random.default_rng(seed).integers(0, 256, space.rows.shape, dtype=np.uint8)
    run_bytes, num_runs = chooser.choice([1, 7, 40]), chooser.randint(1, 8)
    stride = run_bytes + chooser.choice([0, 3, 20])
    slab = Slab(chooser.randint(0, 600 - num_runs * stride), run_bytes, stride, num_runs)
    numbers = chooser.sample(range(12), chooser.randint(1, 12))
    pages = Pages.of(space, numbers, slab)
    stream = b"".join(bytes_of(space.rows[number], slab) for number in numbers)
    assert pages.num_bytes == len(stream)
    begin = chooser.randrange(len(stream))
    end = chooser.randint(begin + 1, len(stream))
    base, whole = space.address, space.rows.tobytes()
    found = b"".join(
        whole[address - base : address - base + length]
        for address, length in Runs.of(pages).iovecs(begin, end).tolist()
    )
    assert found == stream[begin:end]
    one_by_one = [hashing.hashes(Pages.of(space, [number], slab))[0] for number in numbers]
    assert hashing.hashes(pages).tolist() == one_by_one


@pytest.mark.parametrize(
    "slab",
    [
        Slab(0, 4097, 4097, 1),
        Slab(4000, 97, 97, 1),
        Slab(-1, 8, 8, 1),
        Slab(0, 0, 8, 1),
        Slab(0, 8, 8, 0),
        Slab(0, 8, 7, 2),
        Slab(0, 8, -8, 2),
        Slab(0, 1024, 1025, 4),
    ],
)
def test_what_is_not_inside_a_page_is_refused(slab: Slab) -> None:
    with pytest.raises(ValueError, match="Slab"):
        Pages.of(scratch(2, 4096), [0], slab)


# ---- every transport -------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize(
    ("source", "target"),
    [(EVERY_SECOND, EVERY_SECOND), (FIRST_OF_FOUR, Slab(0, 8192, 8192, 1)), (TAIL, SCATTERED), (SCATTERED, TAIL)],
)
def test_a_piece_goes_where_it_belongs_and_nowhere_else(pair: Pair, source: Slab, target: Slab) -> None:
    exporter, importer = pair
    pages, targets = [7, 3, 4, 60], [5, 9, 1, 30]
    shared = exporter.export(os.urandom(16), pages, pieces=(TAIL if source != TAIL else EVERY_SECOND, source))
    checksums = shared.checksums[8 * len(pages) :]
    space = PageSpace(exporter.memory.view, PAGE)
    assert checksums == hashing.pack(hashing.hashes(Pages.of(space, pages, source)))
    before = importer.rows.copy()
    changes = {"piece": 1, "slab": target, "source": Source(PAGE, source)}
    ended = importer.pull(shared, targets, checksums=checksums, **changes)
    assert (ended.status, ended.good_ordinals) == (PullStatus.DONE, (0, 1, 2, 3)), ended
    assert ended.num_bytes == 4 * source.num_bytes
    for page, into in zip(pages, targets, strict=True):
        assert bytes_of(importer.rows[into], target) == bytes_of(exporter.rows[page], source)
        assert untouched(before[into], importer.rows[into], target)
    others = np.setdiff1d(np.arange(64), targets)
    assert np.array_equal(importer.rows[others], before[others])


@every
def test_a_bit_counts_in_the_piece_that_it_is_of(pair: Pair) -> None:
    exporter, importer = pair
    shared = exporter.export(os.urandom(16), range(5), pieces=(EVERY_SECOND, FIRST_OF_FOUR))
    exporter.rows[2, 2048 + 100] ^= 1  # the second run of FIRST_OF_FOUR
    first = importer.pull(
        shared, range(5), checksums=shared.checksums[:40], slab=EVERY_SECOND, source=Source(PAGE, EVERY_SECOND)
    )
    changes = {"piece": 1, "slab": FIRST_OF_FOUR, "source": Source(PAGE, FIRST_OF_FOUR)}
    second = importer.pull(shared, range(5), checksums=shared.checksums[40:], **changes)
    exporter.rows[2, 2048 + 100] ^= 1
    assert (first.status, second.status, second.bad_ordinals) == (PullStatus.DONE, PullStatus.MISMATCH, (2,))
    again = importer.pull(shared, range(5), checksums=shared.checksums[40:], **changes)
    assert again.status is PullStatus.DONE


@guarded
@pytest.mark.parametrize("piece", [1, 2, 255])
def test_a_piece_that_there_is_not_is_refused(pair: Pair, piece: int) -> None:
    exporter, importer = pair
    shared = exporter.export(os.urandom(16), range(3), pieces=(TAIL,))
    ended = importer.pull(shared, range(3), piece=piece, slab=TAIL)
    assert ended.status is PullStatus.REFUSED, ended
    assert importer.pull(shared, range(3), slab=TAIL, source=Source(PAGE, TAIL)).status is PullStatus.DONE


@every
def test_pieces_of_a_large_pull_share_the_connections(pair: Pair) -> None:
    """More runs than one call of the kernel takes, and more bytes than one frame or landing slot has."""
    exporter, importer = pair
    source = Slab(0, 16 << 10, 32 << 10, 1)
    many = Slab(0, 16, 32, 1024)
    for slab in (source, many):
        sources, targets = list(range(64)), list(reversed(range(64)))
        shared = exporter.export(os.urandom(16), sources, pieces=(slab,))
        ended = importer.pull(shared, targets, slab=slab, source=Source(PAGE, slab))
        assert ended.status is PullStatus.DONE, ended
        for page, into in zip(sources, targets, strict=True):
            assert bytes_of(importer.rows[into], slab) == bytes_of(exporter.rows[page], slab)
        exporter.revoke(shared.handoff_id)


@pytest.mark.parametrize("pair", ["tcp"], indirect=True)
def test_a_piece_number_that_no_request_can_carry_fails(pair: Pair) -> None:
    exporter, importer = pair
    shared = exporter.export(os.urandom(16), range(3))
    assert importer.pull(shared, range(3), piece=256).status is PullStatus.FAILED
    assert importer.pull(shared, range(3)).status is PullStatus.DONE
