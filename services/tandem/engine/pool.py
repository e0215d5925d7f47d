"""The KV pool of one rank: how large it is, and its tensor view over shared memory."""

from __future__ import annotations

from fractions import Fraction

import torch

from tandem.config import CacheConfig
from tandem.errors import ConfigError
from tandem.transfer.layout import KvLayout
from tandem.transfer.memory import PoolMemory

MIN_PAGES = 4
WHOLE = Fraction(1)
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

    Raises ConfigError if that is fewer than MIN_PAGES, or if the configured size is not there: shared memory is taken
    page by page, and running out of it later would kill the process.
    """
    if int(config.pool_bytes * share) > free_bytes:
        raise ConfigError(f"cache.pool_bytes: {config.pool_bytes} asked for, {free_bytes} bytes of memory are free")
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


def host_pool(memory: PoolMemory, layout: KvLayout) -> torch.Tensor:
    """View shared memory as [page, layer, k|v, kv_head, slot, head_dim]. Touches no page of it."""
    flat = torch.frombuffer(memory.view, dtype=TORCH_DTYPES[layout.dtype])
    return flat.view(layout.num_pages, *layout.page_shape)
