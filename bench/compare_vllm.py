"""vLLM's process of bench/compare.py: its CPU build, the engine's steps taken and timed one by one.

Option `eager`: no torch.compile. Prefix caching is on, so that the contexts of decode steps are computed once; prompts
of prefill are new every time.
"""

from __future__ import annotations

import os
import time
from typing import Any

from compare_protocol import Setup, prompts_of, serve

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0)))))


class VllmEngine:
    def __init__(self, setup: Setup) -> None:
        import vllm

        self._setup = setup
        batched = max(*(batch * setup.prompt_tokens for batch in setup.prefill_batches), 2048)
        self._llm = vllm.LLM(
            setup.model,
            dtype=setup.options["dtype"],
            skip_tokenizer_init=True,
            enforce_eager=setup.options["eager"],
            max_model_len=max(setup.prompt_tokens, setup.context + 2 * setup.steps) + 16,
            max_num_seqs=max(*setup.prefill_batches, *setup.decode_batches),
            max_num_batched_tokens=batched,
            enable_prefix_caching=True,
            disable_log_stats=True,
        )
        self._number = 0
        mode = "eager" if setup.options["eager"] else "torch.compile"
        self.version = f"{vllm.__version__}, {mode}, {setup.options['dtype']}"

    def prefill(self, prompts: list[list[int]]) -> tuple[float, list[int]]:
        names = [self._add(prompt, 1) for prompt in prompts]
        began = time.perf_counter()
        tokens: dict[str, int] = {}
        while self._llm.llm_engine.has_unfinished_requests():
            for output in self._llm.llm_engine.step():
                tokens[output.request_id] = output.outputs[0].token_ids[0]
        seconds = time.perf_counter() - began
        by_number = sorted(tokens.items(), key=lambda item: int(item[0].split("-")[0]))
        assert len(by_number) == len(names)
        return seconds, [token for _, token in by_number]

    def decode(self, batch: int) -> list[float]:
        contexts = [prompts_of(self._setup, 0, batch)[number][: self._setup.context] for number in range(batch)]
        for context in contexts:
            self._add(context, 2 * self._setup.steps)
        times: list[float] = []
        while self._llm.llm_engine.has_unfinished_requests():
            began = time.perf_counter()
            outputs = self._llm.llm_engine.step()
            seconds = time.perf_counter() - began
            lengths = [len(output.outputs[0].token_ids) for output in outputs]
            if len(lengths) == batch and min(lengths) > 1:  # everybody decoded; a prompt's first token is not a step
                times.append(seconds)
        return times[: self._setup.steps]

    def _add(self, prompt: list[int], max_tokens: int) -> str:
        from vllm import SamplingParams

        self._number += 1
        params: Any = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        self._llm.llm_engine.add_request(str(self._number), {"prompt_token_ids": prompt}, params)
        return str(self._number)


if __name__ == "__main__":
    serve(VllmEngine)
