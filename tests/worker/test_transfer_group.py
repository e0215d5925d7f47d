"""What a group of ranks' transfer processes promises, whatever order and fate its ranks have."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from random import Random

import pytest

from tandem.core.messages.handoff import RankEndpoint, Sharding
from tandem.core.messages.transfer import (
    Adopt,
    CancelPull,
    Export,
    Exported,
    Pull,
    PullEnded,
    PullStatus,
    RankCommand,
    RankExport,
    RankPull,
    Restart,
    Revoke,
    Revoked,
    TransferLost,
    TransferOutcome,
    TransferReady,
)
from tandem.core.sharding import pieces
from tandem.worker.transfer_group import LEAVE_SECONDS, TransferGroup, Watched
from tests.worker.group_rig import MODEL

OWN = Sharding(2, 2)
PEER = Sharding(4, 1)
NUM_RANKS = 4


class FakeLink:
    """One rank's process, played by the test. `commands` are what it has not answered yet."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.life = 0
        self.alive = False
        self.commands: deque[RankCommand] = deque()
        self.outcomes: deque[TransferOutcome] = deque()
        self.adopted: list[int] = []
        self.serving: set[bytes] = set()
        self.reading: dict[int, RankPull] = {}

    channel: Watched | None = None

    def next_due(self) -> float | None:
        return float(self.rank) if not self.alive else None

    def advance(self) -> Sequence[TransferOutcome]:
        return ()

    def flush(self) -> None:
        pass

    def stop(self) -> None:
        self.alive = False

    def send(self, command: RankCommand) -> None:
        if isinstance(command, Adopt):
            self.adopted += command.pages
        elif self.alive:
            if isinstance(command, RankExport):
                self.serving.add(command.handoff_id)
            if isinstance(command, RankPull):
                self.reading[command.ticket] = command
            self.commands.append(command)

    def receive(self) -> Sequence[TransferOutcome]:
        said, self.outcomes = list(self.outcomes), deque()
        return said

    def start(self, transports: Sequence[str] = ("tcp",)) -> None:
        self.life += 1
        self.alive = True
        name = b"%d-%d" % (self.rank, self.life)
        endpoints = [RankEndpoint(transport=one, address=f"a:{self.rank}", instance_id=name) for one in transports]
        self.outcomes.append(TransferReady(name, tuple(endpoints), tuple(transports), ("a note",)))

    def die(self) -> None:
        self.alive = False
        for held in (self.commands, self.serving, self.reading):
            held.clear()
        self.outcomes.append(TransferLost("killed"))

    def answer(self, status: PullStatus = PullStatus.DONE, bad: Sequence[int] = ()) -> None:
        """Do the oldest command."""
        command = self.commands.popleft()
        match command:
            case RankExport():
                count = len(command.pages) * len(command.pieces)
                sums = b"".join((1000 * self.rank + number).to_bytes(8, "little") for number in range(count))
                self.outcomes.append(Exported(command.handoff_id, command.attempt, command.first_ordinal, sums))
            case Revoke():
                self.serving.discard(command.handoff_id)
                self.outcomes.append(Revoked(command.handoff_id))
            case RankPull():
                self._end(command.ticket, status, bad)
            case CancelPull():
                self._end(command.ticket, PullStatus.CANCELLED, ())

    def _end(self, ticket: int, status: PullStatus, bad: Sequence[int]) -> None:
        pull = self.reading.pop(ticket, None)
        if pull is None:
            return
        self.commands = deque(one for one in self.commands if getattr(one, "ticket", None) != ticket)
        whole = status in (PullStatus.DONE, PullStatus.MISMATCH)
        good = tuple(ordinal for ordinal in pull.ordinals if whole and ordinal not in bad)
        ended = PullEnded(ticket=ticket, status=status, good_ordinals=good, bad_ordinals=tuple(bad), num_bytes=10)
        self.outcomes.append(ended)


class Bench:
    def __init__(self, num_ready: int = NUM_RANKS) -> None:
        self.links = [FakeLink(rank) for rank in range(NUM_RANKS)]
        self.now = 0.0
        self.group = TransferGroup(self.links, MODEL, OWN, lambda: self.now)
        for link in self.links[:num_ready]:
            link.start()

    def answer_all(self) -> list[TransferOutcome]:
        said = self.group.receive()
        while any(link.commands for link in self.links):
            for link in self.links:
                while link.commands:
                    link.answer()
            said += self.group.receive()
        return said


def an_export(handoff_id: bytes = b"h" * 16, first: int = 0) -> Export:
    return Export(handoff_id, 1, b"t", first, (4, 5, 6), PEER)


