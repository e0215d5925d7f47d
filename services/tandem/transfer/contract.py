"""What a transport is to the transfer process: an exporter and an importer. Threads belong to the transport.

Only PullEnded says that nothing more can arrive in the pages of a pull, and only `done` that nothing reads the
pages of a revoked hand-off. `done` callbacks come from any thread, never while the caller waits for one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from tandem.core.messages.handoff import RankEndpoint
from tandem.core.messages.transfer import PullEnded, RankPull, Slab, TransferOutcome
from tandem.transfer.pages import Pages

Post = Callable[[TransferOutcome], None]
PullDone = Callable[[PullEnded], None]


class Exporter(Protocol):
    """Serves announced pages. Every method returns at once and may be called from one thread at a time."""

    @property
    def endpoint(self) -> RankEndpoint: ...

    def open(self, handoff_id: bytes, attempt: int, token: bytes, pieces: Sequence[Slab]) -> None:
        """Let holders of `token` in; a lower attempt is served no longer, and a higher one stays as it is.

        `pieces` are what may be read of each page, by the number that a pull names.
        """

    def add(self, handoff_id: bytes, attempt: int, first_ordinal: int, pages: Pages) -> None:
        """Serve whole `pages` from `first_ordinal` on, if this attempt is still the one that is open."""

    def revoke(self, handoff_id: bytes, done: Callable[[], None]) -> None:
        """Serve the hand-off no longer; call `done` once no read of its pages is under way."""

    def close(self) -> None:
        """Break everything off and end the threads."""


class Importer(Protocol):
    """Pulls pages. Every method returns at once; calls come from any thread."""

    def pull(self, pull: RankPull, done: PullDone) -> None:
        """Read and verify; call `done` exactly once. A number of ordinals that does not fit `pages` is a bug."""

    def cancel(self, ticket: int) -> None:
        """Break a pull off. Its `done` still comes. Unknown tickets are ignored: they have ended."""

    def close(self) -> None:
        """Break everything off and end the threads."""
