"""What an answer must be to the last bit: the workers' own operators, fed the answer's own tokens at once, alone.

One forward pass over prompt and output gives the logits that every position of the answer was drawn from, if they
depend on nothing but the tokens before it: docs/numerics.md says so of operators with a `numerics` id.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from tandem.config import OperatorChoice
from tandem.core.messages.plans import Plan, Row
from tandem.core.messages.sampling import TokenLogprob
from tandem.engine.batch import build_batch
from tandem.engine.logprobs import token_logprobs
from tandem.engine.models.decoder import Decoder
from tandem.engine.models.spec import read_spec
from tandem.engine.ops.choice import choose_operators
from tandem.engine.pool import TORCH_DTYPES
from tandem.engine.weights import CheckpointFiles

PAGE_TOKENS = 16


class Twin:
    """The model as a worker computes it that was started with this choice of operators and type, on one thread."""

    def __init__(self, folder: Path, ops: OperatorChoice = "auto", dtype: str = "float32") -> None:
        device = torch.device("cpu")
        self._spec = read_spec(folder)
        self._dtype = TORCH_DTYPES[dtype]
        operators = choose_operators(ops, dtype, device, 1, lambda _: None)
        self.is_exact = bool(operators.numerics)
        with torch.inference_mode(), CheckpointFiles(folder, self._spec) as files:
            self._decoder = Decoder(self._spec, files.load(self._dtype, device, lambda _: None).tensors, operators)

    def logits(self, prompt: Sequence[int], output: Sequence[int]) -> torch.Tensor:
        """Return the logits [outputs, vocabulary] that each token of an answer was drawn from."""
        tokens = (*prompt, *output[:-1])
        pages = tuple(range(-(-len(tokens) // PAGE_TOKENS)))
        row = Row(request_id=0, slot=0, start=0, num_tokens=len(tokens), token_ids=tokens, pages=pages)
        batch = build_batch(Plan(0, (row,)), PAGE_TOKENS)
        spec = self._spec
        shape = (len(pages), spec.num_layers, 2, spec.num_kv_heads, PAGE_TOKENS, spec.head_dim)
        with torch.inference_mode():
            pool = torch.zeros(shape, dtype=self._dtype)
            residual = self._decoder.forward(torch.from_numpy(batch.token_ids), batch.batch, pool)
            return self._decoder.logits(residual[len(prompt) - 1 :])

    def check(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Fail unless a greedy answer has, at every position, the first of the largest logits."""
        if self.is_exact:
            assert self.logits(prompt, output).argmax(dim=-1).tolist() == list(output)

    def logprobs(self, prompt: Sequence[int], output: Sequence[int], num_top: int) -> list[TokenLogprob]:
        """Return what a client gets with an answer that asks for log-probabilities."""
        logits = self.logits(prompt, output)
        return token_logprobs(logits, torch.tensor(list(output)), [num_top] * len(output))
