"""The mode belongs to the launch: plans build no autograd graph, gradient launches do, on one thread, in any order."""

from __future__ import annotations

import select
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tandem.engine.cpu as cpu
from tandem.core.messages.plans import Plan, Row, Sample
from tandem.core.messages.sampling import SamplingParams
from tandem.engine.cpu import CpuDevice
from tandem.engine.device import DeviceFailed, GradientsResolved, GradientWork
from tandem.engine.runner import PlanRunner
from tests.engine.checkpoints import VARIANTS, write_checkpoint
from tests.engine.conftest import EngineStarter
from tests.engine.driver import WAIT_SECONDS, take

LLAMA = VARIANTS[0]


def prompt_plan(number: int) -> Plan:
    sample = Sample(params=SamplingParams(temperature=0.0), output_index=0)
    row = Row(request_id=0, slot=0, start=0, num_tokens=3, token_ids=(1, 2, 3), pages=(0,), sample=sample)
    return Plan(number, (row,))


def gradients(device: CpuDevice) -> GradientsResolved:
    while True:
        (*_, done) = (None, *device.gradients_resolved())
        if done is not None:
            return done
        assert select.select([device], [], [], WAIT_SECONDS)[0], "the device does not answer"
        assert device.resolved() == []


def watched(runner: PlanRunner, seen: list[torch.Tensor]) -> None:
    """Multiply the residual by a parameter, as an adapter would, and keep what comes out."""
    decoder: Any = runner._decoder
    run_layers: Callable[..., None] = decoder.run_layers
    scale = torch.nn.Parameter(torch.ones(1))

    def with_parameter(residual: torch.Tensor, *others: Any) -> None:
        run_layers(residual, *others)
        seen.append(residual * scale)

    decoder.run_layers = with_parameter


def interleave(device: CpuDevice) -> list[torch.Tensor]:
    """Plan, gradient launch, plan, on one device. Returns what the plans computed."""
    runner: PlanRunner = device._runner
    seen: list[torch.Tensor] = []
    watched(runner, seen)
    weight = torch.ones(3, requires_grad=True)

    def square() -> torch.Tensor:
        (weight * weight).sum().backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        return weight.grad

    device.launch(prompt_plan(1))
    first = take(device, 1)[0].rows
    device.launch_gradients(GradientWork(square))
    done = gradients(device)
    assert done.error is None and torch.equal(done.value, torch.full((3,), 2.0))  # type: ignore[arg-type]
    device.launch(prompt_plan(2))
    assert take(device, 1)[0].rows == first
    return seen


def check_no_graph(computed: list[torch.Tensor]) -> None:
    assert computed
    for tensor in computed:
        assert tensor.is_inference() and not tensor.requires_grad and tensor.grad_fn is None


@pytest.fixture
def device(start: EngineStarter, tmp_path: Path) -> CpuDevice:
    write_checkpoint(LLAMA, tmp_path)
    found = start(tmp_path).device
    assert isinstance(found, CpuDevice)
    return found


def test_plans_build_no_graph_whatever_is_launched_between_them(device: CpuDevice) -> None:
    check_no_graph(interleave(device))


@pytest.mark.parametrize("planted", [torch.enable_grad, torch.no_grad])
def test_the_check_sees_a_plan_in_the_wrong_mode(
    device: CpuDevice, monkeypatch: pytest.MonkeyPatch, planted: Callable[[], Any]
) -> None:
    """With a pool made outside of inference mode; torch itself refuses other tensors that were made inside of it."""
    monkeypatch.setattr(cpu, "inference_launch", planted)
    runner: PlanRunner = device._runner
    runner._pool, runner._last_tokens = runner._pool.clone(), runner._last_tokens.clone()
    with pytest.raises((AssertionError, DeviceFailed)):
        check_no_graph(interleave(device))


def test_a_failed_gradient_launch_is_its_own_affair(device: CpuDevice) -> None:
    def fail() -> None:
        raise ValueError("out of luck")

    device.launch_gradients(GradientWork(fail))
    assert str(gradients(device).error) == "out of luck"
    device.launch(prompt_plan(1))
    assert len(take(device, 1)) == 1


@pytest.mark.parametrize("ops", ["auto", "reference"])
def test_torch_has_one_thread_beside_operators_that_have_their_own(
    start: EngineStarter, tmp_path: Path, ops: str
) -> None:
    """For plans. Gradients are torch's alone, and get all of them."""
    write_checkpoint(LLAMA, tmp_path)
    device = start(tmp_path, ops=ops, threads=3).device
    assert isinstance(device, CpuDevice)
    runner: Any = device._runner
    run, seen = runner.run, []

    def counting(plan: Plan) -> object:
        seen.append(torch.get_num_threads())
        return run(plan)

    runner.run = counting
    device.launch(prompt_plan(1))
    take(device, 1)
    device.launch_gradients(GradientWork(torch.get_num_threads))
    assert gradients(device).value == 3
    device.launch(prompt_plan(2))
    take(device, 1)
    packs = runner._decoder._operators.packs_weights
    assert seen == [1, 1] if packs else [3, 3]
