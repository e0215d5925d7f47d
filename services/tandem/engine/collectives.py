"""What the ranks of a worker send each other: partial sums, logits and tokens of a stage, residuals between stages."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

import torch

from tandem.engine.place import RankPlace, cut
from tandem.engine.wire import Sending, Wire, find_store, gloo_group, nccl_group

_SENDS_MAX = 8  # residuals that may be on their way to the next stage
_TEXT_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where the ranks of a worker find each other: rank 0's store. `own_host` is where others reach this rank.

    `start_seconds` bound what ranks wait for each other while they start, `collective_seconds` while they compute.
    """

    host: str
    port: int
    own_host: str
    start_seconds: float
    collective_seconds: float


class TensorRanks:
    """The ranks that share the layers of one stage; see `contract.Reduction`. All call the same in the same order."""

    def __init__(self, wire: Wire, place: RankPlace, vocabulary: int) -> None:
        self._wire = wire
        self._rank = place.tensor_rank
        self._size = place.sharding.tensor_size
        self._widths = [len(cut(vocabulary, self._size, rank)) for rank in range(self._size)]
        self._parts = torch.empty(0)

    def add_to(self, residual: torch.Tensor, part: torch.Tensor) -> None:
        part = part.float().contiguous()
        needed = self._size * part.numel()
        if self._parts.numel() < needed or self._parts.device != part.device:
            self._parts = torch.empty(needed, device=part.device)
        parts = self._parts[:needed]
        self._wire.all_gather(parts, part.view(-1))
        total, *others = parts.view(self._size, *part.shape)
        for other in others:
            total += other
        residual += total

    def gather_logits(self, part: torch.Tensor) -> torch.Tensor | None:
        """[n, own vocabulary] float32 of each rank -> [n, vocabulary] on the first one, None on the others."""
        if self._rank:
            self._wire.send(part.contiguous(), 0)
            return None
        parts = [part]
        for rank in range(1, self._size):
            parts.append(part.new_empty(part.shape[0], self._widths[rank]))
            self._wire.receive(parts[-1], rank)
        return torch.cat(parts, dim=1)

    def share_tokens(self, tokens: torch.Tensor) -> None:
        """Give the first rank's [n] int64 to all, in place: one rank draws, so nobody can draw anything else."""
        self._wire.broadcast(tokens)


class Stages:
    """The neighbours of a pipeline stage that have this rank's tensor rank. Residuals travel as they are, float32."""

    def __init__(self, wire: Wire, place: RankPlace) -> None:
        self._wire = wire
        self._stage = place.pipeline_rank
        self._sent: deque[Sending] = deque()
        self.waited_seconds = 0.0  # for stages before this one, in all

    def receive(self, residual: torch.Tensor) -> None:
        """Fill [N, hidden] float32 with what the stage before has computed."""
        began = time.perf_counter()
        self._wire.receive(residual, self._stage - 1)
        self.waited_seconds += time.perf_counter() - began

    def send(self, residual: torch.Tensor) -> None:
        """Send [N, hidden] float32 to the next stage, which is seldom waited for. Nobody may write to it any more."""
        while self._sent and (self._sent[0].is_done or len(self._sent) >= _SENDS_MAX):
            self._sent.popleft().finish()
        self._sent.append(self._wire.start_send(residual, self._stage + 1))


class StartGroup:
    """All ranks of a worker while they start: they compare what must be equal."""

    def __init__(self, wire: Wire, num_ranks: int) -> None:
        self._wire = wire
        self._num_ranks = num_ranks

    def exchange(self, text: str) -> list[str]:
        """Give every rank's text to all, by rank. Waits for the slowest."""
        own = text.encode()
        assert 0 < len(own) <= _TEXT_BYTES, "no text, or a long one"
        padded = torch.zeros(_TEXT_BYTES, dtype=torch.uint8)
        padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        texts = torch.empty(self._num_ranks * _TEXT_BYTES, dtype=torch.uint8)
        self._wire.all_gather(texts, padded)
        return [bytes(row.tolist()).rstrip(b"\0").decode() for row in texts.view(self._num_ranks, -1)]


@dataclass(frozen=True, slots=True)
class RankLinks:
    """A rank's ties to the others; None where there is nobody, as for a rank alone."""

    place: RankPlace = field(default_factory=RankPlace)
    start: StartGroup | None = None
    tensor: TensorRanks | None = None
    stages: Stages | None = None


def connect(place: RankPlace, meeting: Meeting, vocabulary: int, *, on_gpu: bool, nccl: bool) -> RankLinks:
    """Tie this rank to the others; returns when all have come. Raises CollectiveFailed.

    `nccl`: what ranks compute travels by NCCL, not by way of the host.
    """
    store = find_store(meeting.host, meeting.port, meeting.start_seconds)

    def compute_wire(name: str, rank: int, size: int) -> Wire:
        seconds = meeting.collective_seconds
        if nccl:
            return Wire(nccl_group(store, name, rank, size, seconds), name, staged=False)
        return Wire(gloo_group(store, name, rank, size, meeting.own_host, seconds), name, staged=on_gpu)

    everybody = gloo_group(store, "start", place.rank, place.num_ranks, meeting.own_host, meeting.start_seconds)
    start = StartGroup(Wire(everybody, "start", staged=False), place.num_ranks)
    sharding = place.sharding
    tensor: TensorRanks | None = None
    stages: Stages | None = None
    if sharding.tensor_size > 1:
        name = f"tensor ranks of stage {place.pipeline_rank}"
        tensor = TensorRanks(compute_wire(name, place.tensor_rank, sharding.tensor_size), place, vocabulary)
    if sharding.pipeline_size > 1:
        name = f"stages of tensor rank {place.tensor_rank}"
        stages = Stages(compute_wire(name, place.pipeline_rank, sharding.pipeline_size), place)
    return RankLinks(place, start, tensor, stages)