def a_pull(ticket: int = 1) -> Pull:
    num_pieces = len(pieces(PEER, OWN, MODEL.num_layers, MODEL.num_kv_heads))
    sums = b"".join(number.to_bytes(8, "little") for number in range(3 * num_pieces))
    return Pull(
        ticket=ticket,
        endpoints=tuple(RankEndpoint(transport="tcp", address=f"p:{r}", instance_id=b"p%d" % r) for r in range(4)),
        exporter=PEER,
        handoff_id=ticket.to_bytes(16, "little"),
        attempt=1,
        token=b"t",
        ordinals=(2, 3, 4),
        checksums=sums,
        remote_pages=b"",
        pages=(10, 11, 12),
    )


def test_it_is_ready_when_every_rank_is() -> None:
    bench = Bench(num_ready=3)
    assert bench.group.receive() == []
    assert bench.group.next_due() == 3.0
    bench.links[3].start()
    (ready,) = bench.group.receive()
    assert isinstance(ready, TransferReady)
    ranks = [(one.pipeline_rank, one.tensor_rank, one.address) for one in ready.endpoints]
    assert ranks == [(0, 0, "a:0"), (0, 1, "a:1"), (1, 0, "a:2"), (1, 1, "a:3")]
    assert (ready.imports, ready.instance_id) == (("tcp",), b"0-1")
    assert ready.notes == ("a note", "rank 1: a note", "rank 2: a note", "rank 3: a note")


def test_a_transport_counts_only_if_every_rank_has_it() -> None:
    bench = Bench(num_ready=0)
    for link in bench.links:
        link.start(("mooncake-tcp", "tcp") if link.rank != 2 else ("tcp",))
    (ready,) = bench.group.receive()
    assert isinstance(ready, TransferReady)
    assert ready.imports == ("tcp",)
    assert [endpoint.transport for endpoint in ready.endpoints] == ["tcp"] * 4


def test_it_has_exported_when_every_rank_has_and_the_pieces_are_in_order() -> None:
    bench = Bench()
    bench.group.receive()
    bench.group.send(an_export())
    for link in reversed(bench.links):
        assert bench.group.receive() == []
        link.answer()
    (exported,) = bench.group.receive()
    assert isinstance(exported, Exported)
    found = [int.from_bytes(exported.checksums[at : at + 8], "little") for at in range(0, len(exported.checksums), 8)]
    assert found == [1000 * rank + number for rank in range(4) for number in range(2 * 3)]  # two pieces a rank


def test_it_has_revoked_when_every_rank_has() -> None:
    bench = Bench()
    bench.group.receive()
    bench.group.send(an_export())
    bench.group.send(Revoke(b"h" * 16))
    bench.links[0].answer()
    for link in bench.links:
        assert bench.group.receive() == [], "what was exported meanwhile is told no more"
        while link.commands:
            link.answer()
    assert bench.group.receive() == [Revoked(b"h" * 16)]


def test_a_pull_is_cut_into_pieces_and_every_piece_counts() -> None:
    bench = Bench()
    bench.group.receive()
    bench.group.send(a_pull())
    found = pieces(PEER, OWN, MODEL.num_layers, MODEL.num_kv_heads)
    sent = [(link.rank, one) for link in bench.links for one in link.commands if isinstance(one, RankPull)]
    assert len(sent) == len(found) == 8
    for number, piece in enumerate(found):
        (own,) = [one for rank, one in sent if rank == piece.importer_rank and one.checksums[0] == 3 * number]
        assert (own.endpoint.instance_id, own.piece) == (b"p%d" % piece.exporter_rank, piece.index)
        assert own.checksums == b"".join((3 * number + index).to_bytes(8, "little") for index in range(3))
    bench.links[2].answer(PullStatus.MISMATCH, bad=(3,))
    assert bench.group.receive() == []
    (ended,) = bench.answer_all()
    assert isinstance(ended, PullEnded)
    assert (ended.ticket, ended.status) == (1, PullStatus.MISMATCH)
    assert (ended.good_ordinals, ended.bad_ordinals, ended.num_bytes) == ((2, 4), (3,), 80)
    assert all(link.adopted == [10, 12] for link in bench.links)


@pytest.mark.parametrize("status", [PullStatus.FAILED, PullStatus.REFUSED])
def test_a_piece_that_fails_ends_the_others(status: PullStatus) -> None:
    bench = Bench()
    bench.group.receive()
    bench.group.send(a_pull())
    bench.links[3].answer(status)
    assert bench.group.receive() == []
    for link in bench.links:
        assert [one.ticket for one in link.commands if isinstance(one, CancelPull)] == list(link.reading)
    for link in bench.links:
        link.commands = deque(one for one in link.commands if isinstance(one, CancelPull))
    (ended,) = bench.answer_all()
    assert isinstance(ended, PullEnded)
    assert (ended.status, ended.good_ordinals) == (status, ())
    assert not any(link.adopted for link in bench.links)


