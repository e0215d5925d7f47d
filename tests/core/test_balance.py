"""Which replica gets a request: the bound of affinity, bounded differences, nobody starved, ties that are the same."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tandem.core.balance import (
    AFFINITY_REQUESTS,
    AFFINITY_SHARE,
    Balancer,
    ReplicaView,
    choose_replica,
    standing_tokens,
)
from tandem.core.stats import LoadSnapshot, PageCounts
from tandem.core.token_ids import pack

PAGE = 16


def choose(*views: ReplicaView, prompt_tokens: int = 160) -> int:
    return choose_replica(views, prompt_tokens=prompt_tokens, page_tokens=PAGE)


def balancer(num_replicas: int = 2, num_pages: int = 10_000, **options: bool) -> Balancer:
    return Balancer(num_replicas, page_tokens=PAGE, num_pages=num_pages, **options)


def prompt(source: random.Random, length: int) -> bytes:
    return pack(source.randrange(1000) for _ in range(length))


def test_waiting_tokens_and_what_decodes_both_count() -> None:
    assert choose(ReplicaView(waiting_tokens=100), ReplicaView()) == 1
    assert choose(ReplicaView(requests=3), ReplicaView(requests=2)) == 1
    assert choose(ReplicaView(requests=3, context_tokens=100), ReplicaView(requests=2, context_tokens=9000)) == 0
    assert choose(ReplicaView(waiting_tokens=8000), ReplicaView(requests=100)) == 1


def test_a_replica_without_room_is_for_when_there_is_no_other() -> None:
    full, busy = ReplicaView(free_pages=9), ReplicaView(waiting_tokens=100_000, free_pages=10)
    assert choose(full, busy) == 1
    assert choose(full, ReplicaView(waiting_tokens=100_000, free_pages=9)) == 0
    assert choose(ReplicaView(free_pages=9, cached_tokens=16), busy) == 0, "a cached page needs no room"


def test_a_prefix_wins_until_more_waits_there_than_it_saves() -> None:
    assert choose(ReplicaView(), ReplicaView(cached_tokens=144, waiting_tokens=143)) == 1
    assert choose(ReplicaView(), ReplicaView(cached_tokens=144, waiting_tokens=145)) == 0


@pytest.mark.parametrize("others", [0, 3, 40])
def test_a_prefix_wins_until_its_replica_decodes_too_much_more(others: int) -> None:
    """However many tokens it saves: a beginning that all requests share must not keep them all on one replica."""
    length = 100_000
    own = standing_tokens(1, length)
    least = ReplicaView(requests=others, context_tokens=others * length)
    slack = max(AFFINITY_REQUESTS * own, AFFINITY_SHARE * least.standing)
    within = ReplicaView(context_tokens=int((least.standing + slack) * 16), cached_tokens=length - PAGE)
    beyond = ReplicaView(context_tokens=within.context_tokens + 16, cached_tokens=length - PAGE)
    assert within.load - least.load < length, "else it would lose anyway"
    assert choose(least, within, prompt_tokens=length) == 1
    assert choose(least, beyond, prompt_tokens=length) == 0


def test_ties_go_to_who_was_given_least_then_to_the_first() -> None:
    assert choose(ReplicaView(), ReplicaView(), ReplicaView()) == 0
    assert choose(ReplicaView(placed_tokens=2), ReplicaView(placed_tokens=1), ReplicaView(placed_tokens=1)) == 1
    one_by_one = balancer(3)
    chosen = []
    for number in range(9):
        chosen.append(one_by_one.place(number, prompt(random.Random(number), 40)))
        one_by_one.output(number, 5)
        one_by_one.ended(number)
    assert chosen == [0, 1, 2] * 3, "a client that sends one request at a time uses every replica's memory"


def test_a_conversation_stays_where_its_beginning_is() -> None:
    source = random.Random(3)
    both = balancer()
    talk = prompt(source, 200)
    home = both.place("first", talk)
    both.ended("first")
    for turn in range(5):
        talk += prompt(source, 40)
        assert both.place(turn, talk) == home
        both.ended(turn)
    assert both.place("salted", talk, "another tenant") != home, "salts never share pages"
    both.ended("salted")
    without = balancer(prefix_cache=False)
    assert [without.place(turn, talk) for turn in range(4)] == [0, 1, 0, 1]
    assert [both.place(turn, talk, cacheable=False) for turn in range(4)] == [1, 0, 1, 0]


def test_what_is_cached_does_not_count_as_work() -> None:
    both = balancer()
    shared = prompt(random.Random(1), 10 * PAGE)
    both.place("first", shared + prompt(random.Random(2), PAGE))
    both.output("first", 1)
    both.place("second", shared + prompt(random.Random(3), PAGE))
    assert both.replica_of("second") == 0
    assert both.views()[0].waiting_tokens == PAGE


@pytest.mark.parametrize("seed", range(20))
def test_the_difference_is_bounded(seed: int) -> None:
    """However requests come, grow and go: nobody is placed beyond the bound that is stated."""
    source = random.Random(seed)
    size = source.choice([2, 3, 8])
    replicas = balancer(size)
    shared = [prompt(source, 320) for _ in range(3)]
    live: list[int] = []
    for number in range(400):
        tokens = source.choice([b"", *shared]) + prompt(source, source.randint(1, 400))
        length = len(tokens) // 4
        before = replicas.views()
        chosen = before[replicas.place(number, tokens)]
        live.append(number)
        own = standing_tokens(1, length)
        least = min(view.standing for view in before)
        slack = max(AFFINITY_REQUESTS * own, AFFINITY_SHARE * least)
        assert chosen.load <= min(view.load for view in before) + length, "waiting pays only as far as it saves"
        if chosen.load > min(view.load for view in before):
            assert chosen.standing - least <= slack
        for one in source.sample(live, source.randint(0, min(3, len(live)))):
            replicas.output(one, source.randint(1, 20))
        if len(live) > 40 or source.random() < 0.4:
            replicas.ended(live.pop(source.randrange(len(live))))
    for one in live:
        replicas.ended(one)
    assert len(replicas) == 0
    for view in replicas.views():
        assert (view.waiting_tokens, view.requests, view.context_tokens, view.free_pages) == (0, 0, 0, 10_000)


@pytest.mark.parametrize("seed", range(10))
def test_nobody_is_starved(seed: int) -> None:
    """Under a steady load of equal requests, even all with one beginning, every replica gets about its share."""
    source = random.Random(seed)
    size = source.choice([2, 4])
    beginning = prompt(source, source.choice([0, 512]))
    replicas = balancer(size)
    got: Counter[int] = Counter()
    live: list[int] = []
    for number in range(600):
        got[replicas.place(number, beginning + prompt(source, 64))] += 1
        live.append(number)
        replicas.output(number, 1)
        if len(live) > 12 * size:
            replicas.ended(live.pop(0))
    assert min(got.values()) > 0.6 * 600 / size, got


def test_the_same_requests_go_the_same_way() -> None:
    def run() -> list[int]:
        source = random.Random(5)
        replicas = balancer(3)
        return [replicas.place(number, prompt(source, source.randint(1, 99))) for number in range(200)]

    assert run() == run()


def test_pages_are_those_reported_less_those_on_their_way() -> None:
    one = balancer(1, num_pages=100)
    one.reported(0, LoadSnapshot(pages=PageCounts(free=10, cached=20, held=60, quarantined=10, total=100)))
    assert one.views()[0].free_pages == 30
    one.place("a", prompt(random.Random(1), 5 * PAGE + 1))
    assert one.views()[0].free_pages == 24
    one.output("a", 1)
    assert one.views()[0].free_pages == 30, "from its first output on, what it holds is in the reports"


def test_a_request_that_is_bound_to_a_replica_counts_there_without_its_prompt() -> None:
    both = balancer()
    both.hold("a", 1, prompt(random.Random(1), 160))
    assert both.replica_of("a") == 1
    view = both.views()[1]
    assert (view.waiting_tokens, view.requests, view.context_tokens) == (0, 1, 160)
    assert both.place("b", prompt(random.Random(2), 10)) == 0
    both.ended("a")
    both.ended("a")
    assert both.views()[1].requests == 0
