"""Starting an engine: what it says about itself, what it refuses, and that it serves the demo model."""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tandem.config import CacheConfig, Config, HugePages, ModelConfig, ParallelConfig, SchedulerConfig
from tandem.engine import rank_device
from tandem.engine import start as start_module
from tandem.engine.pool import Reserve, host_pool, sized_layout, take_pool
from tandem.engine.start import numerics_id, start_engine
from tandem.errors import ConfigError
from tandem.transfer.layout import KvLayout
from tandem.transfer.memory import PoolMemory
from tests.engine.checkpoints import VARIANTS, VOCABULARY, edit_json, write_checkpoint
from tests.engine.conftest import EngineStarter
from tests.engine.driver import PlanDriver

QWEN2 = next(variant for variant in VARIANTS if variant.name == "qwen2")
QWEN2_HIDDEN, QWEN2_MIDDLE = 48, 72
PAGE = KvLayout(num_pages=1, num_layers=2, num_kv_heads=2, page_tokens=4, head_dim=8, dtype="float32")


def test_what_an_engine_says(tmp_path: Path, start: EngineStarter) -> None:
    write_checkpoint(QWEN2, tmp_path, num_hidden_layers=2)
    engine = start(tmp_path, pool_bytes=1 << 20, page_tokens=8)
    assert engine.layout.page_shape == (2, 2, 2, 8, 12)
    assert engine.layout.num_pages == (1 << 20) // engine.layout.page_bytes
    assert engine.memory.size_bytes == engine.layout.pool_bytes
    assert engine.spec.vocab_size == VOCABULARY
    assert engine.spec.eos_token_ids == (VOCABULARY - 1,)
    assert engine.spec.max_context_tokens == 256
    assert engine.operators == "reference" or engine.operators.startswith("cpu-")
    assert (engine.numerics == "") == (engine.operators == "reference")
    assert engine.device.unresolved == 0
    assert not any(engine.memory.view.tobytes()), "the warm-up has left something in the pool"


def test_numerics_ids() -> None:
    """Whatever changes bits is in it; what does not change them is not."""
    own = numerics_id("cpu-fma-1", "bfloat16", ParallelConfig())
    assert own == "cpu-fma-1-bfloat16-tensor1-expert1"
    assert numerics_id("cpu-fma-1", "bfloat16", ParallelConfig(pipeline_size=2, data_size=2)) == own
    changed = (
        ("cpu-fma-2", "bfloat16", ParallelConfig()),
        ("cpu-fma-1", "float32", ParallelConfig()),
        ("cpu-fma-1", "bfloat16", ParallelConfig(tensor_size=2)),
        ("cpu-fma-1", "bfloat16", ParallelConfig(expert_size=2)),
    )
    assert len({own, *(numerics_id(*each) for each in changed)}) == 5
    assert numerics_id("", "bfloat16", ParallelConfig()) == "", "operators without proof claim nothing"


