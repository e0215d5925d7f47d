"""The library's profile: time by kind adds up, it costs nothing until it is asked for, and it begins anew."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from tandem.engine.native.library import PROFILE_KINDS
from tandem.engine.ops.contract import ExpertWeights, KindTime, Routing
from tandem.engine.ops.cpu import CpuOperators
from tests.engine.ops_cpu_cases import generator, operators

ROWS, WIDTH = 48, 256


@pytest.fixture(params=[1, 3])
def cpu(request: pytest.FixtureRequest) -> Iterator[CpuOperators]:
    made = operators("avx2", request.param)
    yield made
    made.profiler.stop()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(sum(shape)))


def spent(times: tuple[KindTime, ...]) -> dict[str, KindTime]:
    assert tuple(each.kind for each in times) == PROFILE_KINDS
    assert all(0 <= each.waited_seconds <= each.seconds for each in times)
    return {each.kind: each for each in times if each.seconds > 0}


def test_each_operator_counts_as_its_kind(cpu: CpuOperators) -> None:
    linear, table = cpu.linear((random(96, WIDTH),), (None,)), cpu.embedding(random(50, WIDTH))
    inputs = random(ROWS, WIDTH)
    profiler = cpu.profiler
    profiler.start()
    linear(inputs)
    assert spent(profiler.take()).keys() == {"packing of inputs", "linear"}
    cpu.logits(linear, inputs)
    assert spent(profiler.take()).keys() == {"packing of inputs", "output head"}
    cpu.rms_norm(inputs, torch.ones(WIDTH), 1e-6)
    assert spent(profiler.take()).keys() == {"norm"}
    table(torch.arange(ROWS))
    assert spent(profiler.take()).keys() == {"embedding"}
    cpu.gate(inputs, inputs)
    assert spent(profiler.take()).keys() == {"other"}


def test_experts_are_told_from_their_router(cpu: CpuOperators) -> None:
    weights = (ExpertWeights(random(32, WIDTH), random(32, WIDTH), random(WIDTH, 32)) for _ in range(4))
    routing = Routing(experts_per_token=2, normalized=True, here=range(4))
    experts = cpu.experts(random(4, WIDTH), weights, routing)
    experts.reserve(ROWS)
    cpu.profiler.start()
    experts(random(ROWS, WIDTH))
    assert spent(cpu.profiler.take()).keys() == {"packing of inputs", "linear", "experts"}


def test_times_add_up_to_about_what_the_caller_sees(cpu: CpuOperators) -> None:
    linear, inputs = cpu.linear((random(2048, WIDTH),), (None,)), random(512, WIDTH)
    shares = []
    cpu.profiler.start()
    for _ in range(8):
        began = time.perf_counter()
        linear(inputs)
        seen = time.perf_counter() - began
        counted = sum(each.seconds for each in cpu.profiler.take())
        assert 0 < counted <= seen
        shares.append(counted / seen)
    assert max(shares) > 0.5, "a call of milliseconds is nearly all phases, unless others had the CPU each time"


def test_off_adds_nothing_up_and_a_start_begins_at_zero(cpu: CpuOperators) -> None:
    linear, inputs = cpu.linear((random(96, WIDTH),), (None,)), random(ROWS, WIDTH)
    expected = linear(inputs)
    assert not spent(cpu.profiler.take()), "it is off until it is asked for"
    cpu.profiler.start()
    assert torch.equal(linear(inputs), expected)
    cpu.profiler.stop()
    linear(inputs)
    assert spent(cpu.profiler.take()), "what was profiled is still there"
    linear(inputs)
    assert not spent(cpu.profiler.take())
    cpu.profiler.start()
    linear(inputs)
    cpu.profiler.start()
    assert not spent(cpu.profiler.take())
