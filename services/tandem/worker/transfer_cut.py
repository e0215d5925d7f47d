"""What the scheduler says of whole pages, cut into what each rank's transfer process does; and the answers merged.

Pure. Ranks and pieces are numbered as in core/sharding.py; so are the parts of what a rank answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tandem.core.exports import CHECKSUM_BYTES
from tandem.core.messages.handoff import Sharding
from tandem.core.messages.transfer import (
    Export,
    Pull,
    PullEnded,
    PullStatus,
    RankExport,
    RankPull,
    Slab,
    Source,
    TransferReady,
)
from tandem.core.sharding import KvPart, Piece, pieces, rank_parts
from tandem.transfer.layout import KvLayout

# A pull of several pieces ends as the worst of them did.
_WORST_FIRST = (PullStatus.FAILED, PullStatus.REFUSED, PullStatus.CANCELLED, PullStatus.MISMATCH, PullStatus.DONE)


class TransferCut:
    """`model` is the layout that a single rank would have; `sharding` is this worker's."""

    def __init__(self, model: KvLayout, sharding: Sharding) -> None:
        self._model = model
        self._sharding = sharding
        self.parts = rank_parts(model.num_layers, model.num_kv_heads, sharding)

    def exports(self, export: Export) -> list[RankExport]:
        """Return what each rank serves, by rank."""
        slabs: list[list[Slab]] = [[] for _ in self.parts]
        for piece in self._pieces(self._sharding, export.importer):
            slabs[piece.exporter_rank].append(self._slab(piece, self.parts[piece.exporter_rank]))
        head = (export.handoff_id, export.attempt, export.token, export.first_ordinal, export.pages)
        return [RankExport(*head, tuple(own)) for own in slabs]

    def pulls(self, pull: Pull, new_ticket: Callable[[], int]) -> list[tuple[int, RankPull]]:
        """Return (rank, what it reads) of each piece."""
        sources = rank_parts(self._model.num_layers, self._model.num_kv_heads, pull.exporter)
        size = CHECKSUM_BYTES * len(pull.ordinals)
        found = []
        for number, piece in enumerate(self._pieces(pull.exporter, self._sharding)):
            source = sources[piece.exporter_rank]
            own = RankPull(
                ticket=new_ticket(),
                endpoint=pull.endpoints[piece.exporter_rank],
                handoff_id=pull.handoff_id,
                attempt=pull.attempt,
                token=pull.token,
                ordinals=pull.ordinals,
                checksums=pull.checksums[number * size : (number + 1) * size],
                remote_pages=pull.remote_pages,
                pages=pull.pages,
                piece=piece.index,
                slab=self._slab(piece, self.parts[piece.importer_rank]),
                source=Source(self._model.of_part(source).page_bytes, self._slab(piece, source)),
            )
            found.append((piece.importer_rank, own))
        return found

    def ready(self, readies: Sequence[TransferReady]) -> TransferReady:
        """Return what the worker can do: a transport counts if every rank has it. `readies` by rank."""
        first = readies[0]
        exports = [endpoint.transport for endpoint in first.endpoints]
        imports = tuple(name for name in first.imports if all(name in ready.imports for ready in readies))
        names = ["", *(f"rank {rank}: " for rank in range(1, len(readies)))]
        notes = [name + note for name, own in zip(names, readies, strict=True) for note in own.notes]
        endpoints = []
        for name in exports:
            found = [endpoint for ready in readies for endpoint in ready.endpoints if endpoint.transport == name]
            if len(found) == len(readies):
                for rank, endpoint in enumerate(found):
                    pipeline_rank, tensor_rank = divmod(rank, self._sharding.tensor_size)
                    endpoints.append(replace(endpoint, tensor_rank=tensor_rank, pipeline_rank=pipeline_rank))
        return TransferReady(first.instance_id, tuple(endpoints), imports, tuple(notes))

    def _pieces(self, exporter: Sharding, importer: Sharding) -> tuple[Piece, ...]:
        return pieces(exporter, importer, self._model.num_layers, self._model.num_kv_heads)

    def _slab(self, piece: Piece, owner: KvPart) -> Slab:
        return self._model.of_part(owner).slab(piece.part.within(owner))


@dataclass(slots=True, eq=False)
class PullMerge:
    """One Pull under way: `running` are its pieces' tickets with their ranks, `ended` what came of the others."""

    pull: Pull
    running: dict[int, int]
    ended: list[PullEnded] = field(default_factory=list)

    def note(self, ended: PullEnded) -> None:
        del self.running[ended.ticket]
        self.ended.append(ended)

    @property
    def has_failed(self) -> bool:
        """Whether a piece will not come, so that the others need not either."""
        return any(ended.status in (PullStatus.FAILED, PullStatus.REFUSED) for ended in self.ended)

    def outcome(self) -> PullEnded:
        """Return the end of the whole pull: an ordinal is good if every piece of it is, bad if any piece is."""
        assert not self.running
        good = set(self.pull.ordinals).intersection(*(ended.good_ordinals for ended in self.ended))
        bad = {ordinal for ended in self.ended for ordinal in ended.bad_ordinals}
        worst = min(self.ended, key=lambda ended: _WORST_FIRST.index(ended.status))
        transports = {ended.transport for ended in self.ended if ended.transport}
        asked = self.pull.endpoints[0].transport
        return PullEnded(
            ticket=self.pull.ticket,
            status=worst.status,
            good_ordinals=tuple(ordinal for ordinal in self.pull.ordinals if ordinal in good),
            bad_ordinals=tuple(ordinal for ordinal in self.pull.ordinals if ordinal in bad),
            num_bytes=sum(ended.num_bytes for ended in self.ended),
            seconds=max(ended.seconds for ended in self.ended),
            transport=min(transports - {asked}, default=asked if transports else ""),  # a fallback is seen
            message=worst.message,
        )