def test_fingerprints(tmp_path: Path, start: EngineStarter) -> None:
    """Equal for one model wherever it lies and however much memory there is; different for all that makes KV differ."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_checkpoint(QWEN2, tmp_path / name, seed=seed)
    reference = start(tmp_path / "a").fingerprint
    assert start(tmp_path / "b", pool_bytes=1 << 19, max_context_tokens=100).fingerprint == reference
    assert start(tmp_path / "c").fingerprint != reference
    assert start(tmp_path / "a", page_tokens=16).fingerprint != reference
    assert start(tmp_path / "a", dtype="bfloat16").fingerprint != reference
    edit_json(tmp_path / "b" / "config.json", lambda config: config.update(eos_token_id=3))
    assert start(tmp_path / "b").fingerprint == reference
    edit_json(tmp_path / "b" / "config.json", lambda config: config.update(rope_theta=5e5))
    assert start(tmp_path / "b").fingerprint != reference


def test_context_cut(tmp_path: Path, start: EngineStarter) -> None:
    write_checkpoint(QWEN2, tmp_path)
    assert start(tmp_path, max_context_tokens=100).spec.max_context_tokens == 100
    with pytest.raises(ConfigError, match=r"max_context_tokens: 1000 asked for, the model's context is 256"):
        start(tmp_path, max_context_tokens=1000)


def test_pool_that_is_too_small(tmp_path: Path, start: EngineStarter) -> None:
    write_checkpoint(QWEN2, tmp_path)
    with pytest.raises(ConfigError, match=r"cache.pool_bytes: a KV pool of 1000 bytes holds 0 pages"):
        start(tmp_path, pool_bytes=1000)


def test_pool_sizes() -> None:
    assert sized_layout(PAGE, CacheConfig(pool_bytes=PAGE.page_bytes * 5 + 1), 1 << 40).num_pages == 5
    share = CacheConfig(memory_fraction=0.5, pool_bytes_max=1 << 40)
    assert sized_layout(PAGE, share, PAGE.page_bytes * 20).num_pages == 10
    bounded = CacheConfig(memory_fraction=0.5, pool_bytes_max=PAGE.page_bytes * 6)
    assert sized_layout(PAGE, bounded, PAGE.page_bytes * 1000).num_pages == 6
    with pytest.raises(ConfigError, match=r"cache.memory_fraction of the free memory: .* holds 3 pages"):
        sized_layout(PAGE, share, PAGE.page_bytes * 7)


def test_a_pool_that_does_not_fit_into_free_memory() -> None:
    """Reserved huge pages are no part of the free memory: a pool that lies in them need not fit into it."""
    layout = sized_layout(PAGE, CacheConfig(pool_bytes=90_000), 80_000)
    too_large = re.escape("cache.pool_bytes: 90000 asked for, 80000 bytes of memory are free")

    def reserve(wishes: list[str], granted: bool) -> Reserve:
        def take(size_bytes: int, wish: str, progress: Callable[[str], None]) -> PoolMemory:
            wishes.append(wish)
            if not granted:
                raise ConfigError("cache.huge_pages: none")
            return PoolMemory.create(size_bytes)

        return take

    def take(wish: HugePages, granted: bool, *, free: int = 80_000, on_gpu: bool = False) -> list[str]:
        wishes: list[str] = []
        cache = CacheConfig(pool_bytes=90_000, huge_pages=wish)
        take_pool(layout, cache, free, lambda _: None, on_gpu=on_gpu, reserve=reserve(wishes, granted)).close()
        return wishes

    assert take("auto", True) == take("require", True) == ["require"]
    for wish, granted, on_gpu in (("auto", False, False), ("off", True, False), ("auto", True, True)):
        with pytest.raises(ConfigError, match=too_large):
            take(wish, granted, on_gpu=on_gpu)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"cache\.huge_pages: none"):
        take("require", False)
    assert [take(wish, True, free=90_000) for wish in ("auto", "off", "require")] == [["auto"], ["off"], ["require"]]
    mirrors = [take(wish, True, free=90_000, on_gpu=True) for wish in ("auto", "off", "require")]
    assert mirrors == [[], ["off"], ["require"]], "the mirror of a GPU's pool takes reserved pages only if told to"


def test_the_progress_says_what_the_pool_lies_in() -> None:
    said: list[str] = []
    layout = sized_layout(PAGE, CacheConfig(pool_bytes=1 << 20), 1 << 30)
    take_pool(layout, CacheConfig(huge_pages="off"), 1 << 30, said.append).close()
    assert said == [f"KV pool: {layout.num_pages} pages of 4 tokens, 0.00 GB in pages of {mmap.PAGESIZE >> 10} KB"]


def test_workspace_is_counted_before_the_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest plan's workspace is taken at the start, so the pool gets its share of what is left."""
    write_checkpoint(QWEN2, tmp_path)
    monkeypatch.setattr(start_module, "available_memory_bytes", lambda: 1 << 28)
    pools = []
    for budget_tokens in (16, 16384):
        config = Config(
            model=ModelConfig(path=str(tmp_path), device="cpu", threads=1),
            cache=CacheConfig(memory_fraction=0.5),
            scheduler=SchedulerConfig(budget_tokens=budget_tokens),
        )
        engine = start_engine(config, lambda _: None)
        engine.device.close()
        engine.memory.close()
        pools.append(engine.layout.pool_bytes)
    if engine.operators == "reference":
        pytest.skip("the reference keeps no workspace")
    activations = 16384 * 4 * (QWEN2_HIDDEN + QWEN2_MIDDLE)  # some of what a layer needs at once
    assert pools[0] - pools[1] >= activations / 2


