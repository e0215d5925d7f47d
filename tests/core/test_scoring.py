"""max_tokens = 0 and prompt log-probabilities."""

from __future__ import annotations

import pytest

from tandem.config import SchedulerConfig
from tandem.core.messages.handoff import OpenStream
from tandem.core.messages.requests import Cancel, EndReason, Tokens
from tandem.core.messages.sampling import TokenLogprob
from tests.core.import_rig import ImportRig, peer
from tests.core.rig import Rig, of_type, prompt_of

PROMPT = prompt_of(11)
EXPECTED = tuple(TokenLogprob(token, None if index == 0 else -float(token)) for index, token in enumerate(PROMPT))


@pytest.mark.parametrize("budget", [1, 3, 4, 100])
def test_scoring_ends_after_the_extend(budget: int) -> None:
    rig = Rig(scheduler=SchedulerConfig(budget_tokens=budget))
    rig.submit(1, PROMPT, 0, prompt_logprobs=2)
    samples = []
    while rows := rig.plan():
        samples += [row.sample for row in rows]
        rig.resolve()
    assert set(samples) == {None}
    end = rig.ended(1)
    assert (end.reason, end.completion_tokens) == (EndReason.LENGTH, 0)
    assert end.prompt_logprobs == EXPECTED
    assert not of_type(rig.heard, Tokens)


def test_scoring_is_never_handed_off() -> None:
    rig = ImportRig()
    effects = rig.submit(1, PROMPT, 0, peers=(peer(1),))
    rig.run()
    assert not of_type(effects, OpenStream)
    assert rig.ended(1).reason is EndReason.LENGTH


@pytest.mark.parametrize("budget", [1, 3, 100])
def test_prompt_logprobs_come_once_with_the_first_token(budget: int) -> None:
    rig = Rig(scheduler=SchedulerConfig(budget_tokens=budget))
    rig.submit(1, PROMPT, 3, prompt_logprobs=0)
    rig.run()
    assert [message.prompt_logprobs for message in of_type(rig.heard, Tokens)] == [EXPECTED, (), ()]
    assert rig.ended(1).prompt_logprobs == ()


def test_prompt_logprobs_bypass_the_prefix_cache() -> None:
    rig = Rig()
    rig.submit(1, PROMPT, 1)
    rig.run()
    rig.submit(2, PROMPT, 1)
    rig.submit(3, PROMPT, 1, prompt_logprobs=0)
    rows = {row.request_id: row for row in rig.plan()}
    assert rows[2].start == 8, "the cache is there"
    assert rows[3].start == 0
    rig.run()
    assert of_type(rig.heard, Tokens)[-1].prompt_logprobs == EXPECTED


def test_a_part_of_the_prompts_logprobs_is_told_nobody() -> None:
    rig = Rig(scheduler=SchedulerConfig(budget_tokens=3))
    rig.submit(1, PROMPT, 0, prompt_logprobs=0)
    rig.step()
    rig.send(Cancel(1))
    assert rig.ended(1).prompt_logprobs == ()


def test_resumed_request_does_not_report_the_prompt_again() -> None:
    """The client has heard its log-probabilities with the first token."""
    rig = Rig(scheduler=SchedulerConfig(budget_tokens=3))
    rig.submit(1, PROMPT, 6, outputs=[7, 8, 9], prompt_logprobs=0)
    rig.run()
    assert len(rig.outputs(1)) == 3
    assert {message.prompt_logprobs for message in of_type(rig.heard, Tokens)} == {()}


def test_output_that_is_extended_after_a_hand_off_is_no_part_of_the_prompt() -> None:
    rig = ImportRig()
    rig.submit(1, PROMPT, 6, outputs=[7, 8, 9], prompt_logprobs=0, peers=(peer(1),))
    rig.receive(1, 3, 7)
    (row,) = rig.plan()
    assert (row.start, row.token_ids, row.prompt_logprobs) == (11, (7, 8, 9), None)
    rig.run()
    assert {message.prompt_logprobs for message in of_type(rig.heard, Tokens)} == {()}
