"""The KV pool of one rank: how large it is, the memory that it lies in, and its tensor view over that."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch

from tandem.config import CacheConfig, HugePages
from tandem.errors import ConfigError
from tandem.transfer.layout import KvLayout
from tandem.transfer.memory import PoolMemory, describe_pages, reserve_pool

MIN_PAGES = 4
WHOLE = Fraction(1)
Reserve = Callable[[int, HugePages, Callable[[str], None]], PoolMemory]
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def budget_bytes(config: CacheConfig, free_bytes: int, share: Fraction = WHOLE) -> int:
    """Bytes of a rank's pool: its share of what is configured, else of `free_bytes`, bounded."""
    if config.pool_bytes:
        return int(config.pool_bytes * share)
    return min(int(free_bytes * config.memory_fraction), int(config.pool_bytes_max * share))


def sized_layout(
    layout_of_one_page: KvLayout, config: CacheConfig, free_bytes: int, share: Fraction = WHOLE
) -> KvLayout:
    """The layout with as many pages as the budget holds. `share`: this rank's part of the worker's KV.

    Raises ConfigError if that is fewer than MIN_PAGES.
    """
    page_bytes = layout_of_one_page.page_bytes
    budget = budget_bytes(config, free_bytes, share)
    num_pages = budget // page_bytes
    if num_pages < MIN_PAGES:
        source = "cache.pool_bytes" if config.pool_bytes else "cache.memory_fraction of the free memory"
        raise ConfigError(
            f"{source}: a KV pool of {budget} bytes holds {num_pages} pages of {page_bytes} bytes, "
            f"at least {MIN_PAGES} are needed"
        )
    return KvLayout(
        num_pages=num_pages,
        num_layers=layout_of_one_page.num_layers,
        num_kv_heads=layout_of_one_page.num_kv_heads,
        page_tokens=layout_of_one_page.page_tokens,
        head_dim=layout_of_one_page.head_dim,
        dtype=layout_of_one_page.dtype,
    )


def take_pool(
    layout: KvLayout,
    config: CacheConfig,
    free_bytes: int,
    progress: Callable[[str], None],
    *,
    on_gpu: bool = False,
    reserve: Reserve = reserve_pool,
) -> PoolMemory:
    """Return the memory of a pool. `free_bytes`: of the memory that it is computed in, without reserved huge pages.

    Of a pool `on_gpu` this is the mirror, which is only copied, a page at a time: it takes reserved pages if they are
    required, and leaves them to others else. Raises ConfigError if the pool is not to be had: ordinary pages are taken
    one by one, and running out of them later would kill the process.
    """
    num_bytes, wish = layout.pool_bytes, config.huge_pages
    fits = num_bytes <= free_bytes
    lack = ConfigError(f"cache.pool_bytes: {config.pool_bytes} asked for, {free_bytes} bytes of memory are free")
    if not fits and (on_gpu or wish == "off"):
        raise lack
    if on_gpu and wish == "auto":
        memory = PoolMemory.create(num_bytes)
    else:
        try:
            memory = reserve(num_bytes, wish if fits else "require", progress)
        except ConfigError:
            if wish == "require":
                raise
            raise lack from None
    size = f"{layout.num_pages} pages of {layout.page_tokens} tokens, {num_bytes / 1e9:.2f} GB"
    progress(f"KV pool: {size} in {describe_pages(memory.pages)}")
    return memory


def host_pool(memory: PoolMemory, layout: KvLayout) -> torch.Tensor:
    """View shared memory as [page, layer, k|v, kv_head, slot, head_dim]. Touches no page of it."""
    flat = torch.frombuffer(memory.view, dtype=TORCH_DTYPES[layout.dtype])
    return flat.view(layout.num_pages, *layout.page_shape)