def test_a_lost_process_is_told_once_the_others_hold_nothing() -> None:
    bench = Bench()
    bench.group.receive()
    bench.group.send(an_export())
    bench.group.send(a_pull())
    bench.links[1].die()
    assert bench.group.receive() == []
    bench.group.send(an_export(b"x" * 16))  # the scheduler does not know yet: nobody hears of it
    bench.links[1].start()
    assert not any(b"x" * 16 in link.serving for link in bench.links)
    said = bench.answer_all()
    assert [type(one) for one in said] == [TransferLost, TransferReady]
    assert isinstance(said[0], TransferLost) and said[0].message == "rank 1: killed"
    assert not any(link.serving or link.reading for link in bench.links)
    ready = said[1]
    assert isinstance(ready, TransferReady) and ready.endpoints[1].instance_id == b"1-2"
    bench.group.send(an_export())
    assert [type(one) for one in bench.answer_all()] == [Exported], "a higher attempt attaches"


class RandomBench(Bench):
    """Commands, answers and deaths in random order. `awaited` counts what the group still owes the scheduler."""

    def __init__(self, random: Random) -> None:
        super().__init__()
        self._random = random
        self.is_up = False
        self.awaited = Counter[object]()
        self._live: list[bytes] = []

    def hear(self) -> None:
        for outcome in self.group.receive():
            assert self.is_up or isinstance(outcome, TransferReady), "nothing is said of what was lost"
            match outcome:
                case TransferReady():
                    assert not self.is_up
                    self.is_up = True
                case TransferLost():
                    self.is_up = False
                    self.awaited.clear()
                    self._live.clear()
                    assert not any(link.serving or link.reading for link in self.links)
                case Exported():
                    self.awaited[outcome.handoff_id, "export"] -= 1
                case Revoked():
                    self.awaited[outcome.handoff_id] -= 1
                    assert not any(outcome.handoff_id in link.serving for link in self.links)
                case PullEnded():
                    self.awaited[outcome.ticket] -= 1
                    reading = [pull.handoff_id for link in self.links for pull in link.reading.values()]
                    assert outcome.ticket.to_bytes(16, "little") not in reading
            assert all(count >= 0 for count in self.awaited.values()), "said twice"

    def act(self, step: int) -> None:
        random, action = self._random, self._random.random()
        if action < 0.25 and self.is_up:
            handoff_id = step.to_bytes(16, "little")
            self._live.append(handoff_id)
            self.awaited[handoff_id, "export"] += 1
            self.group.send(an_export(handoff_id))
        elif action < 0.35 and self.is_up and self._live:
            handoff_id = self._live.pop(random.randrange(len(self._live)))
            self.awaited.pop((handoff_id, "export"), None)
            self.awaited[handoff_id] += 1
            self.group.send(Revoke(handoff_id))
        elif action < 0.5 and self.is_up:
            self.awaited[step] += 1
            self.group.send(a_pull(step))
            if random.random() < 0.5:
                self.group.send(CancelPull(step))
        elif action < 0.55:
            link = random.choice(self.links)
            link.die() if link.alive else link.start()
        elif busy := [link for link in self.links if link.commands]:
            random.choice(busy).answer(random.choice([PullStatus.DONE, PullStatus.DONE, PullStatus.FAILED]))

    def settle(self) -> None:
        for link in self.links:
            if not link.alive:
                link.start()
        while any(link.commands or link.outcomes for link in self.links):
            for link in self.links:
                while link.commands:
                    link.answer()
            self.hear()


def test_a_process_that_does_not_let_go_is_ended_too() -> None:
    bench = Bench()
    bench.group.receive()
    bench.group.send(an_export())
    bench.links[1].die()
    assert bench.group.receive() == []
    for link in bench.links:
        while link.commands and link.rank != 2:
            link.answer()
    assert bench.group.receive() == []
    assert bench.group.next_due() == 1.0, "rank 1 is started again before"
    bench.links[1].start()
    assert bench.group.next_due() == LEAVE_SECONDS
    bench.now = LEAVE_SECONDS
    assert bench.group.advance() == [] and Restart() in bench.links[2].commands
    assert not any(Restart() in link.commands for link in bench.links if link.rank != 2)
    bench.links[2].die()
    assert [type(one) for one in bench.group.receive()] == [TransferLost]
    bench.links[2].start()
    assert [type(one) for one in bench.group.receive()] == [TransferReady]


@pytest.mark.parametrize("block", range(4))
def test_random_orders_and_deaths_end_everything_exactly_once(block: int) -> None:
    """Between TransferReady and TransferLost every command is answered once; TransferLost ends the rest for good."""
    for seed in range(100 * block, 100 * block + 100):
        bench = RandomBench(Random(seed))
        for step in range(1, 60):
            bench.act(step)
            bench.hear()
        bench.settle()
        assert bench.is_up, f"seed {seed}"
        assert not +bench.awaited, f"seed {seed}: not answered: {+bench.awaited}"
