"""Which replica of a worker gets a request: a pure decision over what the worker's frontend knows of its replicas.

Everything is counted in tokens, because tokens are what a replica's time goes into:

    load = uncached prompt tokens that wait for their first output
         + REQUEST_TOKENS a live request + a CONTEXT_SHARE of its context      (what decoding costs until they end)

A request goes to the least load after it has been added; where its pages do not fit now, only if they fit nowhere.
A replica that holds the prompt's beginning is credited with the tokens that it saves, as long as what it decodes is at
most AFFINITY_REQUESTS such requests, or an AFFINITY_SHARE, above the replica that decodes least.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from tandem.core.prefix_index import Blocks, PrefixIndex, hash_blocks
from tandem.core.stats import LoadSnapshot
from tandem.core.token_ids import BYTES_PER_TOKEN

REQUEST_TOKENS = 64
CONTEXT_SHARE = 1 / 16
AFFINITY_REQUESTS = 4
AFFINITY_SHARE = 1 / 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaView:
    """One replica as the frontend sees it for one request."""

    waiting_tokens: int = 0  # uncached prompt tokens of its requests without output
    requests: int = 0  # live
    context_tokens: int = 0  # of them: prompts and output
    free_pages: int = 1 << 62  # free or evictable, less what requests without output will take
    cached_tokens: int = 0  # of this request's prompt
    placed_tokens: int = 0  # prompt tokens that it was given in its life

    @property
    def standing(self) -> float:
        """What it decodes, in tokens."""
        return standing_tokens(self.requests, self.context_tokens)

    @property
    def load(self) -> float:
        return self.waiting_tokens + self.standing


def standing_tokens(requests: int, context_tokens: int) -> float:
    """Return what so many requests with so much context cost until they end, in tokens."""
    return REQUEST_TOKENS * requests + CONTEXT_SHARE * context_tokens


def choose_replica(replicas: Sequence[ReplicaView], *, prompt_tokens: int, page_tokens: int) -> int:
    """Return the index of the replica for a prompt of this length.

    Equal ones are decided by the prompt tokens that they were ever given, then by index.
    """
    least = min(view.standing for view in replicas)
    slack = max(AFFINITY_REQUESTS * standing_tokens(1, prompt_tokens), AFFINITY_SHARE * least)

    def order(index: int) -> tuple[bool, float, int, int]:
        view = replicas[index]
        pages = -(-prompt_tokens // page_tokens) - view.cached_tokens // page_tokens
        credit = view.cached_tokens if view.standing - least <= slack else 0
        return pages > view.free_pages, view.load - credit, view.placed_tokens, index

    return min(range(len(replicas)), key=order)


@dataclass(slots=True)
class _Placed:
    """A live request. `waiting_tokens` is 0 once it has output."""

    replica: int
    prompt_tokens: int
    waiting_tokens: int
    output_tokens: int = 0


class _Replica:
    """What was sent to one replica and has not ended, and what it said about itself last."""

    def __init__(self, num_pages: int) -> None:
        self.index = PrefixIndex(num_pages)
        self.waiting_tokens = 0
        self.waiting_pages = 0
        self.requests = 0
        self.context_tokens = 0
        self.placed_tokens = 0
        self.free_pages = num_pages  # or evictable


class Balancer:
    """The frontend's ledger of live requests, by a key of the caller's, and the choice of a replica for new ones."""

    def __init__(self, num_replicas: int, *, page_tokens: int, num_pages: int, prefix_cache: bool = True) -> None:
        """`num_pages`: of each replica."""
        self._page_tokens = page_tokens
        self._prefix_cache = prefix_cache
        self._replicas = [_Replica(num_pages) for _ in range(num_replicas)]
        self._placed: dict[Hashable, _Placed] = {}

    def __len__(self) -> int:
        return len(self._placed)

    def place(self, key: Hashable, prompt_token_ids: bytes, salt: str = "", *, cacheable: bool = True) -> int:
        """Choose a replica for a request whose tokens are all given here, packed, and note it there."""
        assert key not in self._placed
        blocks: Blocks = ()
        if cacheable and self._prefix_cache:
            blocks = hash_blocks(prompt_token_ids, salt, self._page_tokens)
        prompt_tokens = len(prompt_token_ids) // BYTES_PER_TOKEN
        views = [self._view(replica, blocks) for replica in self._replicas]
        chosen = choose_replica(views, prompt_tokens=prompt_tokens, page_tokens=self._page_tokens)
        waiting = prompt_tokens - views[chosen].cached_tokens
        self._add(key, _Placed(chosen, prompt_tokens, waiting), blocks)
        return chosen

    def hold(self, key: Hashable, replica: int, prompt_token_ids: bytes) -> None:
        """Note a request that this replica has computed already, and is bound to go on with."""
        assert key not in self._placed
        self._add(key, _Placed(replica, len(prompt_token_ids) // BYTES_PER_TOKEN, 0), ())

    def replica_of(self, key: Hashable) -> int | None:
        """Return where a live request is."""
        placed = self._placed.get(key)
        return placed.replica if placed is not None else None

    def output(self, key: Hashable, num_tokens: int) -> None:
        """A request has got output: its prompt is computed."""
        placed = self._placed.get(key)
        if placed is None:
            return
        self._computed(placed)
        placed.output_tokens += num_tokens
        self._replicas[placed.replica].context_tokens += num_tokens

    def ended(self, key: Hashable) -> None:
        """A request has ended, however; unknown ones have before."""
        placed = self._placed.pop(key, None)
        if placed is None:
            return
        self._computed(placed)
        replica = self._replicas[placed.replica]
        replica.requests -= 1
        replica.context_tokens -= placed.prompt_tokens + placed.output_tokens

    def reported(self, replica: int, load: LoadSnapshot) -> None:
        """A replica has said how it is."""
        self._replicas[replica].free_pages = load.pages.free + load.pages.cached

    def views(self) -> list[ReplicaView]:
        """Return the replicas as a request sees them of whose prompt nothing is cached."""
        return [self._view(replica, ()) for replica in self._replicas]

    def _view(self, replica: _Replica, blocks: Blocks) -> ReplicaView:
        return ReplicaView(
            waiting_tokens=replica.waiting_tokens,
            requests=replica.requests,
            context_tokens=replica.context_tokens,
            free_pages=replica.free_pages - replica.waiting_pages,
            cached_tokens=replica.index.match(blocks) * self._page_tokens,
            placed_tokens=replica.placed_tokens,
        )

    def _add(self, key: Hashable, placed: _Placed, blocks: Blocks) -> None:
        self._placed[key] = placed
        replica = self._replicas[placed.replica]
        replica.requests += 1
        replica.context_tokens += placed.prompt_tokens
        replica.waiting_tokens += placed.waiting_tokens
        replica.waiting_pages += self._pages(placed)
        replica.placed_tokens += placed.prompt_tokens
        replica.index.add(blocks)

    def _computed(self, placed: _Placed) -> None:
        replica = self._replicas[placed.replica]
        replica.waiting_pages -= self._pages(placed)
        replica.waiting_tokens -= placed.waiting_tokens
        placed.waiting_tokens = 0

    def _pages(self, placed: _Placed) -> int:
        """Pages that it will take and may not have taken; cached ones are there already."""
        return -(-placed.waiting_tokens // self._page_tokens)
