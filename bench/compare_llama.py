"""llama.cpp's process of bench/compare.py, by llama-cpp-python's plain bindings: batches of sequences, greedy.

Every sequence has keys and values of its own. Options `gguf`: where the converted checkpoint goes.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from compare_gguf import write_gguf
from compare_protocol import Setup, prompts_of, serve

_PADDING = 256  # of a sequence's cells


_WARNING = 3  # ggml's log level


@llama_cpp.llama_log_callback
def _log(level: int, text: bytes, _: Any) -> None:
    if level >= _WARNING:
        print(text.decode(errors="replace"), end="", flush=True)


class LlamaEngine:
    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        path = Path(setup.options["gguf"])
        if not path.exists():
            write_gguf(Path(setup.model), path)
        llama_cpp.llama_log_set(_log, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError("llama.cpp cannot load the checkpoint")
        self._contexts: dict[tuple[str, int], Any] = {}
        self._firsts: dict[int, list[int]] = {}
        self.version = f"llama-cpp-python {llama_cpp.__version__}, {path.stem.rpartition('-')[2]}"

    def prefill(self, prompts: list[list[int]]) -> tuple[float, list[int]]:
        context = self._context("prefill", len(prompts), len(prompts[0]))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        began = time.perf_counter()
        rows = [
            (token, position, number, position == len(prompt) - 1)
            for number, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        tokens = self._compute(context, rows)
        return time.perf_counter() - began, tokens

    def decode(self, batch: int) -> list[float]:
        length = self._setup.context
        context = self._context("decode", batch, length + self._setup.steps)
        memory = llama_cpp.llama_get_memory(context)
        if batch not in self._firsts:
            self._firsts[batch] = [self._fill(context, batch)] * batch
        tokens, times = self._firsts[batch], []
        for step in range(self._setup.steps):
            began = time.perf_counter()
            rows = [(token, length + step, number, True) for number, token in enumerate(tokens)]
            tokens = self._compute(context, rows)
            times.append(time.perf_counter() - began)
        for number in range(batch):
            llama_cpp.llama_memory_seq_rm(memory, number, length, -1)
        return times

    def _fill(self, context: Any, batch: int) -> int:
        """Compute one context, copy it to every sequence, and return the token after it."""
        prompt = prompts_of(self._setup, 0, 1)[0][: self._setup.context]
        rows = [(token, position, 0, position == len(prompt) - 1) for position, token in enumerate(prompt)]
        (token,) = self._compute(context, rows)
        size = llama_cpp.llama_state_seq_get_size(context, 0)
        state = (llama_cpp.ctypes.c_uint8 * size)()
        llama_cpp.llama_state_seq_get_data(context, state, size, 0)
        for number in range(1, batch):
            if not llama_cpp.llama_state_seq_set_data(context, state, size, number):
                raise RuntimeError("a sequence could not be copied")
        return token

    def _compute(self, context: Any, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute tokens (id, position, sequence, whether it is sampled) and return those sampled."""
        batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, sampled) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = sampled
        status = llama_cpp.llama_decode(context, batch)
        llama_cpp.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        wanted = [index for index, row in enumerate(rows) if row[3]]
        return [int(self._logits(context, index).argmax()) for index in wanted]

    def _logits(self, context: Any, index: int) -> np.ndarray:
        pointer = llama_cpp.llama_get_logits_ith(context, index)
        return np.ctypeslib.as_array(pointer, shape=(self._setup.vocab_size,))

    def _context(self, kind: str, num_sequences: int, num_tokens: int) -> Any:
        each = -(-num_tokens // _PADDING) * _PADDING
        key = (kind, num_sequences)
        if key not in self._contexts:
            parameters = llama_cpp.llama_context_default_params()
            parameters.n_ctx = num_sequences * each
            parameters.n_seq_max = num_sequences
            parameters.n_batch = max(2048, num_sequences * num_tokens)
            parameters.n_threads = parameters.n_threads_batch = self._setup.threads
            parameters.kv_unified = False
            parameters.no_perf = True
            context = llama_cpp.llama_init_from_model(self._model, parameters)
            if not context:
                raise RuntimeError("llama.cpp cannot make a context")
            self._contexts[key] = context
        return self._contexts[key]


if __name__ == "__main__":
    serve(LlamaEngine)
