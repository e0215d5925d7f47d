"""What ends a request: EOS, stop tokens, lengths; and what a resumed request brings along."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.core.messages.requests import EndReason, Tokens
from tests.core.import_rig import ImportRig, peer
from tests.core.rig import EOS, Rig, of_type


def finish(script: list[int], max_tokens: int = 8, **sampling: Any) -> Rig:
    rig = Rig()
    rig.script[1] = script
    rig.submit(1, 5, max_tokens, **sampling)
    rig.run()
    return rig


def check(rig: Rig, outputs: list[int], reason: EndReason, stop_token_id: int | None = None) -> None:
    assert rig.outputs(1) == outputs
    end = rig.ended(1)
    assert (end.reason, end.stop_token_id) == (reason, stop_token_id)
    assert (end.prompt_tokens, end.completion_tokens) == (5, len(outputs))
    assert rig.num_free == rig.settings.num_pages


def test_eos() -> None:
    check(finish([7, EOS, 9]), [7, EOS], EndReason.STOP, EOS)


def test_stop_token() -> None:
    check(finish([7, 8, 9], stop_token_ids=(8, 50)), [7, 8], EndReason.STOP, 8)


def test_ignore_eos_is_about_eos_only() -> None:
    check(finish([7, EOS, 9, 8], ignore_eos=True, stop_token_ids=(8,)), [7, EOS, 9, 8], EndReason.STOP, 8)


def test_max_tokens() -> None:
    check(finish([7, 8, 9], 2), [7, 8], EndReason.LENGTH)


def test_a_stop_at_the_last_token_is_a_stop() -> None:
    check(finish([7, EOS], 2), [7, EOS], EndReason.STOP, EOS)


def test_the_context_ends_a_request() -> None:
    rig = Rig(max_context_tokens=8)
    rig.submit(1, 5, 100)
    rig.run()
    check(rig, [10, 11, 12], EndReason.LENGTH)


def banned_by_index(rig: Rig, request_id: int, num_outputs: int) -> list[tuple[int, ...]]:
    banned: list[tuple[int, ...]] = []
    while len(banned) < num_outputs:
        samples = [row.sample for row in rig.plan() if row.request_id == request_id and row.sample is not None]
        assert [sample.output_index for sample in samples] == [len(banned)]
        banned += [sample.banned for sample in samples]
        rig.resolve()
    return banned


def test_min_tokens_bans_ends_below_that_index() -> None:
    """`Sample.banned`: EOS and stop tokens while output_index < min_tokens."""
    rig = Rig()
    rig.submit(1, 5, 5, min_tokens=3, stop_token_ids=(50,))
    assert banned_by_index(rig, 1, 5) == [(50, EOS)] * 3 + [()] * 2


def test_min_tokens_with_ignored_eos_bans_stop_tokens_only() -> None:
    rig = Rig()
    rig.submit(1, 5, 3, min_tokens=2, stop_token_ids=(50,), ignore_eos=True)
    assert banned_by_index(rig, 1, 3) == [(50,), (50,), ()]


def test_an_end_token_below_min_tokens_does_not_end() -> None:
    check(finish([EOS, EOS, EOS, EOS, 9], min_tokens=3), [EOS] * 4, EndReason.STOP, EOS)


def test_min_tokens_equal_to_max_tokens_ends_by_length() -> None:
    check(finish([EOS, EOS, EOS], 3, min_tokens=3), [EOS] * 3, EndReason.LENGTH)


def test_resumed_request_goes_on_at_its_index() -> None:
    rig = Rig()
    rig.submit(1, 5, 4, outputs=[90, 91])
    rig.run()
    tokens = of_type(rig.heard, Tokens)
    assert [(message.first_index, message.token_ids) for message in tokens] == [(2, (12,)), (3, (13,))]
    assert rig.ended(1).completion_tokens == 4


@pytest.mark.parametrize(
    ("outputs", "sampling", "reason", "stop"),
    [
        ([7, EOS], {}, EndReason.STOP, EOS),
        ([7, 50], {"stop_token_ids": (50,)}, EndReason.STOP, 50),
        ([7, 8, 9, 9], {}, EndReason.LENGTH, None),
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_resumed_request_that_is_at_its_end_ends_at_once(
    outputs: list[int], sampling: dict[str, Any], reason: EndReason, stop: int | None, named: bool
) -> None:
    rig = ImportRig()
    effects = rig.submit(1, 5, 4, outputs=outputs, peers=(peer(1),) if named else (), **sampling)
    end = rig.ended(1)
    assert effects == [end]
    assert (end.reason, end.stop_token_id, end.completion_tokens) == (reason, stop, len(outputs))
    assert rig.plan() == ()


def test_resumed_request_that_fills_the_context_ends_at_once() -> None:
    """Its last worker died between the last token and the end."""
    rig = Rig(max_context_tokens=8)
    rig.submit(1, 5, 100, outputs=[7, 8, 9])
    assert rig.ended(1).reason is EndReason.LENGTH
