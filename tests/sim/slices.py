"""Small simulations, each of one part of the promises: what breaks that part fails there, within a few seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tandem.core.messages.handoff import Sharding
from tests.sim.scenarios import deaths, simulate, stormy
from tests.sim.steady import Load, run_steady

Slice = Callable[[int], object]
SLICES: dict[str, Slice] = {}
BUBBLES = 0.4  # of the short load below; a plan that takes everything leaves three quarters
_ALONE: dict[str, Any] = {"unified": True, "num_prefill": 0, "num_decode": 1}
_PAIR: dict[str, Any] = {
    "num_prefill": 1,
    "num_decode": 1,
    "page_tokens": 4,
    "prefill_pages": 40,
    "decode_pages": 40,
    "max_running": 8,
}


def part(name: str) -> Callable[[Slice], Slice]:
    def register(function: Slice) -> Slice:
        SLICES[name] = function
        return function

    return register


@part("pages")
def pages(seed: int) -> object:
    """Many requests, few pages, cancels: pages change hands while launches are in flight."""
    shape: dict[str, Any] = {"page_tokens": 4, "decode_pages": 22, "max_running": 16, "num_requests": 16}
    return simulate(seed, **_ALONE, **shape, cancels=0.3, deadlines=0.1)


@part("prefixes")
def prefixes(seed: int) -> object:
    """Prompts that begin alike, held on decode and cached on prefill."""
    return stormy(seed, **{**_PAIR, "num_requests": 14, "prefill_pages": 26, "decode_pages": 26})


@part("tokens")
def tokens(seed: int) -> object:
    """Sampling of every kind, with rows ahead of their tokens and retractions."""
    return simulate(seed, **_ALONE, page_tokens=4, decode_pages=24, max_running=8, num_requests=12)


@part("first tokens")
def first_tokens(seed: int) -> object:
    """Hand-offs that break after their first token, prompts computed on decode in the end, resumed answers."""
    return stormy(seed, **{**_PAIR, "num_requests": 12, "faults": 0.4, "kills": seed % 4})


@part("resumptions")
def resumptions(seed: int) -> object:
    """Decode workers that die or drain: answers go on elsewhere, beyond what was handed over first."""
    shape = {"num_decode": 2, "page_tokens": 2, "num_requests": 16, "max_running": 16, "cancels": 0.0, "deadlines": 0.0}
    pools = {"prefill_pages": 60, "decode_pages": 60}
    return stormy(seed, **{**_PAIR, **shape, **pools, "faults": 0.1, "kills": 3, "drains": 1})


@part("attempts")
def attempts(seed: int) -> object:
    """Streams that break often, and workers that die: an older attempt comes after a newer one."""
    shape = {"num_decode": 2, "prefill_pages": 24, "decode_pages": 22, "num_requests": 16, "max_running": 16}
    return stormy(seed, **{**_PAIR, **shape, "faults": 0.3, "kills": 1 + seed % 3, "drains": 1})


@part("reads")
def reads(seed: int) -> object:
    """Pulls that fail, mismatch, or go on after their request has ended."""
    shape = {"faults": 0.4, "cancels": 0.4, "decode_pages": 24, "num_requests": 14, "transfer_kills": seed % 3}
    return stormy(seed, **{**_PAIR, **shape})


@part("exports")
def exports(seed: int) -> object:
    """Announced pages on a small prefill pool, streams that break, leases that make room."""
    shape = {"lost_releases": 0.5, "prefill_pages": 24, "num_decode": 2, "num_requests": 16, "max_running": 16}
    return stormy(seed, **{**_PAIR, **shape, **deaths(seed, 4)})


@part("caps")
def caps(seed: int) -> object:
    """One importer with more prompts than it may pin pages for."""
    return simulate(seed, **{**_PAIR, "num_requests": 16, "prefill_pages": 24, "max_running": 16, "faults": 0.1})


@part("ends")
def ends(seed: int) -> object:
    """Cancels, deadlines, drains: every request ends once, at once, and gives everything back."""
    return simulate(seed, **_ALONE, num_requests=10, cancels=0.4, deadlines=0.3, drains=seed % 2)


@part("stages")
def stages(seed: int) -> object:
    """A steady load on four stages: all of them compute, and nobody decodes in two plans."""
    steady = run_steady(4, Load(seconds=2.0, concurrency=16 + seed % 8, prompt_tokens=16))
    assert max(steady.bubbles) <= BUBBLES, f"stages computed nothing in {max(steady.bubbles):.0%} of the time"
    return steady


@part("ranks")
def ranks(seed: int) -> object:
    """Hand-offs between workers that are cut differently, in both directions."""
    one, other = Sharding(1 + seed % 2 * 3, 1 + seed % 3), Sharding(2, 1 + seed % 2)
    cut = (one, other) if seed % 4 < 2 else (other, one)
    return simulate(seed, **{**_PAIR, "num_requests": 8}, prefill_sharding=cut[0], decode_sharding=cut[1])
