"""Does attention pay for the page-major pool? Gather and attend over both layouts, alternating in one run.

page-major:  [page][layer][k|v][kv_head][slot][head_dim]    a page is one run for the data plane
layer-major: [layer][k|v][page][kv_head][slot][head_dim]    a layer is one run for attention

    python bench/kv_layout.py [--threads 1]

Prints the median of each, and page-major / layer-major. Shape: 24 layers, 14 query and 2 KV heads of 64 (a 0.5B model).
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as functional

LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM, PAGE_TOKENS = 24, 14, 2, 64, 16


def step(pool: torch.Tensor, queries: torch.Tensor, first: torch.Tensor, layer_step: int, side_step: int) -> None:
    """One decode step's attention in all layers; `first`: blocks [rows, kv_heads, pages] of layer 0's keys."""
    rows = queries.shape[0]
    for layer in range(LAYERS):
        sides = []
        for side in (0, 1):
            blocks = functional.embedding(first + layer * layer_step + side * side_step, pool)
            sides.append(blocks.view(rows, KV_HEADS, -1, HEAD_DIM))
        functional.scaled_dot_product_attention(queries, sides[0], sides[1])


def measure(rows: int, context: int, repeats: int) -> tuple[float, float]:
    """Return the median seconds of a step with page-major and with layer-major."""
    pages_each = context // PAGE_TOKENS
    num_pages = 2 * rows * pages_each
    pool = torch.randn(num_pages * LAYERS * 2 * KV_HEADS, PAGE_TOKENS * HEAD_DIM)
    queries = torch.randn(rows, KV_HEADS, QUERY_HEADS // KV_HEADS, HEAD_DIM)
    pages = torch.randperm(num_pages)[: rows * pages_each].view(rows, 1, pages_each)
    heads = torch.arange(KV_HEADS).view(1, -1, 1)
    page_major = (pages * (LAYERS * 2 * KV_HEADS) + heads, 2 * KV_HEADS, KV_HEADS)
    layer_major = (pages * KV_HEADS + heads, 2 * num_pages * KV_HEADS, num_pages * KV_HEADS)
    weights = torch.zeros(48 << 20)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for layout, into in zip((page_major, layer_major), times, strict=True):
            weights.add_(1.0)  # what a model's weights do to the caches between two layers' attention
            began = time.perf_counter()
            step(pool, queries, *layout)
            into.append(time.perf_counter() - began)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("rows  context  page-major ms  layer-major ms  ratio")
    with torch.inference_mode():
        for rows, context in ((1, 512), (8, 512), (32, 512), (1, 8192), (4, 8192)):
            first, second = measure(rows, context, arguments.repeats)
            print(f"{rows:4}  {context:7}  {first * 1e3:13.2f}  {second * 1e3:14.2f}  {first / second:5.2f}")


if __name__ == "__main__":
    main()
