"""Pulls a pattern from this process's own exporter into scratch memory, through the path that peers will use.

A decode worker must not become unready because prefill workers are missing: so nobody else takes part.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from tandem.core.messages.handoff import RankEndpoint
from tandem.core.messages.transfer import PullEnded, PullStatus, RankPull
from tandem.errors import TransportError
from tandem.transfer import hashing
from tandem.transfer.contract import Importer
from tandem.transfer.one_sided import PROBE_BYTES, OneSidedAddress, probe_pattern
from tandem.transfer.pages import Pages, PageSpace
from tandem.transfer.tcp_exporter import TcpExporter
from tandem.transfer.tcp_importer import TcpImporter
from tandem.transfer.tcp_stream import TcpSettings

_NUM_PAGES = 3


def scratch(num_pages: int, page_bytes: int) -> PageSpace:
    """Return zeroed memory that goes with its last reference."""
    return PageSpace(memoryview(mmap.mmap(-1, num_pages * page_bytes)), page_bytes)


def check_tcp(exporter: TcpExporter, page_bytes: int, settings: TcpSettings) -> None:
    """Raise TransportError unless pages travel from the exporter into scratch memory."""
    source, target = scratch(_NUM_PAGES, page_bytes), scratch(_NUM_PAGES, page_bytes)
    source.rows[:] = np.frombuffer(os.urandom(page_bytes), dtype=np.uint8)
    source.rows[:, 0] = np.arange(_NUM_PAGES)
    pages = Pages.of(source, range(_NUM_PAGES))
    handoff_id, token = os.urandom(16), os.urandom(16)
    exporter.open(handoff_id, 1, token, (source.whole,))
    exporter.add(handoff_id, 1, 0, pages)
    importer = TcpImporter(target, settings)
    try:
        pull = RankPull(
            ticket=0,
            endpoint=exporter.endpoint,
            handoff_id=handoff_id,
            attempt=1,
            token=token,
            ordinals=tuple(range(_NUM_PAGES)),
            checksums=hashing.pack(hashing.hashes(pages)),
            remote_pages=b"",
            pages=tuple(range(_NUM_PAGES)),
        )
        _pull(importer, pull, settings)
    finally:
        importer.close()
        exporter.revoke(handoff_id, lambda: None)
    if not np.array_equal(source.rows, target.rows):
        raise TransportError("the pattern arrived changed")


def check_one_sided(
    new_importer: Callable[[PageSpace], Importer], endpoint: RankEndpoint, settings: TcpSettings
) -> None:
    """Raise TransportError unless the exporter's probe region can be read into scratch memory."""
    target = scratch(1, PROBE_BYTES)
    pattern = PageSpace(memoryview(probe_pattern(endpoint.instance_id)), PROBE_BYTES)
    address = OneSidedAddress.decode(endpoint.address)
    importer = new_importer(target)
    try:
        pull = RankPull(
            ticket=0,
            endpoint=replace(endpoint, address=replace(address, pool=address.probe).encode()),
            handoff_id=b"",
            attempt=1,
            token=b"",
            ordinals=(0,),
            checksums=hashing.pack(hashing.hashes(Pages.of(pattern, [0]))),
            remote_pages=bytes(4),
            pages=(0,),
        )
        _pull(importer, pull, settings)
    finally:
        importer.close()


def _pull(importer: Importer, pull: RankPull, settings: TcpSettings) -> None:
    outcomes: list[PullEnded] = []
    has_ended = threading.Event()

    def done(ended: PullEnded) -> None:
        outcomes.append(ended)
        has_ended.set()

    importer.pull(pull, done)
    if not has_ended.wait(2 * (settings.connect_seconds + settings.progress_seconds)):
        raise TransportError("the self-test did not end")
    if outcomes[0].status is not PullStatus.DONE:
        raise TransportError(f"the self-test ended {outcomes[0].status.value}: {outcomes[0].message}")
