"""Hand-offs between workers whose ranks share the model in different ways: what is announced, accepted and pulled."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.core.endpoints import choose_endpoints
from tandem.core.messages.handoff import (
    Announce,
    EndCode,
    RankEndpoint,
    RankPages,
    SendAnnounce,
    Sharding,
    StreamAnnounced,
)
from tandem.core.messages.transfer import Export, Exported, Pull, PullStatus
from tandem.core.states import State
from tests.core.export_rig import ExportRig, refusal
from tests.core.import_rig import ImportRig, peer
from tests.core.rig import one

MODEL: dict[str, Any] = {"num_layers": 4, "num_kv_heads": 4}
OWN = Sharding(2, 1)


def ends(sharding: Sharding, transport: str = "tcp") -> tuple[RankEndpoint, ...]:
    return tuple(
        RankEndpoint(
            transport=transport, address=f"kv:{tensor}", instance_id=b"r", tensor_rank=tensor, pipeline_rank=stage
        )
        for stage in range(sharding.pipeline_size)
        for tensor in range(sharding.tensor_size)
    )


def sums(first: int, count: int) -> bytes:
    return b"".join(number.to_bytes(8, "little") for number in range(first, first + count))


# ---- the exporter ------------------------------------------------------------------------------------------------


def test_every_piece_is_announced_in_order() -> None:
    rig = ExportRig(sharding=OWN, **MODEL)
    rig.answers = False
    rig.open(1, 1, 10, sharding=Sharding(4, 1))
    export = one(rig.compute(), Export)
    assert export.importer == Sharding(4, 1)
    effects = rig.send(Exported(export.handoff_id, export.attempt, 0, sums(100, 4 * 3)))
    announce = one(effects, SendAnnounce).announce
    assert [entry.checksums for entry in announce.ranks] == [sums(100 + 3 * piece, 3) for piece in range(4)]
    assert (announce.first_ordinal, announce.tokens_ready) == (0, 10)


def test_page_numbers_are_announced_once() -> None:
    rig = ExportRig(sharding=OWN, ready=False, **MODEL)
    rig.answers = False
    rig.transfer_ready(*ends(OWN, "mooncake-rdma"))
    rig.open(1, 1, 10, sharding=OWN, transports=("mooncake-rdma",))
    export = one(rig.compute(), Export)
    announce = one(rig.send(Exported(export.handoff_id, 1, 0, sums(0, 6))), SendAnnounce).announce
    assert [len(entry.page_numbers) for entry in announce.ranks] == [12, 0]


@pytest.mark.parametrize("importer", [Sharding(3, 1), Sharding(8, 1), Sharding(1, 5), Sharding(1000, 1000)], ids=str)
def test_an_importer_that_cuts_the_model_otherwise_is_refused(importer: Sharding) -> None:
    rig = ExportRig(sharding=OWN, **MODEL)
    assert refusal(rig.open(1, 1, 10, sharding=importer)) is EndCode.MISMATCH


def test_an_attempt_of_another_sharding_is_announced_in_its_own_pieces() -> None:
    """The first decode pod died; the one that attaches has other ranks."""
    rig = ExportRig(sharding=OWN, **MODEL)
    rig.answers = False
    rig.open(1, 1, 10, sharding=OWN)
    old = one(rig.compute(), Export)
    new = one(rig.open(2, 1, 10, attempt=2, sharding=Sharding(1, 4)), Export)
    assert rig.send(Exported(old.handoff_id, 1, 0, sums(0, 6))) == []
    announce = one(rig.send(Exported(new.handoff_id, 2, 0, sums(0, 8 * 3))), SendAnnounce).announce
    assert len(announce.ranks) == 8


# ---- the importer ------------------------------------------------------------------------------------------------


def importing(exporter: Sharding, **accepted: Any) -> ImportRig:
    rig = ImportRig(sharding=OWN, **MODEL)
    rig.submit(1, 10, peers=(peer(1),))
    assert rig.streams[0].open.sharding == OWN
    rig.accept(1, **{"sharding": exporter, "endpoints": ends(exporter), **accepted})
    return rig


def announce(rig: ImportRig, *pieces: bytes, numbers: bytes = b"") -> list[object]:
    ranks = tuple(RankPages(piece, numbers if index == 0 else b"") for index, piece in enumerate(pieces))
    return rig.send(StreamAnnounced(1, Announce(0, 0, ranks)))


def has_given_up(rig: ImportRig) -> bool:
    return rig.request(1).state in (State.WAITING, State.EXTENDING)


def test_a_pull_names_every_rank_and_carries_every_piece() -> None:
    rig = importing(Sharding(4, 2))
    pieces = [sums(10 * piece, 3) for piece in range(8)]
    pull = one(announce(rig, *pieces, numbers=bytes(12)), Pull)
    assert (pull.endpoints, pull.exporter) == (ends(Sharding(4, 2)), Sharding(4, 2))
    assert (pull.checksums, pull.remote_pages) == (b"".join(pieces), bytes(12))
    rig.first_token(1, 7)
    rig.pull_ended(pull)
    assert rig.request(1).state is State.DECODING


def test_the_checksums_of_some_ordinals_are_those_of_every_piece() -> None:
    rig = importing(Sharding(4, 1))
    pull = one(announce(rig, *[sums(10 * piece, 3) for piece in range(4)]), Pull)
    again = one(rig.pull_ended(pull, PullStatus.MISMATCH, bad=[1]), Pull)
    assert (again.ordinals, again.checksums) == ((1,), b"".join(sums(10 * piece + 1, 1) for piece in range(4)))


@pytest.mark.parametrize(
    "pieces",
    [
        (sums(0, 3),),
        (sums(0, 3),) * 3,
        (sums(0, 3),) * 5,
        (sums(0, 3), sums(0, 3), sums(0, 3), sums(0, 2)),
        (sums(0, 3), sums(0, 3), sums(0, 3), b""),
        (sums(0, 3), sums(0, 3), sums(0, 3), sums(0, 3) + b"x"),
        (),
    ],
    ids=["one", "too few", "too many", "shorter", "none", "odd", "nothing"],
)
def test_an_announcement_that_lacks_a_piece_is_a_fault(pieces: tuple[bytes, ...]) -> None:
    rig = importing(Sharding(4, 1))
    announce(rig, *pieces)
    assert rig.pulls == [] and has_given_up(rig)


@pytest.mark.parametrize(
    "accepted",
    [
        {"endpoints": ends(Sharding(2, 1))},
        {"endpoints": ends(Sharding(4, 1)) + ends(Sharding(4, 1))[:1]},
        {"endpoints": ends(Sharding(4, 2))},
        {"sharding": Sharding(3, 1), "endpoints": ends(Sharding(3, 1))},
        {"sharding": Sharding(1024, 1024)},
    ],
    ids=["a rank is missing", "a rank twice", "more ranks", "does not fit", "far too many"],
)
def test_an_exporter_whose_ranks_do_not_add_up_is_left(accepted: dict[str, Any]) -> None:
    rig = importing(Sharding(4, 1), **accepted)
    assert has_given_up(rig)


def test_a_second_accepted_is_a_fault() -> None:
    rig = importing(Sharding(4, 1))
    announce(rig, *[sums(0, 3)] * 4)
    rig.accept(1, sharding=Sharding(2, 1), endpoints=ends(OWN))
    assert has_given_up(rig)


def test_the_transport_is_one_that_every_rank_has() -> None:
    fast, slow = ends(OWN, "mooncake-rdma"), ends(OWN, "tcp")
    both = ("mooncake-rdma", "tcp")
    assert choose_endpoints(fast + slow, both, OWN) == fast
    assert choose_endpoints((slow[1], fast[0], slow[0]), both, OWN) == slow
    assert choose_endpoints(fast, ("tcp",), OWN) == ()