def test_weights_that_do_not_fit(tmp_path: Path, start: EngineStarter, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(QWEN2, tmp_path)
    monkeypatch.setattr(start_module, "available_memory_bytes", lambda: 100_000)
    with pytest.raises(ConfigError, match=r"the weights take 0.00 GB, 0.00 GB of memory are free"):
        start(tmp_path)


def test_the_first_replica_leaves_room_for_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(QWEN2, tmp_path)
    free = 1 << 30
    monkeypatch.setattr(start_module, "available_memory_bytes", lambda: free)

    def pool_and_weights(data_size: int, pool_bytes: int = 0) -> tuple[int, int]:
        cache = CacheConfig(memory_fraction=0.5, pool_bytes=pool_bytes)
        config = Config(
            model=ModelConfig(path=str(tmp_path), device="cpu", threads=1),
            parallel=ParallelConfig(data_size=data_size),
            cache=cache,
        )
        engine = start_engine(config, lambda _: None)
        engine.device.close()
        return engine.layout.pool_bytes, engine.weight_bytes

    alone, weight_bytes = pool_and_weights(1)
    page_bytes = 1 << 16
    assert abs(alone - 4 * pool_and_weights(4)[0] - 3 * weight_bytes / 2) < 4 * page_bytes
    pool_and_weights(1, 600 << 20)
    with pytest.raises(ConfigError, match=r"cache.pool_bytes: \d+ asked for, \d+ bytes of memory are free"):
        pool_and_weights(2, 600 << 20)  # each of them
    free = 10 * weight_bytes
    with pytest.raises(ConfigError, match=r"the weights take 64 \(parallel.data_size\) times 0.00 GB"):
        pool_and_weights(64)


def test_pool_view_is_the_shared_memory() -> None:
    layout = sized_layout(PAGE, CacheConfig(pool_bytes=PAGE.page_bytes * 4), 1 << 40)
    memory = PoolMemory.create(layout.pool_bytes)
    pool = host_pool(memory, layout)
    pool[2] = torch.arange(pool[2].numel(), dtype=torch.float32).view(pool[2].shape)
    page = memory.view[2 * layout.page_bytes : 3 * layout.page_bytes].cast("f")
    assert page.tolist() == list(range(layout.page_bytes // 4))
    memory.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device() -> None:
    with pytest.raises(ConfigError, match="torch finds no CUDA device"):
        start_engine(Config(model=ModelConfig(device="cuda")), lambda _: None)


def test_threads_follow_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(QWEN2, tmp_path)
    monkeypatch.setattr(rank_device, "usable_cpus", lambda: 1)
    counts: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    engine = start_engine(
        Config(model=ModelConfig(path=str(tmp_path), device="cpu"), cache=CacheConfig(pool_bytes=1 << 19)),
        lambda _: None,
    )
    engine.device.close()
    assert counts == [1, 1]  # this process's, and the compute thread's own


def test_demo_model(start: EngineStarter) -> None:
    engine = start("demo", page_tokens=16)
    driver = PlanDriver(engine.device, num_pages=engine.layout.num_pages, page_tokens=16)
    request = driver.start((5, 6, 7), 10)
    driver.generate([request], 10, chunk_max=3)
    assert len(request.output) == 10
    assert all(0 <= token < engine.spec.vocab_size for token in request.output)
