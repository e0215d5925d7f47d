"""What an answer must be: transformers on the same checkpoint, fed the answer's own tokens (teacher forcing).

One forward pass checks a whole greedy answer. A token counts as right if its logit is within TIE of the largest, so
that no verdict rests on a near-tie. The workers' own operators, run on the whole answer at once, have to agree without
any tolerance: nothing that happened to a request may have changed a bit of it.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import torch

from tandem.demo import model_path
from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb
from tests.e2e.twin import Twin
from tests.engine.checkpoints import Variant, write_checkpoint

VOCABULARY = 4096
CONTEXT = 4096
EOS = VOCABULARY - 1
TIE = 1e-3
LLAMA = Variant("e2e", "LlamaConfig", published=True)
# 50 MB are read a step, for milliseconds: tests that do something to a running request find it still running.
SLOW_LLAMA = Variant("e2e_slow", "LlamaConfig", {"intermediate_size": 1 << 14}, published=True)


def make_checkpoint(folder: Path, variant: Variant = LLAMA) -> Any:
    """Write a tiny random checkpoint with a real tokenizer; return the transformers model of the same weights."""
    model = write_checkpoint(
        variant,
        folder,
        seed=11,
        vocab_size=VOCABULARY,
        eos_token_id=EOS,
        hidden_size=64,
        num_hidden_layers=4,
        max_position_embeddings=CONTEXT,
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_path() / name, folder / name)
    return model


class Oracle:
    """Judges greedy answers of workers that were started with the operators and the type of `twin`."""

    def __init__(self, model: Any, twin: Twin) -> None:
        self._model = model
        self._twin = twin

    def check(self, prompt: list[int], output: list[int], max_tokens: int) -> None:
        """Fail unless `output` is the greedy continuation, ended by EOS or by length."""
        assert 0 < len(output) <= max_tokens
        assert len(output) == max_tokens or output[-1] == EOS, f"{len(output)} tokens, {max_tokens} asked for"
        with torch.no_grad():
            logits = self._model(torch.tensor([prompt + output[:-1]])).logits[0, len(prompt) - 1 :].float()
        chosen = logits[torch.arange(len(output)), torch.tensor(output)]
        behind = logits.max(dim=-1).values - chosen
        worst = int(behind.argmax())
        assert float(behind[worst]) <= TIE, f"token {worst} of {output} is {float(behind[worst])} behind the best"
        self._twin.check(prompt, output)


def random_prompt(source: random.Random, length: int) -> list[int]:
    return [source.randrange(VOCABULARY - 200) for _ in range(length)]


def greedy(prompt: list[int], max_tokens: int) -> pb.GenerateRequest:
    """Return a greedy request in token ids, out and in."""
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt),
        sampling=pb.SamplingParams(temperature=0.0, max_tokens=max_tokens),
        output=pb.OutputOptions(return_token_ids=True, no_text=True, return_timing=True),
    )
