"""How a model's layers and KV heads are cut between the ranks of a worker, and what two workers' ranks have in common.

Weights, pools and the hand-off cut with these functions only, so that what one rank writes is what another one reads.
A rank is numbered pipeline_rank * tensor_size + tensor_rank. Pure; every range is in the model's own numbers unless a
name says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from tandem.core.messages.handoff import Sharding

MAX_PIECES = 1024  # of one pair of workers
MAX_PIECES_OF_RANK = 256  # of one exporting rank: a byte of the data plane's request


@dataclass(frozen=True, slots=True)
class KvPart:
    """Layers [first_layer, first_layer + num_layers) of KV heads [first_head, first_head + num_heads). Never empty."""

    first_layer: int
    num_layers: int
    first_head: int
    num_heads: int

    @property
    def end_layer(self) -> int:
        return self.first_layer + self.num_layers

    @property
    def end_head(self) -> int:
        return self.first_head + self.num_heads

    def within(self, whole: KvPart) -> KvPart:
        """Return this part in the numbers of a rank that owns `whole`, which contains it."""
        assert whole.first_layer <= self.first_layer and self.end_layer <= whole.end_layer
        assert whole.first_head <= self.first_head and self.end_head <= whole.end_head
        return KvPart(
            self.first_layer - whole.first_layer, self.num_layers, self.first_head - whole.first_head, self.num_heads
        )

    def intersection(self, other: KvPart) -> KvPart | None:
        """Return what both have, None if that is nothing."""
        layer, head = max(self.first_layer, other.first_layer), max(self.first_head, other.first_head)
        num_layers = min(self.end_layer, other.end_layer) - layer
        num_heads = min(self.end_head, other.end_head) - head
        return KvPart(layer, num_layers, head, num_heads) if num_layers > 0 and num_heads > 0 else None


@dataclass(frozen=True, slots=True)
class Piece:
    """What one importing rank reads from one exporting rank. `index` counts the exporting rank's pieces from 0."""

    exporter_rank: int
    importer_rank: int
    index: int
    part: KvPart


def num_ranks(sharding: Sharding) -> int:
    """Return how many ranks a worker of this sharding has."""
    return sharding.tensor_size * sharding.pipeline_size


def sharding_fault(num_layers: int, num_kv_heads: int, sharding: Sharding) -> str:
    """Return why a model cannot be cut like this, "" if it can."""
    if sharding.tensor_size < 1 or sharding.pipeline_size < 1:
        return "sizes start at 1"
    if num_kv_heads % sharding.tensor_size:
        return f"tensor size {sharding.tensor_size} does not divide {num_kv_heads} KV heads"
    if sharding.pipeline_size > num_layers:
        return f"pipeline size {sharding.pipeline_size} is more than {num_layers} layers"
    return ""


def pair_fault(exporter: Sharding, importer: Sharding, num_layers: int, num_kv_heads: int) -> str:
    """Return why two workers of one model cannot hand over, "" if they can."""
    for name, sharding in (("exporter", exporter), ("importer", importer)):
        if fault := sharding_fault(num_layers, num_kv_heads, sharding):
            return f"{name}: {fault}"
    found = pieces(exporter, importer, num_layers, num_kv_heads)
    if len(found) > MAX_PIECES or max(piece.index for piece in found) >= MAX_PIECES_OF_RANK:
        return f"{len(found)} pieces a page are too many"
    return ""


def stage_layers(num_layers: int, stages: int, stage: int) -> range:
    """Return the layers of a pipeline stage: equal runs, the first ones longer by one where that is needed."""
    assert 0 <= stage < stages <= num_layers
    size, longer = divmod(num_layers, stages)
    first = stage * size + min(stage, longer)
    return range(first, first + size + (stage < longer))


def rank_part(num_layers: int, num_kv_heads: int, sharding: Sharding, tensor_rank: int, pipeline_rank: int) -> KvPart:
    """Return what one rank owns. `sharding_fault` has found nothing wrong with the sharding."""
    assert 0 <= tensor_rank < sharding.tensor_size and num_kv_heads % sharding.tensor_size == 0
    layers = stage_layers(num_layers, sharding.pipeline_size, pipeline_rank)
    num_heads = num_kv_heads // sharding.tensor_size
    return KvPart(layers.start, len(layers), tensor_rank * num_heads, num_heads)


def rank_parts(num_layers: int, num_kv_heads: int, sharding: Sharding) -> tuple[KvPart, ...]:
    """Return what each rank owns, by rank."""
    return tuple(
        rank_part(num_layers, num_kv_heads, sharding, tensor_rank, pipeline_rank)
        for pipeline_rank in range(sharding.pipeline_size)
        for tensor_rank in range(sharding.tensor_size)
    )


@lru_cache(maxsize=64)
def pieces(exporter: Sharding, importer: Sharding, num_layers: int, num_kv_heads: int) -> tuple[Piece, ...]:
    """Return the common refinement of both cuts, by exporting rank, then by importing rank: what is announced and read.

    Equal shardings have one piece a rank, and that is all of it.
    """
    targets = rank_parts(num_layers, num_kv_heads, importer)
    found: list[Piece] = []
    for exporter_rank, source in enumerate(rank_parts(num_layers, num_kv_heads, exporter)):
        common = [(rank, part) for rank, own in enumerate(targets) if (part := source.intersection(own)) is not None]
        found += [Piece(exporter_rank, rank, index, part) for index, (rank, part) in enumerate(common)]
    return tuple(found)
