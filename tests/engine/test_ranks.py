"""Several ranks over one checkpoint, each an engine in a thread of its own: the same tokens as one rank alone."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.config import CacheConfig, Config, ModelConfig, ParallelConfig, SchedulerConfig
from tandem.core.messages.handoff import Sharding
from tandem.core.messages.plans import Plan, PlanResolved
from tandem.core.messages.sampling import SamplingParams, TokenLogprob
from tandem.engine.collectives import Meeting
from tandem.engine.place import RankPlace
from tandem.engine.rank_device import replica_devices
from tandem.engine.start import Engine, start_engine
from tandem.engine.wire import listen_store
from tandem.errors import ConfigError
from tests.engine.checkpoints import VARIANTS, VOCABULARY, write_checkpoint
from tests.engine.driver import PlanDriver, take

PAGE_TOKENS = 8
POOL_BYTES = 4 << 20
SIZES = [(2, 1), (1, 2), (2, 2), (1, 3)]
DESCRIBED = SamplingParams(temperature=0.0, logprobs=3)
NAMES = ("llama_biased", "qwen2", "qwen3", "mistral", "mixtral", "qwen3_moe_fused")


class Ranks:
    """The ranks of a worker as one device: a plan is executed by all of them."""

    def __init__(self, engines: Sequence[Engine], drawing_rank: int) -> None:
        self._devices = [engine.device for engine in engines]
        self._drawing = self._devices[drawing_rank]

    @property
    def unresolved(self) -> int:
        return self._drawing.unresolved

    def launch(self, plan: Plan) -> None:
        for device in self._devices:
            device.launch(plan)

    def adopt(self, pages: Sequence[int]) -> None:
        raise AssertionError("nothing is handed over here")

    def fileno(self) -> int:
        return self._drawing.fileno()

    def resolved(self) -> list[PlanResolved]:
        results = self._drawing.resolved()
        for device in self._devices:
            if device is not self._drawing:
                take(device, len(results))
        return results

    def close(self) -> None:
        for device in self._devices:
            device.close()


Starter = Callable[..., list[Engine]]
Outputs = list[tuple[list[int], list[TokenLogprob]]]


@pytest.fixture
def ranks() -> Iterator[Starter]:
    """Start all ranks of a worker over a checkpoint folder."""
    started: list[Engine] = []
    kept: list[object] = []

    def starter(
        folder: Path,
        tensor_size: int,
        pipeline_size: int,
        expert_size: int = 1,
        folder_of: dict[int, Path] | None = None,
        **model: Any,
    ) -> list[Engine]:
        sharding = Sharding(tensor_size, pipeline_size)
        count = tensor_size * pipeline_size
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            kept.append(listen_store(os.dup(listener.fileno()), "127.0.0.1", port, 60.0))
        meeting = Meeting(
            host="127.0.0.1", port=port, own_host="127.0.0.1", start_seconds=60.0, collective_seconds=60.0
        )
        config = Config(
            model=ModelConfig(path=str(folder), threads=1, device="cpu", **model),
            cache=CacheConfig(pool_bytes=POOL_BYTES, page_tokens=PAGE_TOKENS),
            scheduler=SchedulerConfig(max_running_requests=64, budget_tokens=128),
            parallel=ParallelConfig(tensor_size=tensor_size, pipeline_size=pipeline_size, expert_size=expert_size),
        )

        def one(rank: int) -> Engine:
            torch.set_num_threads(1)
            own = replace(config.model, path=str((folder_of or {}).get(rank, folder)))
            return start_engine(
                replace(config, model=own), lambda _: None, RankPlace(rank, sharding), meeting if count > 1 else None
            )

        with ThreadPoolExecutor(count) as pool:
            engines = list(pool.map(one, range(count)))
        started.extend(engines)
        return engines

    yield starter
    for engine in started:
        engine.device.close()
        engine.memory.close()


def generate(engines: list[Engine], sharding: Sharding, *, chunk_max: int, seed: int = 0) -> Outputs:
    """Tokens of some requests, and what is said about them, in mixed batches of random chunks."""
    device = Ranks(engines, RankPlace(0, sharding).drawing_rank)
    driver = PlanDriver(device, num_pages=engines[0].layout.num_pages, page_tokens=PAGE_TOKENS, seed=seed)
    prompts = [[(7 * i * (n + 1) + n) % VOCABULARY for i in range(5 + 17 * n)] for n in range(4)]
    requests = [driver.start(prompt, 12, params=DESCRIBED) for prompt in prompts]
    unseen_share = 0.5 if sharding.pipeline_size == 1 else 0.0  # the first stage sees no token
    driver.generate(requests, 12, chunk_max=chunk_max, unseen_share=unseen_share)
    return [(request.output, request.logprobs) for request in requests]


@pytest.mark.parametrize("name", NAMES)
def test_ranks_give_the_tokens_of_one_rank(tmp_path: Path, ranks: Starter, name: str) -> None:
    """Bit for bit where only layers are shared; where sums are, the bits depend on the tensor size alone."""
    variant = next(variant for variant in VARIANTS if variant.name == name)
    write_checkpoint(variant, tmp_path)
    alone = generate(ranks(tmp_path, 1, 1), Sharding(), chunk_max=9)
    of_tensor_size: dict[int, Outputs] = {}
    for tensor_size, pipeline_size in SIZES:
        sharding = Sharding(tensor_size, pipeline_size)
        engines = ranks(tmp_path, tensor_size, pipeline_size)
        exact = bool(engines[0].numerics)
        found = generate(engines, sharding, chunk_max=9 if not exact else 5 * pipeline_size, seed=pipeline_size)
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in alone], sharding
        if exact and tensor_size == 1:
            assert found == alone, sharding
        if exact:
            assert of_tensor_size.setdefault(tensor_size, found) == found, sharding


def described_prompt(engines: list[Engine], sharding: Sharding) -> tuple[TokenLogprob, ...]:
    """What is said about a prompt's tokens, chunk by chunk."""
    device = Ranks(engines, RankPlace(0, sharding).drawing_rank)
    driver = PlanDriver(device, num_pages=engines[0].layout.num_pages, page_tokens=PAGE_TOKENS)
    request = driver.start(list(range(20)), 1)
    described: list[TokenLogprob] = []
    for _ in range(2):
        row = replace(driver.row(request, 10), prompt_logprobs=2, next_token_id=10 if not request.computed else None)
        (result,) = driver.execute([row])
        described += result.prompt_logprobs
        request.computed += 10
    return tuple(described)


