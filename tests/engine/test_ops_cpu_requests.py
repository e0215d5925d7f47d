"""What happens to a request beside being computed - a crowd, a shared prefix, a retraction - changes no bit of it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache

import pytest
import torch

from tandem.core.messages.sampling import TokenLogprob
from tandem.engine.logprobs import token_logprobs
from tests.engine.ops_cpu_cases import every_kernel, operators
from tests.engine.test_ops_cpu_bits import NUM_PAGES, PAGE_TOKENS, VOCABULARY, Batches, Request, make_decoder

TOKENS = tuple(random.Random(11).randrange(VOCABULARY) for _ in range(333))
PREFIX_PAGES = 19
DTYPE = torch.bfloat16


@cache
def alone(kernels: str) -> torch.Tensor:
    """Logits of every position: one thread, one plan, nobody else."""
    batches = Batches(make_decoder(operators(kernels), DTYPE), DTYPE, 0)
    request = batches.request(list(TOKENS))
    with torch.inference_mode():
        batches.compute([request], chunk_max=1 << 20)
    return torch.cat(request.logits)


def crowd(batches: Batches, source: random.Random, count: int) -> Iterator[Request]:
    """Others of all lengths, as far as there are pages."""
    left = NUM_PAGES - 3 * (len(TOKENS) // PAGE_TOKENS + 1)
    for _ in range(count):
        length = source.randint(1, max(1, min(120, left * PAGE_TOKENS // count)))
        yield batches.request([source.randrange(VOCABULARY) for _ in range(length)])


@every_kernel
@pytest.mark.parametrize("count", [2, 9, 64])
def test_in_a_crowd(kernels: str, count: int) -> None:
    source = random.Random(count)
    batches = Batches(make_decoder(operators(kernels, source.randint(1, 4)), DTYPE), DTYPE, count)
    request = batches.request(list(TOKENS))
    with torch.inference_mode():
        batches.compute([request, *crowd(batches, source, count)], chunk_max=source.choice((3, 50, 200)))
    assert torch.equal(torch.cat(request.logits), alone(kernels))


@every_kernel
def test_on_the_prefix_of_another(kernels: str) -> None:
    """The first pages are those that another request computed, in chunks of its own and among others."""
    source = random.Random(5)
    batches = Batches(make_decoder(operators(kernels, 2), DTYPE), DTYPE, 5)
    shared = PREFIX_PAGES * PAGE_TOKENS
    donor = batches.request([*TOKENS[:shared], *(source.randrange(VOCABULARY) for _ in range(60))])
    with torch.inference_mode():
        batches.compute([donor, *crowd(batches, source, 5)], chunk_max=37)
        request = batches.request(list(TOKENS))
        request.pages[:PREFIX_PAGES] = donor.pages[:PREFIX_PAGES]
        request.computed = shared
        batches.compute([request, *crowd(batches, source, 5)], chunk_max=23)
    assert torch.equal(torch.cat(request.logits), alone(kernels)[shared:])


@every_kernel
def test_after_a_retraction(kernels: str) -> None:
    """It loses its pages half-way, others write into them, and it begins anew on other pages."""
    source = random.Random(6)
    batches = Batches(make_decoder(operators(kernels, 3), DTYPE), DTYPE, 6)
    victim = batches.request(list(TOKENS[:200]))
    with torch.inference_mode():
        batches.compute([victim, *crowd(batches, source, 4)], chunk_max=30)
        thief = Request([source.randrange(VOCABULARY) for _ in range(len(victim.pages) * PAGE_TOKENS)], victim.pages)
        again = batches.request(list(TOKENS))
        batches.compute([thief, again], chunk_max=64)
    assert torch.equal(torch.cat(victim.logits), alone(kernels)[:200])
    assert torch.equal(torch.cat(again.logits), alone(kernels))


@pytest.mark.parametrize("vocabulary", [131, 4096, 151_936])
def test_log_probabilities_do_not_depend_on_the_batch(vocabulary: int) -> None:
    """Torch adds up each row in its own order, whatever is beside it."""
    logits = torch.randn(9, vocabulary, generator=torch.Generator().manual_seed(7)) * 3
    tokens = torch.arange(9)
    single: list[TokenLogprob] = []
    for row in range(9):
        single += token_logprobs(logits[row : row + 1], tokens[row : row + 1], [4])
    for count in range(2, 10):
        assert token_logprobs(logits[:count], tokens[:count], [4] * count) == single[:count]
