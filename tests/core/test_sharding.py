"""Cuts of a model between ranks: they tile it, and two cuts have one common refinement."""

from __future__ import annotations

import itertools
import random

import pytest

from tandem.core.messages.handoff import Sharding
from tandem.core.sharding import (
    KvPart,
    num_ranks,
    pair_fault,
    pieces,
    rank_part,
    rank_parts,
    sharding_fault,
    stage_layers,
)

MODELS = [(4, 4), (3, 2), (7, 8), (32, 8), (80, 8), (61, 12)]
Cell = tuple[int, int]


def cells(part: KvPart) -> set[Cell]:
    layers, heads = range(part.first_layer, part.end_layer), range(part.first_head, part.end_head)
    return set(itertools.product(layers, heads))


def shardings(num_layers: int, num_kv_heads: int) -> list[Sharding]:
    found = [Sharding(tensor, stages) for tensor in range(1, num_kv_heads + 1) for stages in range(1, num_layers + 1)]
    return [one for one in found if not sharding_fault(num_layers, num_kv_heads, one)]


@pytest.mark.parametrize(("num_layers", "num_kv_heads"), MODELS)
def test_the_parts_of_the_ranks_tile_the_model(num_layers: int, num_kv_heads: int) -> None:
    for sharding in shardings(num_layers, num_kv_heads):
        parts = rank_parts(num_layers, num_kv_heads, sharding)
        assert len(parts) == num_ranks(sharding)
        owned = [cell for part in parts for cell in cells(part)]
        assert len(owned) == len(set(owned)) == num_layers * num_kv_heads
        assert max(part.num_layers for part in parts) - min(part.num_layers for part in parts) <= 1


def test_a_rank_is_numbered_stage_by_stage() -> None:
    sharding = Sharding(tensor_size=2, pipeline_size=3)
    parts = rank_parts(8, 4, sharding)
    for pipeline_rank in range(3):
        for tensor_rank in range(2):
            part = rank_part(8, 4, sharding, tensor_rank, pipeline_rank)
            assert parts[pipeline_rank * 2 + tensor_rank] == part
    assert parts[3] == KvPart(first_layer=3, num_layers=3, first_head=2, num_heads=2)
    assert [len(stage_layers(8, 3, stage)) for stage in range(3)] == [3, 3, 2]


@pytest.mark.parametrize(("num_layers", "num_kv_heads"), MODELS)
def test_pieces_are_the_common_refinement(num_layers: int, num_kv_heads: int) -> None:
    """Every piece is all that its two ranks share; each rank of either side is covered by its pieces exactly once."""
    known = shardings(num_layers, num_kv_heads)
    pairs = random.Random(num_layers).sample(list(itertools.product(known, known)), min(60, len(known) ** 2))
    for exporter, importer in pairs:
        found = pieces(exporter, importer, num_layers, num_kv_heads)
        sources = rank_parts(num_layers, num_kv_heads, exporter)
        targets = rank_parts(num_layers, num_kv_heads, importer)
        for rank, part in enumerate(sources):
            own = [cell for piece in found if piece.exporter_rank == rank for cell in cells(piece.part)]
            assert sorted(own) == sorted(cells(part))
        for rank, part in enumerate(targets):
            own = [cell for piece in found if piece.importer_rank == rank for cell in cells(piece.part)]
            assert sorted(own) == sorted(cells(part))
        for piece in found:
            assert cells(piece.part) == cells(sources[piece.exporter_rank]) & cells(targets[piece.importer_rank])


@pytest.mark.parametrize(("num_layers", "num_kv_heads"), MODELS)
def test_pieces_have_one_order(num_layers: int, num_kv_heads: int) -> None:
    for exporter, importer in itertools.product(shardings(num_layers, num_kv_heads)[:12], repeat=2):
        found = pieces(exporter, importer, num_layers, num_kv_heads)
        order = [(piece.exporter_rank, piece.importer_rank) for piece in found]
        assert order == sorted(set(order))
        for rank in range(num_ranks(exporter)):
            indexes = [piece.index for piece in found if piece.exporter_rank == rank]
            assert indexes == list(range(len(indexes)))


def test_equal_shardings_have_one_piece_a_rank() -> None:
    for sharding in shardings(7, 8):
        found = pieces(sharding, sharding, 7, 8)
        assert [piece.part for piece in found] == list(rank_parts(7, 8, sharding))
        assert all(piece.exporter_rank == piece.importer_rank and piece.index == 0 for piece in found)


def test_a_part_in_the_numbers_of_its_rank() -> None:
    part = KvPart(first_layer=5, num_layers=2, first_head=6, num_heads=1)
    assert part.within(KvPart(4, 4, 4, 4)) == KvPart(1, 2, 2, 1)
    with pytest.raises(AssertionError):
        part.within(KvPart(4, 2, 4, 4))
    with pytest.raises(AssertionError):
        part.within(KvPart(4, 4, 0, 6))


@pytest.mark.parametrize(
    ("sharding", "words"),
    [
        (Sharding(3, 1), "tensor size 3 does not divide 8 KV heads"),
        (Sharding(16, 1), "tensor size 16 does not divide 8 KV heads"),
        (Sharding(1, 5), "pipeline size 5 is more than 4 layers"),
        (Sharding(0, 1), "sizes start at 1"),
        (Sharding(1, 0), "sizes start at 1"),
    ],
)
def test_what_does_not_fit_is_named(sharding: Sharding, words: str) -> None:
    assert sharding_fault(4, 8, sharding) == words
    assert not sharding_fault(4, 8, Sharding(8, 4))


@pytest.mark.parametrize(
    ("exporter", "importer", "words"),
    [
        (Sharding(3, 1), Sharding(1, 1), "exporter: tensor size 3"),
        (Sharding(1, 1), Sharding(1, 81), "importer: pipeline size 81"),
        (Sharding(1, 1), Sharding(8, 40), "320 pieces a page are too many"),  # of one exporting rank
        (Sharding(8, 80), Sharding(8, 1), ""),
        (Sharding(16, 70), Sharding(16, 80), "pieces a page are too many"),
        (Sharding(1, 1), Sharding(8, 32), ""),
    ],
)
def test_a_pair_that_cannot_hand_over_is_named(exporter: Sharding, importer: Sharding, words: str) -> None:
    fault = pair_fault(exporter, importer, 80, 16)
    assert words in fault and bool(words) == bool(fault), fault
