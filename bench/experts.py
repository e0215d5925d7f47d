"""What spread experts cost in exchanges: one sum in the order of the ranks, or tokens sent to their experts and back.

Prints both ways' milliseconds and their ratio, over gloo on this machine, in turns. No expert is computed.

    python bench/experts.py --ranks 2 --hidden 2048 --experts-per-token 8
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROUNDS = 30
TOKENS = (1, 8, 64, 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--experts-per-token", type=int, default=8)
    arguments = parser.parse_args()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(  # type: ignore[no-untyped-call]
        run_rank, (arguments.ranks, arguments.hidden, arguments.experts_per_token, store.port), nprocs=arguments.ranks
    )


def run_rank(rank: int, ranks: int, hidden: int, per_token: int, port: int) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    for num_tokens in TOKENS:
        parts = torch.randn(num_tokens, hidden)
        # Each token needs the ranks of its experts; those that are drawn twice get it once.
        source = torch.Generator().manual_seed(num_tokens)
        needed = torch.zeros(num_tokens, ranks, dtype=torch.bool)
        needed.scatter_(1, torch.randint(ranks, (num_tokens, per_token), generator=source), True)
        reduced, sent = [], []
        for _ in range(ROUNDS):
            reduced.append(seconds_of(add_in_order, parts, ranks))
            sent.append(seconds_of(send_and_return, parts, needed, rank))
        if rank == 0:
            one, other = (1e3 * statistics.median(times) for times in (reduced, sent))
            print(f"{ranks} ranks, {num_tokens} tokens: sum {one:.2f} ms, sent {other:.2f} ms, ratio {one / other:.2f}")
    dist.destroy_process_group()


def add_in_order(part: torch.Tensor, ranks: int) -> torch.Tensor:
    """[N, H] of each rank -> their sum on all, in the order of the ranks."""
    parts = torch.empty(ranks, *part.shape)
    dist.all_gather(list(parts.unbind()), part)
    total = parts[0]
    for other in parts[1:]:
        total += other
    return total


def send_and_return(tokens: torch.Tensor, needed: torch.Tensor, rank: int) -> torch.Tensor:
    """Each rank sends its share of the tokens to the ranks that are needed, and gets as many results back.

    Then all ranks get all sums, as attention's heads are cut between them.
    """
    ranks, hidden = needed.shape[1], tokens.shape[1]
    shares = [range(len(tokens) * one // ranks, len(tokens) * (one + 1) // ranks) for one in range(ranks)]
    own = needed[shares[rank].start : shares[rank].stop]
    counts = own.sum(dim=0)
    theirs = torch.empty_like(counts)
    dist.all_to_all_single(theirs, counts)
    out = torch.cat([tokens[shares[rank].start :][: len(own)][own[:, to]] for to in range(ranks)])
    arrived = torch.empty(int(theirs.sum()), hidden)
    dist.all_to_all_single(arrived, out, theirs.tolist(), counts.tolist())
    back = torch.empty_like(out)
    dist.all_to_all_single(back, arrived, counts.tolist(), theirs.tolist())
    sums = torch.zeros(max(len(share) for share in shares), hidden)
    first = 0
    for to, count in enumerate(counts.tolist()):
        sums[: len(own)][own[:, to]] += back[first : first + count]
        first += count
    everywhere = torch.empty(ranks, *sums.shape)
    dist.all_gather(list(everywhere.unbind()), sums)
    return everywhere


def seconds_of(exchange: Callable[..., torch.Tensor], *arguments: object) -> float:
    dist.barrier()
    began = time.perf_counter()
    exchange(*arguments)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
