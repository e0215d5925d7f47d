"""Decode's side of a hand-off that goes well: what is opened, pulled, forwarded and released."""

from __future__ import annotations

import pytest

from tandem.config import HandoffConfig
from tandem.core.messages.handoff import OpenStream, ReleaseReason, SendRelease
from tandem.core.messages.requests import Ended, EndReason, Tokens
from tandem.core.messages.sampling import TokenLogprob
from tandem.core.messages.transfer import CancelPull, Pull
from tandem.core.states import State
from tandem.core.token_ids import unpack
from tests.core.import_rig import ENDPOINT, ImportRig, peer
from tests.core.rig import of_type, one, prompt_of


def submitted(length: int = 10, max_tokens: int = 4, **values: object) -> ImportRig:
    rig = ImportRig()
    rig.submit(1, length, max_tokens, peers=(peer(1), peer(2)), **values)  # type: ignore[arg-type]
    return rig


def test_open_carries_the_request() -> None:
    rig = submitted(10, timeout=5.0, salt="tenant", seed=7)
    effect = one(rig.heard, OpenStream)
    opened = effect.open
    assert (effect.address, effect.instance_id) == ("prefill-1", peer(1).instance_id)
    assert (opened.handoff_id, opened.attempt) == (peer(1).handoff_id, 1 << 32 | 1)
    assert unpack(opened.prompt_token_ids) == prompt_of(10)
    assert (opened.output_tokens, opened.tokens_held) == (0, 0)
    assert (opened.sampling.seed, opened.cache_salt, opened.timeout_seconds) == (7, "tenant", 5.0)
    assert (opened.fingerprint, opened.numerics, opened.importer_instance_id) == ("model", "exact", b"me")
    assert (opened.transports, opened.checksums) == (("tcp",), ("xxh3-64",))
    assert rig.request(1).state is State.AWAITING


def test_pages_are_reserved_when_there_is_something_to_read() -> None:
    rig = submitted()
    rig.accept(1)
    assert rig.scheduler.kv.pool.num_free == 32
    effects = rig.announce(1, 0, 1)
    assert rig.request(1).state is State.RECEIVING
    assert rig.scheduler.kv.pool.num_free == 29, "all pages of the prompt"
    pull = one(effects, Pull)
    assert (pull.ordinals, pull.attempt, pull.token) == ((0,), 1 << 32 | 1, b"token-1")
    assert (pull.endpoints, pull.handoff_id) == ((ENDPOINT,), peer(1).handoff_id)
    assert pull.checksums == (1000).to_bytes(8, "little")
    assert pull.pages == (rig.request(1).pages[0],)


def test_later_chunks_are_pulled_while_earlier_ones_are_read() -> None:
    rig = submitted()
    rig.accept(1)
    rig.announce(1, 0, 1)
    assert one(rig.announce(1, 1, 2), Pull).ordinals == (1, 2)
    assert len(rig.pulls) == 2


def test_a_pull_is_bounded() -> None:
    rig = ImportRig(handoff=HandoffConfig(pull_pages_max=2))
    rig.submit(1, 20, peers=(peer(1),))
    rig.accept(1)
    assert [pull.ordinals for pull in of_type(rig.announce(1, 0, 5), Pull)] == [(0, 1), (2, 3), (4,)]


def test_the_first_token_is_forwarded_before_the_pages_land() -> None:
    rig = submitted()
    rig.accept(1)
    (pull,) = of_type(rig.announce(1, 0, 3), Pull)
    logprob = TokenLogprob(50, -0.5)
    tokens = one(rig.first_token(1, 50, logprob=logprob, cached_tokens=4), Tokens)
    assert (tokens.first_index, tokens.token_ids, tokens.logprobs) == (0, (50,), (logprob,))
    assert rig.request(1).state is State.RECEIVING
    assert rig.plan() == ()
    assert one(rig.pull_ended(pull), SendRelease) == SendRelease(1, ReleaseReason.DONE)
    assert rig.request(1).state is State.DECODING


def test_the_first_token_is_never_sampled_again() -> None:
    rig = submitted()
    rig.receive(1, 3, 50)
    (row,) = rig.plan()
    assert (row.start, row.num_tokens, row.token_ids) == (10, 1, (50,))
    assert row.sample is not None
    assert row.sample.output_index == 1
    rig.run()
    assert rig.outputs(1) == [50, 11, 12, 13]
    end = rig.ended(1)
    assert (end.reason, end.completion_tokens) == (EndReason.LENGTH, 4)
    assert (end.timing.prefill_worker, end.timing.transport, end.timing.transfer_bytes) == ("prefill-1", "tcp", 300)
    assert rig.num_free == 32


def test_pages_may_land_before_the_first_token() -> None:
    rig = submitted()
    rig.accept(1)
    for pull in of_type(rig.announce(1, 0, 3), Pull):
        assert not of_type(rig.pull_ended(pull), SendRelease)
    assert rig.request(1).state is State.RECEIVING
    effects = rig.first_token(1, 50)
    assert [type(effect) for effect in effects] == [Tokens, SendRelease]
    assert rig.request(1).state is State.DECODING


