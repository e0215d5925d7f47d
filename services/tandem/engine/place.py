"""Where a rank stands in its worker, and how long runs are cut between tensor ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.core.messages.handoff import Sharding
from tandem.core.sharding import num_ranks


@dataclass(frozen=True, slots=True)
class RankPlace:
    """One rank of a worker: rank = pipeline_rank * tensor_size + tensor_rank. Rank 0 plans, the others follow."""

    rank: int = 0
    sharding: Sharding = field(default_factory=Sharding)

    @property
    def num_ranks(self) -> int:
        return num_ranks(self.sharding)

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.sharding.tensor_size

    @property
    def pipeline_rank(self) -> int:
        return self.rank // self.sharding.tensor_size

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.sharding.pipeline_size - 1

    @property
    def draws(self) -> bool:
        """Whether this rank has the logits and draws the tokens."""
        return self.is_last_stage and self.tensor_rank == 0

    @property
    def drawing_rank(self) -> int:
        return (self.sharding.pipeline_size - 1) * self.sharding.tensor_size


def cut(size: int, parts: int, part: int) -> range:
    """Return one of `parts` runs of [0, size), whose lengths differ by one at most."""
    return range(size * part // parts, size * (part + 1) // parts)
