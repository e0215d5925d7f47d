"""bfloat16: weights widened blockwise, bfloat16 products, and which of them is chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tandem.engine.ops import choice as choice_module
from tandem.engine.ops import reference
from tandem.engine.ops.reference import PlainLinear, ReferenceOperators, WideningLinear
from tandem.engine.start import Engine
from tests.engine.checkpoints import VARIANTS, VOCABULARY, write_checkpoint
from tests.engine.conftest import EngineStarter
from tests.engine.driver import PlanDriver, Running

VARIANT = next(variant for variant in VARIANTS if variant.name == "qwen2")
PROMPT = tuple(np.random.default_rng(2).integers(0, VOCABULARY, 60).tolist())
# bfloat16 keeps 8 bits. Keys and values pass through it either way, activations only with bfloat16 products.
TOLERANCES = {False: 0.04, True: 0.12}  # of the largest log-probability's size


@pytest.mark.parametrize("num_tokens", [1, 5, 64])
def test_widened_linear_is_exact_in_float32(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that do not divide the rows, several weights side by side, biases."""
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 20 * 33)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, 33, generator=generator).bfloat16() for size in (50, 7, 16)]
    biases = [torch.randn(50, generator=generator).bfloat16(), None, torch.randn(16, generator=generator).bfloat16()]
    inputs = torch.randn(num_tokens, 33, generator=generator)
    linear = ReferenceOperators(torch.float32).linear(weights, biases)
    assert isinstance(linear, WideningLinear)
    whole = torch.cat(weights).double()
    bias = torch.cat([torch.zeros(7) if each is None else each.float() for each in biases]).double()
    expected = inputs.double() @ whole.t() + bias
    result = linear(inputs)
    assert result.dtype == torch.float32
    assert (result - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_weights_of_the_activations_type_are_not_widened() -> None:
    weight = torch.ones(4, 4, dtype=torch.bfloat16)
    assert isinstance(ReferenceOperators(torch.bfloat16).linear([weight], [None]), PlainLinear)


@pytest.mark.parametrize("has_instructions", [False, True])
@pytest.mark.parametrize("checkpoint_dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_close_to_float32(
    tmp_path: Path,
    start: EngineStarter,
    monkeypatch: pytest.MonkeyPatch,
    has_instructions: bool,
    checkpoint_dtype: torch.dtype,
) -> None:
    """Both ways are forced, so that every machine tests both. The weights themselves are exact in either type."""
    monkeypatch.setattr(choice_module, "has_bf16_instructions", lambda: has_instructions)
    model = write_checkpoint(VARIANT, tmp_path, dtype=checkpoint_dtype)
    engine = start(tmp_path)
    assert engine.layout.dtype == "bfloat16"
    assert engine.weight_bytes < 2.3 * sum(p.numel() for p in model.parameters())
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor([PROMPT])).logits[0], dim=-1)
    request, logprobs = score(engine)
    errors = [abs(value - float(expected[i, PROMPT[i + 1]])) for i, value in enumerate(logprobs)]
    assert max(errors) < TOLERANCES[has_instructions] * float(expected.abs().max())
    assert max(errors) > 0, "bfloat16 has not been used at all"
    assert request.computed == len(PROMPT)


def score(engine: Engine) -> tuple[Running, list[float]]:
    """Log-probabilities of the prompt, computed in chunks over the pool."""
    driver = PlanDriver(engine.device, num_pages=engine.layout.num_pages, page_tokens=engine.layout.page_tokens)
    request = driver.start(PROMPT, 1)
    logprobs: list[float] = []
    for num_tokens in (17, 1, 30, 12):
        following = PROMPT[request.computed + num_tokens :][:1]
        row = replace(driver.row(request, num_tokens), prompt_logprobs=0, next_token_id=(*following, None)[0])
        (result,) = driver.execute([row])
        logprobs += [float(entry.logprob or 0.0) for entry in result.prompt_logprobs]
        request.computed += num_tokens
    return request, logprobs


def test_configured_dtype_wins(tmp_path: Path, start: EngineStarter) -> None:
    write_checkpoint(VARIANT, tmp_path, dtype=torch.bfloat16)
    assert start(tmp_path, dtype="float32").layout.dtype == "float32"
    assert start(tmp_path).layout.dtype == "bfloat16"


def test_workers_with_and_without_instructions_pair(
    tmp_path: Path, start: EngineStarter, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(VARIANT, tmp_path, dtype=torch.bfloat16)
    fingerprints = set()
    for has_instructions in (False, True):
        monkeypatch.setattr(choice_module, "has_bf16_instructions", lambda known=has_instructions: known)
        fingerprints.add(start(tmp_path).fingerprint)
    assert len(fingerprints) == 1
