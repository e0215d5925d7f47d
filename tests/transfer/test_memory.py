"""The memory of a pool: one contract for every kind of pages, and what happens where there are too few huge ones."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tandem.errors import ConfigError
from tandem.transfer.huge_pages import (
    HUGE_PAGE_BYTES,
    advice_is_heeded,
    free_huge_pages,
    pages_needed,
    shmem_choice,
)
from tandem.transfer.memory import PoolMemory, common_pages, describe_pages, reserve_pool
from tandem.transfer.pages import PageSpace
from tests.mappings import mapping_at

SIZE = 3 * HUGE_PAGE_BYTES + 4096  # 4 huge pages
RESERVED = "sys/kernel/mm/hugepages/hugepages-2048kB"
TRANSPARENT = "sys/kernel/mm/transparent_hugepage"


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Huge pages are the machine's, and counted: in a run on several cores these tests come one after the other."""
    with open(Path(tempfile.gettempdir(), f"tandem-huge-pages-{os.getuid()}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def huge(size_bytes: int) -> PoolMemory:
    free = free_huge_pages()
    if free < pages_needed(size_bytes):
        pytest.skip(f"{pages_needed(size_bytes)} reserved huge pages are needed, {free} are free (vm.nr_hugepages)")
    return PoolMemory.create_huge(size_bytes)


def advised(size_bytes: int) -> PoolMemory:
    return PoolMemory(_shared(size_bytes), size_bytes, "advised")


def ordinary(size_bytes: int) -> PoolMemory:
    return PoolMemory.create(size_bytes, advise=False)


def _shared(size_bytes: int) -> int:
    fd = os.memfd_create("pool")
    os.ftruncate(fd, size_bytes)
    return fd


MAKERS = [ordinary, advised, huge]
Maker = Callable[[int], PoolMemory]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("size_bytes", [4096, HUGE_PAGE_BYTES, SIZE])
def test_a_pool_is_as_large_as_asked_for_and_zero(make: Maker, size_bytes: int) -> None:
    memory = make(size_bytes)
    assert (memory.size_bytes, len(memory.view)) == (size_bytes, size_bytes)
    assert memory.view.nbytes == size_bytes and not memory.view.readonly
    assert not np.frombuffer(memory.view, dtype=np.uint8).any()
    memory.close()


@pytest.mark.parametrize("make", MAKERS)
def test_another_mapping_shows_the_same_bytes_and_ends_where_the_pool_ends(make: Maker) -> None:
    """A transfer process must not have one page more than the pool: peers name pages by their numbers."""
    memory = make(SIZE)
    other = PoolMemory.attach(os.dup(memory.fd), memory.size_bytes, memory.pages)
    own, theirs = (PageSpace(each.view, 4096) for each in (memory, other))
    assert own.num_pages == theirs.num_pages == SIZE // 4096
    own.rows[-1] = 7
    assert (theirs.rows[-1] == 7).all()
    theirs.rows[0] = 9
    assert (own.rows[0] == 9).all()
    for each in (memory, other):
        each.close()
    assert (theirs.rows[-1] == 7).all(), "the mapping outlives the descriptor"


@pytest.mark.parametrize("make", MAKERS)
def test_a_child_maps_it_by_its_descriptor(make: Maker) -> None:
    memory = make(SIZE)
    assert not os.get_inheritable(memory.fd) or make is advised, "the test's own descriptor is not close-on-exec"
    memory.view[-3:] = b"end"
    code = (
        "import sys; from tandem.transfer.memory import PoolMemory\n"
        "memory = PoolMemory.attach(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])\n"
        "assert bytes(memory.view[-3:]) == b'end'; memory.view[:3] = b'new'"
    )
    command = [sys.executable, "-c", code, str(memory.fd), str(memory.size_bytes), memory.pages]
    subprocess.run(command, check=True, pass_fds=(memory.fd,))
    assert bytes(memory.view[:3]) == b"new"
    memory.close()


@pytest.mark.skipif(not Path("/", TRANSPARENT).is_dir(), reason="this kernel has no transparent huge pages")
@pytest.mark.parametrize(("make", "asked"), [(ordinary, False), (advised, True)])
def test_rank_and_transfer_process_ask_alike(make: Maker, asked: bool) -> None:
    """Whoever touches a page first decides what it is."""
    memory = make(SIZE)
    other = PoolMemory.attach(os.dup(memory.fd), memory.size_bytes, memory.pages)
    for each in (memory, other):
        assert ("hg" in _smaps(each.view)["VmFlags:"].split()) == asked
        each.close()


def test_a_file_that_is_too_short_is_refused() -> None:
    fd = _shared(4096)
    with pytest.raises(ValueError, match="a pool of 4097 bytes in a file of 4096"):
        PoolMemory.attach(fd, 4097, "ordinary")
    os.close(fd)


def test_huge_pages_are_taken_at_once_and_given_back() -> None:
    before = free_huge_pages()
    memory = huge(SIZE)
    assert (memory.pages, os.fstat(memory.fd).st_size) == ("huge", 4 * HUGE_PAGE_BYTES)
    assert free_huge_pages() == before - 4
    view = memory.view
    assert _smaps(view)["KernelPageSize:"] == "2048 kB"
    assert free_huge_pages() == before - 4, "looking at them takes no more"
    memory.close()
    del view, memory
    assert free_huge_pages() == before


def test_more_huge_pages_than_there_are_is_an_error_not_a_signal() -> None:
    """As where a container's limit is lower than what the machine has free: the kernel refuses, nothing is kept."""
    before = free_huge_pages()
    if before > 64:
        pytest.skip(f"{before} huge pages are free: others would miss them while this takes all")
    with pytest.raises(OSError, match=r"No space|Cannot allocate|Invalid argument|not implemented|No such device"):
        PoolMemory.create_huge((before + 1) * HUGE_PAGE_BYTES)
    assert free_huge_pages() == before


def _smaps(view: memoryview) -> dict[str, str]:
    """What the kernel says of the mapping that a view is of."""
    return mapping_at(int(np.frombuffer(view, dtype=np.uint8).ctypes.data))


# ---- what is chosen ------------------------------------------------------------------------------------------------


def refuse(size_bytes: int) -> PoolMemory:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def stand_in(size_bytes: int) -> PoolMemory:
    """The type of pages that it says, without the machine's help."""
    return PoolMemory(_shared(4 * HUGE_PAGE_BYTES), size_bytes, "huge")


def never(size_bytes: int) -> PoolMemory:
    raise AssertionError("there are too few, or none are wanted")


@pytest.mark.parametrize("wish", ["auto", "require"])
def test_enough_huge_pages_are_used(wish: str) -> None:
    memory = reserve_pool(SIZE, wish, free_pages=lambda: 4, create_huge=stand_in)  # type: ignore[arg-type]
    assert (memory.pages, len(memory.view)) == ("huge", SIZE)
    memory.close()


@pytest.mark.parametrize(
    ("free", "create", "said"),
    [
        (0, never, []),
        (3, never, ["the KV pool needs 4 huge pages of 2 MB, 3 are free: it gets ordinary ones"]),
        (
            4,
            refuse,
            [
                "the KV pool needs 4 huge pages of 2 MB, 4 are free, but the kernel refuses them (No space left on "
                "device; is this container's limit lower?): it gets ordinary ones"
            ],
        ),
    ],
)
def test_too_few_are_ordinary_pages_and_a_word_about_it(free: int, create: Maker, said: list[str]) -> None:
    heard: list[str] = []
    memory = reserve_pool(SIZE, "auto", heard.append, free_pages=lambda: free, create_huge=create)
    assert memory.pages == ("advised" if advice_is_heeded() else "ordinary")
    assert heard == said
    memory.view[-1] = 1
    memory.close()


@pytest.mark.parametrize(
    ("free", "create", "why"),
    [
        (3, never, "needs 4 huge pages of 2 MB, 3 are free. Reserve them"),
        (4, refuse, "is this container's limit lower?"),
    ],
)
def test_required_ones_that_are_missing_are_refused_with_advice(free: int, create: Maker, why: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        reserve_pool(SIZE, "require", free_pages=lambda: free, create_huge=create)
    for words in ("cache.huge_pages: ", why, "sysctl vm.nr_hugepages", "limits.hugepages-2Mi", "shmem_enabled"):
        assert words in refusal.value.message


def test_off_takes_none_and_asks_for_none() -> None:
    memory = reserve_pool(SIZE, "off", free_pages=lambda: 99, create_huge=never)
    assert memory.pages == "ordinary"
    memory.close()


def test_words() -> None:
    size = mmap.PAGESIZE >> 10
    assert [describe_pages(pages) for pages in ("huge", "advised", "ordinary")] == [
        "huge pages of 2 MB",
        f"pages of {size} KB, huge ones advised",
        f"pages of {size} KB",
    ]
    assert common_pages(["huge", "huge"]) == "huge"
    assert common_pages(["huge", "advised"]) == "mixed"


# ---- what the machine has -----------------------------------------------------------------------------------------


def lay_out(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("free", "promised", "overcommit", "surplus", "expected"),
    [(10, 0, 0, 0, 10), (10, 4, 0, 0, 6), (0, 0, 8, 3, 5), (2, 3, 0, 1, 0)],
)
def test_free_huge_pages(
    tmp_path: Path, free: int, promised: int, overcommit: int, surplus: int, expected: int
) -> None:
    names = ("free_hugepages", "resv_hugepages", "nr_overcommit_hugepages", "surplus_hugepages")
    values = (free, promised, overcommit, surplus)
    lay_out(tmp_path, {f"{RESERVED}/{name}": f"{value}\n" for name, value in zip(names, values, strict=True)})
    assert free_huge_pages(tmp_path) == expected


@pytest.mark.parametrize(
    ("general", "own", "expected", "heeded"),
    [
        ("always within_size advise [never] deny force", None, "never", False),
        ("always within_size [advise] never deny force", None, "advise", True),
        ("[always] within_size advise never deny force", "always [inherit] advise never", "always", True),
        ("always within_size advise [never] deny force", "always inherit [advise] never", "advise", True),
        ("always within_size [advise] never deny force", "always inherit advise [never]", "never", False),
        ("always within_size advise never [deny] force", "[always] inherit advise never", "deny", False),
        ("always within_size advise never deny [force]", "always inherit advise [never]", "force", True),
    ],
)
def test_transparent_ones(tmp_path: Path, general: str, own: str | None, expected: str, heeded: bool) -> None:
    files = {f"{TRANSPARENT}/shmem_enabled": f"{general}\n"}
    if own is not None:
        files[f"{TRANSPARENT}/hugepages-2048kB/shmem_enabled"] = f"{own}\n"
    lay_out(tmp_path, files)
    assert (shmem_choice(tmp_path), advice_is_heeded(tmp_path)) == (expected, heeded)


def test_a_kernel_without_any(tmp_path: Path) -> None:
    assert (free_huge_pages(tmp_path), shmem_choice(tmp_path), advice_is_heeded(tmp_path)) == (0, "", False)