@pytest.mark.parametrize("received", [False, True])
def test_a_request_that_ends_with_its_first_token_needs_no_pages(received: bool) -> None:
    rig = submitted(max_tokens=1)
    rig.accept(1)
    (pull,) = of_type(rig.announce(1, 0, 3), Pull) if received else (None,)
    effects = rig.first_token(1, 50)
    assert one(effects, SendRelease) == SendRelease(1, ReleaseReason.DONE)
    assert one(effects, Ended).reason is EndReason.LENGTH
    assert rig.outputs(1) == [50]
    if pull is not None:
        assert one(effects, CancelPull).ticket == pull.ticket
        assert rig.scheduler.kv.pool.counts().quarantined == 3
        assert not rig.scheduler.idle, "a read is under way"
        rig.pull_ended(pull)
    assert rig.scheduler.idle
    assert rig.num_free == 32


def test_received_pages_enter_the_prefix_tree() -> None:
    rig = submitted()
    rig.receive(1, 3, 50)
    assert len(rig.scheduler.kv.tree) == 2, "full pages only"


def test_pages_of_other_numerics_serve_their_own_request_only() -> None:
    rig = submitted(10, 8)
    rig.accept(1, numerics="other")
    rig.announce(1, 0, 3)
    rig.first_token(1, 50)
    rig.pull_ended(rig.pulls[0])
    rig.run()
    assert len(rig.outputs(1)) == 8
    assert len(rig.scheduler.kv.tree) == 0, "nor do pages that were computed on top of them"
    (figures,) = rig.scheduler.load(0.0).peers
    assert (figures.numerics, figures.differing) == ("other", 1)
    rig.submit(2, prompt_of(10), peers=(peer(1),))
    rig.accept(2)
    (figures,) = rig.scheduler.load(0.0).peers
    assert (figures.numerics, figures.differing) == ("exact", 0), "what a peer said last counts"


def test_prompt_logprobs_come_from_the_peer() -> None:
    rig = submitted(prompt_logprobs=0)
    logprobs = tuple(TokenLogprob(token, -1.0) for token in prompt_of(10))
    rig.accept(1)
    assert one(rig.first_token(1, 50, prompt_logprobs=logprobs), Tokens).prompt_logprobs == logprobs
    rig.announce(1, 0, 3)
    rig.pull_ended(rig.pulls[0])
    rig.run()
    assert [message.prompt_logprobs for message in of_type(rig.heard, Tokens)][1:] == [(), (), ()]


# ---- resumed requests ---------------------------------------------------------------------------------------------


def test_resumed_request_opens_with_its_output() -> None:
    rig = ImportRig()
    rig.submit(1, 6, 8, outputs=[90, 91], peers=(peer(1, attempt=3, output_tokens=2),))
    opened = rig.streams[0].open
    assert unpack(opened.prompt_token_ids) == [*prompt_of(6), 90, 91]
    assert (opened.output_tokens, opened.attempt) == (2, 3 << 32 | 1)
    tokens = one(rig.receive(1, 2, 50), Tokens)
    assert (tokens.first_index, tokens.token_ids) == (2, (50,))


def test_the_known_first_token_of_a_later_attempt_is_compared_and_ignored() -> None:
    """The client has it since the first attempt, on a worker that died."""
    rig = ImportRig()
    rig.submit(1, 10, 4, outputs=[50], peers=(peer(1, attempt=2),))
    assert unpack(rig.streams[0].open.prompt_token_ids) == prompt_of(10)
    assert not of_type(rig.receive(1, 3, 50), Tokens)
    assert rig.scheduler.load(0.0).first_token_differences == 0
    assert rig.request(1).state is State.DECODING
    rig.run()
    assert rig.outputs(1) == [11, 12, 13]


def test_another_first_token_than_the_known_one_is_counted() -> None:
    rig = ImportRig()
    rig.submit(1, 10, 4, outputs=[50], peers=(peer(1, attempt=2),))
    rig.receive(1, 3, 51)
    assert rig.scheduler.load(0.0).first_token_differences == 1
    (row,) = rig.plan()
    assert row.token_ids == (50,)


@pytest.mark.parametrize("num_known", [2, 3, 6, 9])
def test_output_beyond_the_first_open_is_extended_here(num_known: int) -> None:
    """10 prompt tokens fill 2.5 of the 3 pages that the peer hands over; the known output may need more."""
    known = list(range(90, 90 + num_known))
    rig = ImportRig()
    rig.submit(1, 10, 12, outputs=known, peers=(peer(1, attempt=2),))
    assert unpack(rig.streams[0].open.prompt_token_ids) == prompt_of(10)
    rig.receive(1, 3, known[0])
    assert rig.request(1).state is State.EXTENDING
    (row,) = rig.plan()
    assert (row.start, row.token_ids) == (10, tuple(known))
    assert row.sample is not None
    assert row.sample.output_index == num_known
    rig.run()
    assert rig.outputs(1) == [10 + index for index in range(num_known, 12)]
    assert rig.num_free == 32


def test_a_first_token_that_is_no_known_output_yet_counts_from_the_open() -> None:
    rig = ImportRig()
    rig.submit(1, 6, 8, outputs=[90, 91, 92], peers=(peer(1, attempt=2, output_tokens=2),))
    rig.receive(1, 2, 92)
    assert not rig.outputs(1)
    rig.run()
    assert rig.outputs(1) == [13, 14, 15, 16, 17]
