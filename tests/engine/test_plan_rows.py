"""What a row may ask for beyond its tokens: log-probabilities, zeroed tails, tokens that only the device knows."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tandem.core.messages.plans import Row, Sample
from tandem.core.messages.sampling import SamplingParams, TokenLogprob
from tandem.engine.ops import reference_attention
from tandem.engine.pool import host_pool
from tandem.engine.start import Engine
from tandem.transfer.memory import PoolMemory
from tests.engine.checkpoints import VARIANTS, VOCABULARY, write_checkpoint
from tests.engine.conftest import EngineStarter
from tests.engine.driver import GREEDY, PlanDriver, take

QWEN3 = next(variant for variant in VARIANTS if variant.name == "qwen3")
PROMPT = tuple(np.random.default_rng(1).integers(0, VOCABULARY, 43).tolist())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("qwen3")
    return folder, write_checkpoint(QWEN3, folder)


@pytest.fixture
def engine(checkpoint: tuple[Path, Any], start: EngineStarter) -> Engine:
    return start(checkpoint[0])


@pytest.fixture
def driver(engine: Engine) -> PlanDriver:
    return PlanDriver(engine.device, num_pages=engine.layout.num_pages, page_tokens=engine.layout.page_tokens)


def test_prompt_logprobs_over_chunks(checkpoint: tuple[Path, Any], driver: PlanDriver) -> None:
    """Each chunk tells of the tokens after its positions, the last one as far as it is known."""
    with torch.inference_mode():
        expected = torch.log_softmax(checkpoint[1](torch.tensor([PROMPT])).logits[0].double(), dim=-1)
    request = driver.start(PROMPT, 1)
    described: list[TokenLogprob] = []
    for num_tokens in (1, 20, 22):
        row = replace(driver.row(request, num_tokens), prompt_logprobs=3)
        request.computed += num_tokens
        following = request.prompt[request.computed : request.computed + 1]
        row = replace(row, next_token_id=following[0] if following else None)
        (result,) = driver.execute([row])
        assert len(result.prompt_logprobs) == num_tokens - (not following)
        described += result.prompt_logprobs
    assert [entry.token_id for entry in described] == list(PROMPT[1:])
    for position, entry in enumerate(described):
        assert entry.logprob == pytest.approx(float(expected[position, entry.token_id]), abs=1e-3)
        best = expected[position].topk(3).values.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best, abs=1e-3)


def test_logprobs_of_sampled_tokens(checkpoint: tuple[Path, Any], driver: PlanDriver) -> None:
    """They are of the raw distribution, whatever the sampling does to it."""
    with torch.inference_mode():
        expected = torch.log_softmax(checkpoint[1](torch.tensor([PROMPT])).logits[0, -1].double(), dim=-1)
    rows = []
    for num_top, temperature in ((None, 1.0), (0, 0.0), (4, 5.0)):
        params = SamplingParams(temperature=temperature, logprobs=num_top, seed=3, logit_bias=((5, 3.0),))
        rows.append(driver.row(driver.start(PROMPT, 1, params=params), len(PROMPT)))
    silent, bare, full = driver.execute(rows)
    assert silent.logprob is None
    assert bare.logprob is not None
    assert bare.logprob.top == ()
    assert full.logprob is not None
    assert [token for token, _ in full.logprob.top] == expected.topk(4).indices.tolist()
    for result in (bare, full):
        assert result.logprob is not None
        assert result.logprob.token_id == result.token_id
        assert result.logprob.logprob == pytest.approx(float(expected[result.token_id]), abs=1e-3)


@pytest.mark.parametrize("num_tokens", [5, 8, 19])
def test_zero_tail_in_shared_memory(engine: Engine, driver: PlanDriver, num_tokens: int) -> None:
    """The slots after the last position are zero in the memory that a transfer process maps; all others are kept."""
    host_pool(engine.memory, engine.layout).fill_(7.0)
    request = driver.start(PROMPT[:num_tokens], 8)
    driver.execute([driver.row(request, num_tokens, zero_tail=True)])
    other = PoolMemory.attach(os.dup(engine.memory.fd), engine.memory.size_bytes, engine.memory.pages)
    pool = host_pool(other, engine.layout)
    for number, page in enumerate(request.pages):
        used = min(max(num_tokens - number * 8, 0), 8)
        assert not (pool[page, :, :, :, :used] == 7.0).all(dim=-1).any()
        tail = pool[page, :, :, :, used:]
        assert (tail == (0.0 if used else 7.0)).all()
    unused = [page for page in range(engine.layout.num_pages) if page not in request.pages]
    assert (pool[unused] == 7.0).all()
    other.close()


def test_rows_launched_before_their_token_is_known(driver: PlanDriver) -> None:
    """Depth 1, chain 2: the next plan goes out while the last one computes; the device keeps the token."""
    prompts = [PROMPT[:30], PROMPT[5:12]]
    alone = [driver.start(prompt, 20) for prompt in prompts]
    for request in alone:
        driver.generate([request], 20, chunk_max=50)
    overlapped = [driver.start(prompt, 20) for prompt in prompts]
    driver.launch([driver.row(request, len(request.prompt)) for request in overlapped])
    for request in overlapped:
        request.computed = len(request.prompt)
    results = []
    for index in range(1, 20):
        rows = [replace(driver.row(request, 1, unseen=True), sample=_greedy_sample(index)) for request in overlapped]
        driver.launch(rows)
        for request in overlapped:
            request.computed += 1
        if driver.device.unresolved > 1:
            results += take(driver.device, 1)
    results += take(driver.device, driver.device.unresolved)
    outputs = [[result.rows[number].token_id for result in results] for number in range(len(overlapped))]
    assert outputs == [request.output for request in alone]


def _greedy_sample(index: int) -> Sample:
    return Sample(params=GREEDY, output_index=index)


def test_seeded_sampling_does_not_depend_on_batch_or_chunks(driver: PlanDriver) -> None:
    params = [SamplingParams(temperature=0.9, top_p=0.95, top_k=40, seed=seed) for seed in range(4)]
    alone = [driver.start(PROMPT[:25], 30, params=each) for each in params]
    for request in alone:
        driver.generate([request], 30, chunk_max=25)
    together = [driver.start(PROMPT[:25], 30, params=each) for each in params]
    driver.generate(together, 30, chunk_max=6)
    assert [request.output for request in together] == [request.output for request in alone]
    assert len({tuple(request.output) for request in alone}) == 4


def test_a_broken_row_stays_alone(tmp_path: Path, start: EngineStarter) -> None:
    """A token whose embedding is NaN: its request gets some tokens; its neighbours and successors get theirs."""
    write_checkpoint(VARIANTS[0], tmp_path)
    for shard in tmp_path.glob("*.safetensors"):
        tensors = load_file(shard)
        if "model.embed_tokens.weight" in tensors:
            tensors["model.embed_tokens.weight"][VOCABULARY - 1] = math.nan
            save_file(tensors, shard, metadata={"format": "pt"})
    engine = start(tmp_path)
    driver = PlanDriver(engine.device, num_pages=engine.layout.num_pages, page_tokens=engine.layout.page_tokens)
    healthy = tuple(token for token in PROMPT if token != VOCABULARY - 1)
    expected = driver.start(healthy, 20)
    driver.generate([expected], 20, chunk_max=50)
    broken = driver.start((*PROMPT, VOCABULARY - 1, 3), 20)
    neighbour = driver.start(healthy, 20)
    driver.generate([broken, neighbour], 20, chunk_max=10)
    assert neighbour.output == expected.output
    assert all(0 <= token < VOCABULARY for token in broken.output)
    successor = replace(expected, pages=broken.pages, computed=0, output=[])
    driver.generate([successor], 20, chunk_max=10)
    assert successor.output == expected.output


def test_sliding_window_ignores_what_lies_before_it(tmp_path: Path, start: EngineStarter) -> None:
    """Pages that have slid out of the window are not even read: they may hold anything."""
    variant = next(variant for variant in VARIANTS if variant.name == "mistral")
    write_checkpoint(variant, tmp_path, num_hidden_layers=1)
    engine = start(tmp_path)
    driver = PlanDriver(engine.device, num_pages=engine.layout.num_pages, page_tokens=8)
    clean, dirty = driver.start(PROMPT, 20), driver.start(PROMPT, 20)
    driver.generate([clean], 20, chunk_max=50)
    driver.execute([driver.row(dirty, 40)])
    dirty.computed = 40
    host_pool(engine.memory, engine.layout)[list(dirty.pages[:2])] = math.nan  # positions 0..15; 40 - 21 = 19
    driver.generate([dirty], 20, chunk_max=50)
    assert dirty.output == clean.output


def test_many_rows_of_very_different_lengths(driver: PlanDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one token are gathered in groups: neither their size nor the bound on it changes a token."""
    lengths = (1, 2, 7, 8, 9, 16, 17, 31, 43)
    outputs = []
    for elements in (1 << 24, 1):
        monkeypatch.setattr(reference_attention, "_GROUP_ELEMENTS", elements)
        requests = [driver.start(PROMPT[:length], 12) for length in lengths]
        driver.generate(requests, 12, chunk_max=43)
        outputs.append([request.output for request in requests])
        for request in requests:
            driver.release(request)
    assert outputs[0] == outputs[1]


def test_extend_rows_longer_than_a_block_of_queries(driver: PlanDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = driver.start(PROMPT, 10)
    driver.generate([whole], 10, chunk_max=len(PROMPT))
    monkeypatch.setattr(reference_attention, "_QUERY_BLOCK", 5)
    blocks = driver.start(PROMPT, 10)
    driver.generate([blocks], 10, chunk_max=len(PROMPT))
    assert blocks.output == whole.output


def test_malformed_row_fails_its_plan(driver: PlanDriver) -> None:
    request = driver.start(PROMPT, 1)
    row: Row = replace(driver.row(request, 4), num_tokens=3)
    driver.launch([row])
    with pytest.raises(Exception, match="plan 1 failed on the device: AssertionError"):
        take(driver.device, 1)
