"""The decoder against transformers on the same random checkpoint, for every architecture and what it can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from tandem.config import OperatorChoice
from tandem.core.messages.plans import Plan, Row
from tandem.engine.batch import build_batch
from tandem.engine.models.decoder import Decoder
from tandem.engine.models.spec import read_spec
from tandem.engine.ops.contract import Operators
from tandem.engine.ops.reference import ReferenceOperators
from tandem.engine.start import Engine
from tandem.engine.weights import CheckpointFiles
from tests.engine.checkpoints import VARIANTS, VOCABULARY, Variant, write_checkpoint
from tests.engine.conftest import EngineStarter
from tests.engine.driver import PlanDriver, Running
from tests.engine.ops_cpu_cases import operators

LOGITS_TOLERANCE = 2e-5  # of the largest logit; what is promised is 1e-4
NEAR_TIE = 1e-4  # of the largest logit, between the best and the second token: nothing is compared from there on
NUM_NEW = 64
PROMPT_LENGTHS = (1, 3, 5, 16, 20, 37, 70)

every_set = pytest.mark.parametrize("ops", [choice for choice in get_args(OperatorChoice) if choice != "auto"])


@dataclass
class Case:
    folder: Path
    model: Any
    variant: Variant


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant.name)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    variant: Variant = request.param
    folder = tmp_path_factory.mktemp(variant.name)
    return Case(folder, write_checkpoint(variant, folder), variant)


def make_prompts(seed: int) -> list[tuple[int, ...]]:
    generator = np.random.default_rng(seed)
    return [tuple(generator.integers(0, VOCABULARY, length).tolist()) for length in PROMPT_LENGTHS]


def expected_logits(model: Any, token_ids: tuple[int, ...]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0].float()
    return logits


def num_identical(model: Any, request: Running) -> int:
    """Check a greedy continuation up to its first near-tie, and return how many tokens were checked.

    By induction over one forward pass: each output must be the best continuation of what is before it.
    """
    assert len(request.output) == NUM_NEW
    logits = expected_logits(model, request.known[:-1])[len(request.prompt) - 1 :]
    best, second = logits.topk(2, dim=-1).values.unbind(dim=-1)
    near_ties = ((best - second) / logits.abs().max() < NEAR_TIE).nonzero()[:, 0].tolist()
    count = near_ties[0] if near_ties else NUM_NEW
    assert logits.argmax(dim=-1).tolist()[:count] == request.output[:count]
    return count


def assert_greedy(model: Any, requests: list[Running]) -> None:
    """All continuations are transformers' own, and most tokens were not behind a near-tie."""
    counts = [num_identical(model, request) for request in requests]
    assert sum(counts) >= 0.6 * NUM_NEW * len(requests), f"too many near-ties: {counts}"
    assert NUM_NEW in counts


def operators_of(ops: OperatorChoice) -> Operators:
    """The operator set of a name; skips if this CPU does not run it."""
    if ops == "reference":
        return ReferenceOperators(torch.float32)
    return operators(ops.removeprefix("cpu-"))


def driver_of(engine: Engine, seed: int) -> PlanDriver:
    layout = engine.layout
    return PlanDriver(engine.device, num_pages=layout.num_pages, page_tokens=layout.page_tokens, seed=seed)


@every_set
def test_prefill_logits(case: Case, ops: OperatorChoice) -> None:
    spec = read_spec(case.folder)
    with torch.inference_mode(), CheckpointFiles(case.folder, spec) as files:
        weights = files.load(torch.float32, torch.device("cpu"), lambda _: None)
        decoder = Decoder(spec, weights.tensors, operators_of(ops))
        pool = torch.full((20, spec.num_layers, 2, spec.num_kv_heads, 8, spec.head_dim), 1e3)
        (prompt,) = make_prompts(5)[-1:]
        row = Row(request_id=0, slot=0, start=0, num_tokens=len(prompt), token_ids=prompt, pages=(*range(19, 4, -1),))
        tokens = build_batch(Plan(0, (row,)), page_tokens=8)
        logits = decoder.logits(decoder.forward(torch.from_numpy(tokens.token_ids), tokens.batch, pool))
    expected = expected_logits(case.model, prompt)
    assert (logits - expected).abs().max() <= LOGITS_TOLERANCE * expected.abs().max()


@every_set
def test_greedy_continuation_of_mixed_batches(case: Case, start: EngineStarter, ops: OperatorChoice) -> None:
    operators_of(ops)
    driver = driver_of(start(case.folder, ops=ops), seed=11)
    requests = [driver.start(prompt, NUM_NEW) for prompt in make_prompts(6)]
    driver.generate(requests, NUM_NEW, chunk_max=23)
    assert_greedy(case.model, requests)
    seen = {token for request in requests for token in request.output}
    assert len(seen) > VOCABULARY // 10, "a model that repeats itself tests little"


def test_prefix_of_another_request(case: Case, start: EngineStarter) -> None:
    driver = driver_of(start(case.folder), seed=12)
    *_, third, other, first = make_prompts(7)
    donor = driver.start(first, NUM_NEW)
    driver.generate([donor], 3, chunk_max=23)
    shared = donor.pages[: len(first) // driver.page_tokens]
    full_hit = driver.start(first, NUM_NEW, shared=shared)
    longer = driver.start(first[: 4 * driver.page_tokens] + other, NUM_NEW, shared=shared[:4])
    briefer = driver.start(first[: 2 * driver.page_tokens] + third, NUM_NEW, shared=shared[:2])
    unrelated = driver.start(third, NUM_NEW)
    driver.generate([longer, donor, full_hit, briefer, unrelated], NUM_NEW, chunk_max=9)
    assert_greedy(case.model, [donor, full_hit, longer, briefer, unrelated])
