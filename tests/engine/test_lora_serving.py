"""Adapters against PEFT on the same checkpoint, and what they may not change: everybody else's bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tandem.core.messages.plans import Row
from tandem.core.messages.sampling import SamplingParams, TokenLogprob
from tandem.engine.start import Engine
from tests.engine.adapters_made import ALL, write_peft_adapter
from tests.engine.checkpoints import VARIANTS, VOCABULARY, Variant, write_checkpoint
from tests.engine.conftest import EngineStarter
from tests.engine.driver import PlanDriver, Running

NUM_NEW = 12
SCORED = SamplingParams(temperature=0.0, logprobs=3)
NAMES = ("code", "chat")
CHOSEN = [variant for variant in VARIANTS if variant.name in ("llama_biased", "qwen2", "qwen3", "mistral")]
# Adapters of the two names: all linears with rsLoRA, and only some of them.
SETTINGS: tuple[dict[str, Any], ...] = (
    {"targets": ALL, "rank": 8, "alpha": 12, "use_rslora": True},
    {"targets": ("k_proj", "up_proj", "o_proj"), "rank": 3, "alpha": 6},
)


@dataclass
class Case:
    folder: Path
    models: dict[str, Any]  # by adapter name; "" is the base
    adapters: tuple[str, ...]


@pytest.fixture(scope="module", params=CHOSEN, ids=lambda variant: variant.name)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    variant: Variant = request.param
    folder = tmp_path_factory.mktemp(variant.name)
    models = {"": write_checkpoint(variant, folder)}
    entries = []
    for number, (name, settings) in enumerate(zip(NAMES, SETTINGS, strict=True)):
        place = tmp_path_factory.mktemp(f"{variant.name}-{name}")
        models[name] = write_peft_adapter(models[""], place, seed=number, **settings)
        entries.append(f"{name}={place}")
    return Case(folder, models, tuple(entries))


class AdapterDriver(PlanDriver):
    """Gives each request's rows the adapter that its number stands for."""

    def __init__(self, engine: Engine, seed: int) -> None:
        layout = engine.layout
        super().__init__(engine.device, num_pages=layout.num_pages, page_tokens=layout.page_tokens, seed=seed)
        self.digests = {"": ""} | {adapter.name: adapter.digest for adapter in engine.lora.adapters}
        self.adapter_of: dict[int, str] = {}
        self.logprobs: dict[int, list[TokenLogprob]] = {}

    def begin(self, prompt: tuple[int, ...], adapter: str) -> Running:
        request = self.start(prompt, NUM_NEW, params=SCORED)
        self.adapter_of[request.number] = adapter
        return request

    def row(self, request: Running, num_tokens: int, *, unseen: bool = False, zero_tail: bool = False) -> Row:
        row = super().row(request, num_tokens, unseen=unseen, zero_tail=zero_tail)
        return replace(row, adapter=self.digests[self.adapter_of[request.number]])

    def execute(self, rows: Any) -> Any:
        results = super().execute(rows)
        for row, result in zip(rows, results, strict=True):
            if result.logprob is not None:
                self.logprobs.setdefault(row.request_id, []).append(result.logprob)
        return results


def prompts(seed: int) -> list[tuple[int, ...]]:
    generator = np.random.default_rng(seed)
    return [tuple(generator.integers(0, VOCABULARY, length).tolist()) for length in (5, 19, 33)]


def assert_as_peft(model: Any, request: Running, logprobs: list[TokenLogprob]) -> None:
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([request.known[:-1]])).logits[0].float()[len(request.prompt) - 1 :]
    expected = logits.log_softmax(dim=-1)
    for position, (token, described) in enumerate(zip(request.output, logprobs, strict=True)):
        assert described.logprob == pytest.approx(float(expected[position, token]), abs=2e-4)
        best = float(expected[position].max())
        assert float(expected[position, token]) > best - 1e-3, "not the greedy token"


def test_mixed_batches_equal_peft(case: Case, start: EngineStarter) -> None:
    """Several adapters and none in one batch, in chunks and single tokens."""
    driver = AdapterDriver(start(case.folder, adapters=case.adapters), seed=3)
    requests = [driver.begin(prompt, adapter) for adapter in ("", *NAMES) for prompt in prompts(4)]
    driver.generate(requests, NUM_NEW, chunk_max=13)
    for request in requests:
        adapter = driver.adapter_of[request.number]
        assert_as_peft(case.models[adapter], request, driver.logprobs[request.number])
    outputs = {tuple(request.output) for request in requests}
    assert len(outputs) == len(requests), "adapters that change nothing test nothing"


def alone(engine: Engine, prompt: tuple[int, ...], adapter: str) -> tuple[list[int], list[TokenLogprob]]:
    driver = AdapterDriver(engine, seed=8)
    request = driver.begin(prompt, adapter)
    driver.generate([request], NUM_NEW, chunk_max=len(prompt))
    return request.output, driver.logprobs[request.number]


def test_bits_do_not_depend_on_what_others_use(case: Case, start: EngineStarter) -> None:
    """With operators that claim it: rows with no adapter have the bits of an engine that has none at all."""
    engine = start(case.folder, adapters=case.adapters)
    if not engine.numerics:
        pytest.skip("these operators claim nothing")
    bare = start(case.folder)
    driver = AdapterDriver(engine, seed=5)
    requests = [driver.begin(prompt, adapter) for prompt in prompts(6) for adapter in ("", *NAMES)]
    driver.generate(requests, NUM_NEW, chunk_max=7)
    for request in requests:
        adapter = driver.adapter_of[request.number]
        expected = alone(engine if adapter else bare, request.prompt, adapter)
        assert (request.output, driver.logprobs[request.number]) == expected, adapter


def test_an_adapter_without_effect_leaves_every_bit(tmp_path: Path, start: EngineStarter) -> None:
    """The path with adapters is the path without them: only what they add differs, and here it is zero."""
    model = write_checkpoint(CHOSEN[0], tmp_path / "model")
    write_peft_adapter(model, tmp_path / "zero", seed=1, strength=0.0)
    engine = start(tmp_path / "model", adapters=(f"zero={tmp_path / 'zero'}",))
    if not engine.numerics:
        pytest.skip("these operators claim nothing")
    for prompt in prompts(9):
        assert alone(engine, prompt, "zero") == alone(engine, prompt, "")


def test_a_digest_is_of_the_weights(tmp_path: Path, start: EngineStarter) -> None:
    model = write_checkpoint(CHOSEN[0], tmp_path / "model")
    for name, seed in (("one", 1), ("same", 1), ("two", 2)):
        write_peft_adapter(model, tmp_path / name, seed=seed)
    entries = tuple(f"{name}={tmp_path / name}" for name in ("one", "same", "two"))
    one, same, two = start(tmp_path / "model", adapters=entries).lora.adapters
    assert one.digest == same.digest != two.digest
    assert len(one.digest) == 64
