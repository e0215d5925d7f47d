"""KvCache against a dictionary of prefixes: whatever happens, what is found is what was computed for those tokens."""

from __future__ import annotations

from collections.abc import Hashable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tandem.core.kv_cache import KvCache
from tandem.core.messages.sampling import SamplingParams
from tandem.core.request import Marks, Request
from tandem.core.states import State

SIZE = 2
NUM_PAGES = 9
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=8)
SALTS = st.sampled_from(["", "a"])
Prefix = tuple[Hashable, tuple[int, ...]]


def request_of(tokens: list[int], salt: str = "", **sampling: int) -> Request:
    return Request(
        request_id=1,
        seq=1,
        state=State.EXTENDING,
        sampling=SamplingParams(**sampling),  # type: ignore[arg-type]
        tokens=tokens,
        num_prompt=len(tokens),
        salt=salt,
        deadline=None,
        marks=Marks(arrived=0.0),
    )


class CacheMachine(RuleBasedStateMachine):
    """`model` says which page holds which prefix in the tree; `dated` is when a page was last let go of."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = KvCache(NUM_PAGES, SIZE, prefix_cache=True)
        self.model: dict[Prefix, int] = {}
        self.live: list[Request] = []
        self.dated: dict[int, int] = {}
        self.tick = 0
        self.private: list[Request] = []

    # ---- the model ------------------------------------------------------------------------------------------------

    def references(self, page: int) -> int:
        return sum(request.pages.count(page) for request in self.live)

    def longest(self, tokens: list[int], salt: str, bound: int) -> list[int]:
        pages: list[int] = []
        while (len(pages) + 1) * SIZE <= bound and (salt, tuple(tokens[: (len(pages) + 1) * SIZE])) in self.model:
            pages.append(self.model[salt, tuple(tokens[: (len(pages) + 1) * SIZE])])
        return pages

    def evict_one(self) -> bool:
        """Drop the leaf that nobody holds and that was used least recently."""
        parents = {(salt, tokens[:-SIZE]) for salt, tokens in self.model}
        leaves = [prefix for prefix, page in self.model.items() if prefix not in parents and not self.references(page)]
        if leaves:
            del self.model[min(leaves, key=lambda prefix: self.dated[self.model[prefix]])]
        return bool(leaves)

    def num_free(self) -> int:
        used = {*self.model.values(), *(page for request in self.live for page in request.pages)}
        return NUM_PAGES - len(used)

    def date(self, pages: list[int]) -> None:
        for page in reversed(pages):
            self.tick += 1
            self.dated[page] = self.tick

    # ---- what requests do -----------------------------------------------------------------------------------------

    @rule(tokens=TOKENS, salt=SALTS)
    def start(self, tokens: list[int], salt: str) -> None:
        request = request_of(tokens, salt)
        expected = self.longest(tokens, salt, len(tokens) - 1)
        assert self.kv.attach_prefix(request, len(tokens) - 1) == len(expected) * SIZE
        assert request.pages == expected
        self.live.append(request)  # holds its prefix from here on
        need = -(-len(tokens) // SIZE) - len(expected)
        unheld = sum(not self.references(page) for page in self.model.values())
        fresh = self.kv.allocate(need)
        if fresh is None:
            assert need > self.num_free() + unheld, "pages were to be had"
            self.live.remove(request)
            self.kv.detach_prefix(request)  # unused: its place in the order of eviction stays
            return
        while self.num_free() < need:
            assert self.evict_one()
        request.set_pages(request.pages + fresh)
        request.num_computed = len(expected) * SIZE

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.live))
        request.num_computed += data.draw(st.integers(0, len(request.tokens) - request.num_computed))
        self.kv.publish(request)
        for index in range(request.num_computed // SIZE):
            prefix = request.salt, tuple(request.tokens[: (index + 1) * SIZE])
            if request in self.private or self.model.setdefault(prefix, request.pages[index]) != request.pages[index]:
                self.private.append(request)  # somebody else's page: the rest of this path stays private for good
                return

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.end_of(data.draw(st.sampled_from(self.live)))

    def end_of(self, request: Request) -> None:
        self.live.remove(request)
        self.date(request.pages)
        self.kv.release_request(request)

    # ---- what always holds ----------------------------------------------------------------------------------------

    @invariant()
    def the_tree_is_the_model(self) -> None:
        """Nothing more and nothing less is cached; so nothing is ever evicted in vain, either."""
        found: dict[Prefix, int] = {}
        for node in self.kv.tree.nodes():
            tokens, walk = node.key, node
            while walk.parent is not None and walk.parent.page >= 0:
                assert walk.parent.children[walk.key] is walk
                held, above = self.kv.pool.references(walk.page), self.kv.pool.references(walk.parent.page)
                assert above or not held, "a held page under a page that may be evicted"
                walk = walk.parent
                tokens = walk.key + tokens
            assert (node.salt, tokens) not in found
            found[node.salt, tokens] = node.page
        assert found == self.model

    @invariant()
    def references_are_those_of_the_living(self) -> None:
        pool = self.kv.pool
        assert [pool.references(page) for page in range(NUM_PAGES)] == [*map(self.references, range(NUM_PAGES))]
        counts = pool.counts()
        assert counts.free == self.num_free()
        assert counts.free + counts.cached + counts.held == NUM_PAGES


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=60, stateful_step_count=40)


def test_a_path_that_is_there_already_stays_private() -> None:
    """The second of two equal prompts computed at once: its later pages must not hang below the first one's."""
    kv = KvCache(8, SIZE, prefix_cache=True)
    requests = [request_of([1, 2, 3, 4]) for _ in range(2)]
    for request in requests:
        pages = kv.allocate(2)
        assert pages is not None
        request.set_pages(pages)
    first, second = requests
    first.num_computed = 2
    kv.publish(first)
    second.num_computed = 4
    kv.publish(second)
    assert [node.page for node in kv.tree.nodes()] == first.pages[:1]
    assert not second.tree_open
    kv.release_request(second)
    assert kv.pool.counts().free == 6


def test_disabled_cache_shares_nothing() -> None:
    kv = KvCache(8, SIZE, prefix_cache=False)
    request = request_of([1, 2, 3, 4])
    request.set_pages(kv.allocate(2) or [])
    request.num_computed = 4
    kv.publish(request)
    assert len(kv.tree) == 0
    assert kv.attach_prefix(request_of([1, 2, 3, 4]), 3) == 0


def test_spare_pages_stay_free() -> None:
    kv = KvCache(8, SIZE, prefix_cache=True)
    assert kv.allocate(5, spare=4) is None
    assert kv.pool.num_free == 8
    assert kv.allocate(5, spare=3) is not None


def test_pages_that_come_back_by_themselves_are_not_lacking() -> None:
    kv = KvCache(4, SIZE, prefix_cache=True)
    request = request_of([1, 2, 3, 4])
    request.set_pages(kv.allocate(2) or [])
    request.num_computed = 2
    kv.publish(request)
    kv.pool.note_launch(1)
    kv.release_request(request)
    assert kv.allocate(3) is None, "one is cached and one is quarantined, until the launch has resolved"
    assert (kv.shortage(4), kv.shortage(4, spare=2)) == (0, 2)
    kv.pool.note_resolved(1)
    assert kv.allocate(4) is not None
    assert kv.shortage(1) == 1
