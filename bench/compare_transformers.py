"""The process of `transformers` in bench/compare.py: eager torch with its own attention, a dynamic cache.

Option `dtype`: what the weights are loaded as.
"""

from __future__ import annotations

import time

import torch
import transformers
from compare_protocol import Setup, prompts_of, serve


class TransformersEngine:
    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        torch.set_num_threads(setup.threads)
        dtype = setup.options["dtype"]
        self._model = transformers.AutoModelForCausalLM.from_pretrained(setup.model, dtype=getattr(torch, dtype)).eval()
        self.version = f"{transformers.__version__}, torch {torch.__version__}, {dtype}"

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]]) -> tuple[float, list[int]]:
        began = time.perf_counter()
        output = self._model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        tokens = output.logits[:, -1].argmax(-1).tolist()
        return time.perf_counter() - began, tokens

    @torch.inference_mode()
    def decode(self, batch: int) -> list[float]:
        context = self._setup.context
        prompt = torch.tensor([prompts_of(self._setup, 0, 1)[0][:context]])
        output = self._model(prompt, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        cache.batch_repeat_interleave(batch)  # copies: every request reads keys and values of its own
        tokens = output.logits[:, -1].argmax(-1).repeat(batch)[:, None]
        times = []
        for _ in range(self._setup.steps):
            began = time.perf_counter()
            output = self._model(tokens, past_key_values=cache, use_cache=True)
            tokens = output.logits[:, -1].argmax(-1)[:, None]
            times.append(time.perf_counter() - began)
        return times


if __name__ == "__main__":
    serve(TransformersEngine)
