"""A response laid out in memory before it begins: between two frames the caches are cold, and Python is slow there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tandem.transfer import wire
from tandem.transfer.iovec import Iovecs, Runs, of_buffer
from tandem.transfer.pages import Pages
from tandem.transfer.wire import Frame, Status


@dataclass(frozen=True, slots=True)
class Step:
    """One call of the kernel, if it goes well: `size` bytes of memory."""

    vectors: Iovecs
    size: int
    end: int  # of the stream's bytes, once it is done


@dataclass(frozen=True, slots=True, eq=False)
class FramePlan:
    """`heads[k]` is the header of frame k. Keep the plan while its steps are in use: they point into it."""

    heads: npt.NDArray[np.uint8]
    steps: list[Step]

    @classmethod
    def sending(cls, sequence: int, pages: Pages) -> FramePlan:
        """A step sends a header and its body."""
        runs, spans = Runs.of(pages), _spans(pages)
        encoded = b"".join(Frame(sequence, Status.OK, end - begin, begin).encode() for begin, end in spans)
        heads = np.frombuffer(encoded, dtype=np.uint8).reshape(len(spans), wire.FRAME_BYTES)
        steps = [
            Step(np.concatenate((of_buffer(head), runs.iovecs(begin, end))), wire.FRAME_BYTES + end - begin, end)
            for head, (begin, end) in zip(heads, spans, strict=True)
        ]
        return cls(heads, steps)

    @classmethod
    def receiving(cls, pages: Pages) -> FramePlan:
        """The first header comes alone; a step takes a body and the header behind it."""
        runs, spans = Runs.of(pages), _spans(pages)
        heads = np.zeros((len(spans), wire.FRAME_BYTES), dtype=np.uint8)
        steps = [
            Step(np.concatenate((runs.iovecs(begin, end), of_buffer(head))), end - begin + wire.FRAME_BYTES, end)
            for head, (begin, end) in zip(heads[1:], spans[:-1], strict=True)
        ]
        begin, end = spans[-1]
        return cls(heads, [*steps, Step(runs.iovecs(begin, end), end - begin, end)])


def _spans(pages: Pages) -> list[tuple[int, int]]:
    """Return the stream bytes [begin, end) of each frame: both ends cut alike."""
    total, step = pages.num_bytes, wire.MAX_FRAME_BYTES
    return [(begin, min(begin + step, total)) for begin in range(0, total, step)]
