"""Mixtures of experts against transformers, by every operator set."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from tandem.config import OperatorChoice
from tandem.core.messages.plans import Plan, Row
from tandem.engine.batch import build_batch
from tandem.engine.models.decoder import Decoder
from tandem.engine.models.spec import read_spec
from tandem.engine.ops.contract import Operators
from tandem.engine.ops.reference import ReferenceOperators
from tandem.engine.weights import CheckpointFiles
from tests.engine.checkpoints import VARIANTS
from tests.engine.conftest import EngineStarter
from tests.engine.ops_cpu_cases import operators
from tests.engine.test_transformers_parity import (
    NUM_NEW,
    Case,
    assert_greedy,
    case,
    driver_of,
    expected_logits,
    make_prompts,
)

__all__ = ["case"]
TOLERANCE = 1e-4  # of the largest logit

pytestmark = pytest.mark.parametrize(
    "case",
    [variant for variant in VARIANTS if "mixtral" in variant.name or "moe" in variant.name],
    indirect=True,
    ids=lambda variant: variant.name,
)
every_set = pytest.mark.parametrize("ops", [name for name in get_args(OperatorChoice) if name != "auto"])


def operators_named(name: str) -> Operators:
    return ReferenceOperators(torch.float32) if name == "reference" else operators(name.removeprefix("cpu-"), 2)


@every_set
def test_logits(case: Case, ops: str) -> None:
    chosen = operators_named(ops)
    spec = read_spec(case.folder)
    with torch.inference_mode(), CheckpointFiles(case.folder, spec) as files:
        weights = files.load(torch.float32, torch.device("cpu"), lambda _: None)
        decoder = Decoder(spec, weights.tensors, chosen)
        pool = torch.zeros(20, spec.num_layers, 2, spec.num_kv_heads, 8, spec.head_dim)
        (prompt,) = make_prompts(15)[-1:]
        row = Row(request_id=0, slot=0, start=0, num_tokens=len(prompt), token_ids=prompt, pages=(*range(19, 4, -1),))
        tokens = build_batch(Plan(0, (row,)), page_tokens=8)
        logits = decoder.logits(decoder.forward(torch.from_numpy(tokens.token_ids), tokens.batch, pool))
    expected = expected_logits(case.model, prompt)
    assert (logits - expected).abs().max() <= TOLERANCE * expected.abs().max()


@every_set
def test_greedy_tokens(case: Case, ops: str, start: EngineStarter) -> None:
    operators_named(ops)  # skips where the CPU has no such instructions
    driver = driver_of(start(case.folder, ops=ops), seed=21)
    requests = [driver.start(prompt, NUM_NEW) for prompt in make_prompts(16)[::2]]
    driver.generate(requests, NUM_NEW, chunk_max=23)
    assert_greedy(case.model, requests)