def test_prompts_are_described_by_the_rank_that_has_the_logits(tmp_path: Path, ranks: Starter) -> None:
    write_checkpoint(VARIANTS[0], tmp_path)
    alone = described_prompt(ranks(tmp_path, 1, 1), Sharding())
    assert len(alone) == 19
    for tensor_size, pipeline_size in SIZES[:3]:
        sharding = Sharding(tensor_size, pipeline_size)
        found = described_prompt(ranks(tmp_path, tensor_size, pipeline_size), sharding)
        assert [one.token_id for one in found] == [one.token_id for one in alone]
        assert [one.logprob for one in found] == pytest.approx([one.logprob for one in alone], abs=1e-3)
        if tensor_size == 1:
            assert found == alone


def test_each_rank_has_its_part(tmp_path: Path, ranks: Starter) -> None:
    """Parts add up to the whole, every rank has as many pages as one rank alone, and ids say what may be compared."""
    write_checkpoint(next(variant for variant in VARIANTS if variant.name == "mistral_full"), tmp_path)
    (alone,) = ranks(tmp_path, 1, 1)
    for tensor_size, pipeline_size in SIZES:
        engines = ranks(tmp_path, tensor_size, pipeline_size)
        assert {engine.fingerprint for engine in engines} == {alone.fingerprint}
        assert {engine.layout.num_pages for engine in engines} == {alone.layout.num_pages}
        assert sum(engine.layout.page_bytes for engine in engines) == alone.layout.page_bytes
        norms = 4 * 48 * (2 * 3 + 1)  # every tensor rank has them
        whole = alone.weight_bytes + (tensor_size - 1) * norms
        assert sum(engine.weight_bytes for engine in engines) == whole
        for engine in engines:
            if engine.numerics:
                assert engine.numerics == alone.numerics.replace("tensor1", f"tensor{tensor_size}")


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    write_checkpoint(VARIANTS[0], tmp_path)
    for sharding, message in ((Sharding(3, 1), "does not divide 4 KV heads"), (Sharding(1, 4), "more than 3 layers")):
        config = Config(
            model=ModelConfig(path=str(tmp_path), device="cpu"),
            parallel=ParallelConfig(tensor_size=sharding.tensor_size, pipeline_size=sharding.pipeline_size),
        )
        with pytest.raises(ConfigError, match=message):
            start_engine(config, lambda _: None, RankPlace(0, sharding))


def test_ranks_that_have_different_models_do_not_start(tmp_path: Path, ranks: Starter) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        write_checkpoint(VARIANTS[0], tmp_path / name, seed=seed)
    with pytest.raises(ConfigError, match=r"parallel: rank 1 has fingerprint '.*', rank 0 has '"):
        ranks(tmp_path / "a", 1, 2, folder_of={1: tmp_path / "b"})


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (("cpu",), "1 named for 2 ranks"),
        (("cpu", "tpu:0"), "'tpu:0' of rank 1 is no device"),
        (("cpu", "cuda:97"), "rank 1 is to run on cuda:97"),
    ],
)
def test_devices_are_checked_before_anything_is_read(devices: tuple[str, ...], message: str) -> None:
    config = Config(model=ModelConfig(path="/nowhere"), parallel=ParallelConfig(tensor_size=2, devices=devices))
    with pytest.raises(ConfigError, match=message):
        start_engine(config, lambda _: None, RankPlace(1, Sharding(2, 1)))


@pytest.mark.parametrize(
    ("num_gpus", "replica", "devices", "lodgers"),
    [
        (4, 0, ("cuda:0", "cuda:1"), 1),
        (4, 1, ("cuda:2", "cuda:3"), 1),
        (3, 1, ("cuda:2", "cuda:0"), 2),
        (1, 1, ("cuda:0", "cuda:0"), 4),
    ],
)
def test_replicas_get_gpus_in_their_order(
    num_gpus: int, replica: int, devices: tuple[str, ...], lodgers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    config = Config(parallel=ParallelConfig(tensor_size=2, data_size=2))
    found = replica_devices(config, replica).parallel
    assert (found.devices, found.data_size) == (devices, lodgers)
    on_cpu = Config(model=ModelConfig(device="cpu"), parallel=ParallelConfig(data_size=2))
    assert replica_devices(on_cpu, 1) is on_cpu
