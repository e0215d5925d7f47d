"""The data plane of the simulation: reads and checksums over integer pools, with delays, corruption and deaths."""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from random import Random

from tandem.core.messages.handoff import RankEndpoint, Sharding
from tandem.core.messages.transfer import (
    CancelPull,
    Export,
    Exported,
    Pull,
    PullEnded,
    PullStatus,
    Revoke,
    Revoked,
    TransferLost,
    TransferReady,
)
from tandem.core.sharding import KvPart, pieces, rank_parts
from tests.sim.oracle import page_checksum

LAYERS, HEADS = 4, 4  # of the model that ranks may share
Cells = tuple[int, ...]  # every bit of a slot is of one layer and head; cell c has bits c, c + 16, c + 32, c + 48
_ALL = tuple(range(LAYERS * HEADS))
_CELL = sum(1 << bit for bit in range(0, 64, LAYERS * HEADS))

Later = Callable[[float, Callable[[], None]], None]


@dataclass
class Served:
    attempt: int
    token: bytes
    pages: dict[int, int] = field(default_factory=dict)
    checksums: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SimPiece:
    """Which cells of a slot one importing rank reads, and which of its own they become; in the order of the pool."""

    source: Cells
    target: Cells


def sim_pieces(exporter: Sharding, importer: Sharding) -> list[SimPiece]:
    """Return all pieces, each found in its two ranks' pages as worker/transfer_cut.py finds it."""
    sources, targets = (rank_parts(LAYERS, HEADS, sharding) for sharding in (exporter, importer))
    return [
        SimPiece(_cells(one.part, sources[one.exporter_rank]), _cells(one.part, targets[one.importer_rank]))
        for one in pieces(exporter, importer, LAYERS, HEADS)
    ]


def _cells(part: KvPart, owner: KvPart) -> Cells:
    own = part.within(owner)
    layers = range(owner.first_layer + own.first_layer, owner.first_layer + own.end_layer)
    heads = range(owner.first_head + own.first_head, owner.first_head + own.end_head)
    return tuple(layer * HEADS + head for layer in layers for head in heads)


def _taken(slot: int, cells: Cells) -> int:
    """Return some cells of a slot, side by side."""
    if cells == _ALL:
        return slot
    return sum(((slot >> cell) & _CELL) << place for place, cell in enumerate(cells))


def _placed(slot: int, cells: Cells, taken: int) -> int:
    """Return a slot with some of its cells replaced."""
    if cells == _ALL:
        return taken
    for place, cell in enumerate(cells):
        slot = slot & ~(_CELL << cell) | ((taken >> place) & _CELL) << cell
    return slot


