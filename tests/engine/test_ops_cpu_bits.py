"""The bits of a row do not depend on its batch, its chunks, its pages, nor on the number of threads."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch

from tandem.engine.models.decoder import Decoder
from tandem.engine.models.experts import ExpertsSpec
from tandem.engine.models.rope import RopeSpec
from tandem.engine.models.spec import DecoderSpec
from tandem.engine.models.tensors import expected_tensors, is_kept_wide
from tandem.engine.ops.composed import ComposedLayers
from tandem.engine.ops.contract import LayerParts, LayerStack
from tandem.engine.ops.cpu import CpuOperators
from tests.engine.ops_cpu_cases import every_kernel, generator, library, operators, plan

VOCABULARY = 131
PAGE_TOKENS = 8
NUM_PAGES = 400
THREADS = (1, 2, 3, 5)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_linear_rows(kernels: str, dtype: torch.dtype, gated: bool) -> None:
    """Every batch size from 1 to 40 and some large ones: borders of strips, blocks and of widening are among them."""
    random_values = generator(1)
    weights = [torch.randn(90, 777, generator=random_values).to(dtype) for _ in range(2)]
    inputs = torch.randn(521, 777, generator=random_values)
    expected: torch.Tensor | None = None
    for num_threads in THREADS:
        cpu = operators(kernels, num_threads)
        linear = (cpu.gated_linear if gated else cpu.linear)(weights, (None, None))
        if expected is None:
            expected = torch.cat([linear(inputs[row : row + 1]) for row in range(len(inputs))])
        for count in (*range(2, 41), 239, 240, 241, 300, 521):
            first = (count * 37) % (len(inputs) - count + 1)
            assert torch.equal(linear(inputs[first : first + count]), expected[first : first + count]), count


@every_kernel
def test_row_operators(kernels: str) -> None:
    inputs = torch.randn(300, 222, generator=generator(2))
    weight = torch.randn(222, generator=generator(3))
    cpu, alone = operators(kernels, 3), operators(kernels)
    norm = cpu.rms_norm(inputs, weight, 1e-5)
    for row in range(0, 300, 7):
        one = inputs[row : row + 1]
        assert torch.equal(alone.rms_norm(one, weight, 1e-5), norm[row : row + 1])


EXPERTS = ExpertsSpec(
    num_experts=7, experts_per_token=3, intermediate_size=60, normalized=True, layers=(True, False, True)
)


def make_decoder(cpu: CpuOperators, dtype: torch.dtype, experts: ExpertsSpec | None = None) -> Decoder:
    spec = DecoderSpec(
        architecture="Qwen3ForCausalLM" if experts is None else "Qwen3MoeForCausalLM",
        experts=experts,
        vocab_size=VOCABULARY,
        hidden_size=112,
        intermediate_size=200,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=24,
        norm_epsilon=1e-6,
        rope=RopeSpec(1e4),
        windows=(None, 37, 300),
        qkv_bias=True,
        output_bias=False,
        mlp_bias=False,
        head_norms=True,
        tied_embeddings=True,
        max_context_tokens=4096,
        eos_token_ids=(),
        dtype="bfloat16",
    )
    random_values = generator(4)
    tensors = {}
    for name, shape in sorted(expected_tensors(spec).items()):
        values = torch.randn(shape, generator=random_values) * (0.1 if len(shape) == 2 else 1.0)
        tensors[name] = values if is_kept_wide(name) else values.to(dtype)
    return Decoder(spec, tensors, cpu)


@dataclass
class Request:
    tokens: list[int]
    pages: list[int]
    computed: int = 0
    logits: list[torch.Tensor] = field(default_factory=list)  # of every position


class Batches:
    """Computes requests in random plans over one pool with NaN in its free slots."""

    def __init__(self, decoder: Decoder, dtype: torch.dtype, seed: int) -> None:
        self._decoder = decoder
        self._random = random.Random(seed)
        self._pool = torch.full((NUM_PAGES, 3, 2, 2, PAGE_TOKENS, 24), float("nan")).to(dtype)
        self._free = list(range(NUM_PAGES))
        self._random.shuffle(self._free)

    def request(self, tokens: list[int]) -> Request:
        return Request(tokens, [self._free.pop() for _ in range(-(-len(tokens) // PAGE_TOKENS))])

    def compute(self, requests: list[Request], chunk_max: int) -> None:
        while waiting := [request for request in requests if request.computed < len(request.tokens)]:
            chosen = self._random.sample(waiting, self._random.randint(1, len(waiting)))
            rows = [
                (one.computed, min(len(one.tokens) - one.computed, self._random.randint(1, chunk_max)))
                for one in chosen
            ]
            batch = plan(rows, PAGE_TOKENS, [one.pages for one in chosen])
            ids = [
                token for one, (start, count) in zip(chosen, rows, strict=True) for token in one.tokens[start:][:count]
            ]
            residual = self._decoder.forward(torch.tensor(ids), batch, self._pool)
            logits = self._decoder.logits(residual)
            for number, (one, (_, count)) in enumerate(zip(chosen, rows, strict=True)):
                one.computed += count
                one.logits.append(logits[batch.offsets[number] : batch.offsets[number + 1]])


@every_kernel
@pytest.mark.parametrize(
    ("dtype", "experts"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, EXPERTS)]
)
def test_requests(kernels: str, dtype: torch.dtype, experts: ExpertsSpec | None) -> None:
    """Logits of every position of a request: whole and alone, then in chunks among others, on any pages and threads."""
    tokens = [[random.Random(seed).randrange(VOCABULARY) for _ in range(530)] for seed in range(2)]
    expected: torch.Tensor | None = None
    with torch.inference_mode():
        for seed, num_threads in enumerate(THREADS):
            batches = Batches(make_decoder(operators(kernels, num_threads), dtype, experts), dtype, seed)
            request = batches.request(tokens[0])
            if expected is None:
                batches.compute([request], chunk_max=1 << 20)
                (expected,) = request.logits if len(request.logits) == 1 else (torch.cat(request.logits),)
                continue
            others = [batches.request(tokens[1][: 20 + 30 * number]) for number in range(1 + 3 * seed)]
            batches.compute([request, *others], chunk_max=(1, 4, 90, 300)[seed])
            assert torch.equal(torch.cat(request.logits), expected), (seed, num_threads)
    assert expected is not None
    assert expected.isfinite().all()


class OneByOne(CpuOperators):
    """The operators one after another, each a region of its own."""

    def layers(self, parts: Sequence[LayerParts], epsilon: float) -> LayerStack:
        return ComposedLayers(self, parts, epsilon)


@every_kernel
@pytest.mark.parametrize("experts", [None, EXPERTS], ids=["dense", "experts"])
def test_layers_in_one_region_are_the_operators_one_by_one(kernels: str, experts: ExpertsSpec | None) -> None:
    tokens = [random.Random(7).randrange(VOCABULARY) for _ in range(400)]
    results = []
    for cpu in (operators(kernels, 3), OneByOne(kernels, 2, library())):
        with torch.inference_mode():
            batches = Batches(make_decoder(cpu, torch.bfloat16, experts), torch.bfloat16, 8)
            requests = [batches.request(tokens), batches.request(tokens[:90])]
            batches.compute(requests, chunk_max=170)
        results.append(torch.cat(requests[0].logits))
    assert torch.equal(*results)


def test_wider_registers_give_the_same_bits() -> None:
    """AVX2 and AVX-512 share one arithmetic, and so one `numerics`."""
    names = [operators(kernels).numerics for kernels in ("avx2", "avx512")]
    assert names[0] == names[1] != ""
    tokens = [random.Random(5).randrange(VOCABULARY) for _ in range(400)]
    results = []
    for kernels in ("avx2", "avx512"):
        with torch.inference_mode():
            batches = Batches(make_decoder(operators(kernels, 2), torch.bfloat16, EXPERTS), torch.bfloat16, 6)
            request = batches.request(tokens)
            batches.compute([request], chunk_max=150)
        results.append(torch.cat(request.logits))
    assert torch.equal(*results)
