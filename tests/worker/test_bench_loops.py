"""`tandem bench loops`: the load is served whole by both loops, the figures are what the rounds say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tandem.core.messages.requests import Ended, EndReason
from tandem.core.token_ids import unpack
from tandem.errors import ConfigError, TandemError
from tandem.worker.bench_loops import LoopsRequest, MemoryPorts, Round, bench_loops, lines_of, make_load, summary_of
from tests.fakes.device import CountingDevice

REQUEST = LoopsRequest(
    model="demo", num_threads=1, requests=5, concurrency=2, prompt_tokens=12, max_tokens=6, rounds=1, ops="reference"
)


def test_both_loops_serve_the_whole_load_alike() -> None:
    rounds = bench_loops(REQUEST, lambda text: None)
    assert [one.loop for one in rounds] == ["normal", "overlap"]
    load = make_load(REQUEST, 4096)
    for one in rounds:
        assert [len(output) for output in one.outputs] == [submit.sampling.max_tokens for submit in load]
        assert len(one.ttft) == 5 and len(one.itl) == one.output_tokens - 5
        assert 0 < one.device_seconds < one.wall_seconds and 0 < one.host_seconds < one.wall_seconds
        assert min(one.ttft) > 0
    summary = summary_of(rounds)
    assert summary["same_tokens"] is True
    assert "equal" in lines_of(summary)[-1] and "NOT" not in lines_of(summary)[-1]


def test_stages_are_a_third_loop_with_the_same_tokens() -> None:
    rounds = bench_loops(replace(REQUEST, stages=2), lambda text: None)
    assert [one.loop for one in rounds] == ["normal", "overlap", "pipelined"]
    summary = summary_of(rounds)
    assert summary["same_tokens"] is True
    assert any(line.startswith("pipelined / normal: ") for line in lines_of(summary))


def test_each_role_has_its_part_of_the_work() -> None:
    prompts, answers = make_load(REQUEST, 50, "prefill"), make_load(REQUEST, 50, "decode")
    assert {submit.sampling.max_tokens for submit in prompts} == {1}
    assert {len(unpack(submit.prompt_token_ids)) for submit in answers} == {1}
    rounds = bench_loops(replace(REQUEST, roles=("prefill", "decode")), lambda text: None)
    assert [(one.role, one.loop) for one in rounds] == [
        ("prefill", "normal"),
        ("prefill", "overlap"),
        ("decode", "normal"),
        ("decode", "overlap"),
    ]
    assert rounds[0].output_tokens == REQUEST.requests and rounds[0].prompt_tokens > rounds[2].prompt_tokens
    assert rounds[0].tokens_per_second == rounds[0].prompt_tokens / rounds[0].wall_seconds


def test_the_load_is_the_same_every_time_and_within_its_bounds() -> None:
    load = make_load(REQUEST, 50)
    assert load == make_load(REQUEST, 50)
    for submit in load:
        prompt = unpack(submit.prompt_token_ids)
        assert 6 <= len(prompt) <= 12 and max(prompt) < 50 and 3 <= submit.sampling.max_tokens <= 6


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="exceed the 2048 tokens"):
        bench_loops(LoopsRequest(model="demo", prompt_tokens=2048, num_threads=1, ops="reference"), lambda text: None)


def test_a_request_that_fails_ends_the_benchmark() -> None:
    device = CountingDevice(100)
    try:
        ports = MemoryPorts(device, make_load(REQUEST, 100), concurrency=2)
        with pytest.raises(TandemError, match="rejected"):
            ports.flush([Ended(request_id=1, reason=EndReason.REJECTED, message="no")])
    finally:
        device.close()


def round_of(loop: str, wall: float, output: int = 7) -> Round:
    return Round(
        loop="overlap" if loop == "overlap" else "normal",
        wall_seconds=wall,
        device_seconds=0.6,
        host_seconds=0.3,
        output_tokens=100,
        ttft=(0.1, 0.2),
        itl=(0.01,) * 99 + (0.5,),
        outputs=((output,),),
    )


def test_figures_are_medians_of_pairs() -> None:
    rounds = [round_of("normal", 1.0), round_of("overlap", 0.8), round_of("normal", 3.0), round_of("overlap", 1.0)]
    rounds += [round_of("normal", 1.0), round_of("overlap", 0.5)]
    summary = summary_of(rounds)
    assert summary["overlap_over_normal"] == pytest.approx(2.0)  # of 1.25, 3 and 2
    assert summary["ideal"] == pytest.approx(1.5)
    loops = summary["loops"]
    assert isinstance(loops, dict)
    assert loops["normal"]["device_idle_share"] == pytest.approx(0.4)
    assert loops["overlap"]["itl_p50"] == 0.01 and loops["overlap"]["itl_p99"] == 0.5
    assert "NOT equal" in lines_of(summary_of([*rounds[:-1], round_of("overlap", 0.5, output=8)]))[-1]