class SimTransfer:
    """One life after another of a worker's transfer processes, which begin and end together, over one pool.

    `directory` finds an exporter by instance id.
    """

    def __init__(
        self,
        random: Random,
        pool: list[list[int]],
        later: Later,
        deliver: Callable[[object], None],
        directory: dict[bytes, SimTransfer],
        faults: float,
        sharding: Sharding,
    ) -> None:
        self._random = random
        self._pool = pool
        self._later = later
        self._deliver = deliver
        self._directory = directory
        self._faults = faults
        self._sharding = sharding
        self._known_pieces: dict[tuple[Sharding, Sharding], list[SimPiece]] = {}
        self.served: dict[bytes, Served] = {}
        self._cancelled: set[int] = set()
        self._written: dict[int, tuple[int, ...]] = {}  # by pull: pages, until its end has been said
        self._promised: dict[bytes, set[int]] = {}  # by hand-off: pages, until the revocation has been acknowledged
        self._pipes: dict[str, deque[Callable[[], None]]] = {"command": deque(), "outcome": deque()}
        self.instance_id = b""
        self.alive = False
        self.stopped = False

    def start(self) -> None:
        self.instance_id = self._random.randbytes(8)
        self._directory[self.instance_id] = self
        self.alive = True
        ranks = product(range(self._sharding.pipeline_size), range(self._sharding.tensor_size))
        endpoints = tuple(
            RankEndpoint(
                transport="tcp", address="sim", instance_id=self.instance_id, tensor_rank=tensor, pipeline_rank=stage
            )
            for stage, tensor in ranks
        )
        self._deliver(TransferReady(self.instance_id, endpoints, ("tcp",)))

    def kill(self, restart_seconds: float | None) -> None:
        """End this life: nothing is read or served any more. None: for good."""
        self.alive = False
        self._directory.pop(self.instance_id, None)
        self.instance_id = b""
        self.served.clear()
        self._written.clear()
        self._promised.clear()
        if restart_seconds is None:
            self.stopped = True
            return
        self._deliver(TransferLost("killed"))
        self._later(restart_seconds, lambda: None if self.stopped else self.start())

    def command(self, command: object) -> None:
        if not self.alive:
            return  # into a closed pipe
        life = self.instance_id
        if isinstance(command, Export):
            self._promised.setdefault(command.handoff_id, set()).update(command.pages)
        if isinstance(command, Pull):
            self._written[command.ticket] = command.pages
        if isinstance(command, CancelPull):
            self._cancelled.add(command.ticket)
            return
        action = {Export: self._export, Revoke: self._revoke, Pull: self._pull}[type(command)]
        self._in_order("command", lambda: action(command) if self.instance_id == life else None)  # type: ignore[operator]

    def pages_written(self) -> set[int]:
        """Pages that a pull of this life may still write into, for all that the rank has been told."""
        return {page for pages in self._written.values() for page in pages}

    def pages_served(self) -> set[int]:
        """Pages that a peer may still read, for all that the rank has been told."""
        return {page for pages in self._promised.values() for page in pages}

    def _pieces(self, exporter: Sharding, importer: Sharding) -> list[SimPiece]:
        pair = (exporter, importer)
        if pair not in self._known_pieces:
            self._known_pieces[pair] = sim_pieces(exporter, importer)
        return self._known_pieces[pair]

    def _say(self, outcome: Exported | Revoked) -> None:
        life = self.instance_id

        def arrive() -> None:
            if self.instance_id == life:
                if isinstance(outcome, Revoked):
                    self._promised.pop(outcome.handoff_id, None)
                self._deliver(outcome)

        self._in_order("outcome", arrive)

    def _in_order(self, direction: str, action: Callable[[], None]) -> None:
        """A pipe: later, but never before what was put in earlier."""
        self._pipes[direction].append(action)
        self._later(self._random.uniform(0.0, 0.002), lambda: self._pipes[direction].popleft()())

    # ---- exporter -------------------------------------------------------------------------------------------------

    def _export(self, command: Export) -> None:
        entry = self.served.get(command.handoff_id)
        if entry is None or entry.attempt < command.attempt:
            old = entry
            entry = self.served[command.handoff_id] = Served(command.attempt, command.token)
            if old is not None:
                self.check_unchanged(old)
        assert entry.attempt == command.attempt
        for ordinal, page in enumerate(command.pages, command.first_ordinal):
            entry.pages[ordinal] = page
            entry.checksums[ordinal] = page_checksum(self._pool[page])
        sums = [
            page_checksum([_taken(slot, piece.source) for slot in self._pool[page]])
            for piece in self._pieces(self._sharding, command.importer)
            for page in command.pages
        ]
        checksums = array("Q", sums).tobytes()
        self._say(Exported(command.handoff_id, command.attempt, command.first_ordinal, checksums))

    def _revoke(self, command: Revoke) -> None:
        entry = self.served.pop(command.handoff_id, None)
        if entry is not None:
            self.check_unchanged(entry)
        self._say(Revoked(command.handoff_id))

    def check_unchanged(self, entry: Served) -> None:
        """Nobody may write to an announced page before it is revoked."""
        for ordinal, page in entry.pages.items():
            assert page_checksum(self._pool[page]) == entry.checksums[ordinal], f"announced page {page} was written to"

    # ---- importer -------------------------------------------------------------------------------------------------

    def _pull(self, command: Pull) -> None:
        """Read piece after piece, each page at its own instant; a failed or cancelled pull goes on writing for a while.

        A page is good when all its pieces are.
        """
        fate = self._random.random()
        all_pieces = self._pieces(command.exporter, self._sharding)
        num_reads = len(all_pieces) * len(command.ordinals)
        instants = sorted(self._random.uniform(0.0, 0.02) for _ in range(num_reads))
        life, good, bad = self.instance_id, Counter[int](), set[int]()
        breaks_at = self._random.randrange(num_reads) if fate < self._faults else None
        failed = [False]

        def read(index: int) -> None:
            if self.instance_id != life or failed[0]:
                return
            source = self._directory.get(command.endpoints[0].instance_id)
            entry = None if source is None else source.served.get(command.handoff_id)
            number, position = divmod(index, len(command.ordinals))
            piece, ordinal = all_pieces[number], command.ordinals[position]
            if source is None or entry is None or entry.token != command.token or ordinal not in entry.pages:
                failed[0] = True
                return
            slots = [_taken(slot, piece.source) for slot in source._pool[entry.pages[ordinal]]]
            if self._random.random() < self._faults / 4:
                slots[self._random.randrange(len(slots))] ^= 1
            target = self._pool[command.pages[position]]
            target[:] = [_placed(old, piece.target, new) for old, new in zip(target, slots, strict=True)]
            if page_checksum(slots) == array("Q", command.checksums)[index]:
                good[ordinal] += 1
            else:
                bad.add(ordinal)

        for index, instant in enumerate(instants):
            self._later(instant, lambda index=index: read(index))  # type: ignore[misc]

        def end() -> None:
            if self.instance_id != life:
                return
            if breaks_at is not None or failed[0]:
                status = PullStatus.FAILED
            elif command.ticket in self._cancelled and good.total() + len(bad) < num_reads:
                status = PullStatus.CANCELLED
            else:
                status = PullStatus.MISMATCH if bad else PullStatus.DONE
            del self._written[command.ticket]
            self._deliver(
                PullEnded(
                    ticket=command.ticket,
                    status=status,
                    good_ordinals=tuple(one for one in command.ordinals if good[one] == len(all_pieces)),
                    bad_ordinals=tuple(one for one in command.ordinals if one in bad),
                    transport="tcp",
                )
            )

        self._later(instants[-1] + self._random.uniform(0.0, 0.01), end)
