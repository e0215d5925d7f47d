"""Bounds of a request, checked by the gateway. Those of the model and its workers are `ModelLimits`."""

from __future__ import annotations

from dataclasses import dataclass

MAX_SEQUENCES = 64
MAX_STOP_STRINGS = 32
MAX_STOP_CHARS = 256
MAX_MESSAGES = 4096
MAX_TOOLS = 256
MAX_REQUEST_ID_CHARS = 128
MAX_CACHE_SALT_CHARS = 256
SEED_BITS = 63
GREEDY_BELOW = 1e-5  # a temperature that small divides logits to infinity; it means greedy


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What the ready workers take. 0: not known, not checked."""

    max_context_tokens: int = 0
    max_prompt_tokens: int = 0
    max_total_tokens: int = 0  # prompt and output of one request must fit into a pool
    vocab_size: int = 0
    eos_token_ids: tuple[int, ...] = ()

    def max_output_tokens(self, prompt_tokens: int) -> int | None:
        """Return how many tokens may follow a prompt; None if that is not known."""
        bounds = []
        if self.max_context_tokens:
            bounds.append(self.max_context_tokens - prompt_tokens)
        if self.max_total_tokens:
            bounds.append(self.max_total_tokens - prompt_tokens)
        return max(0, min(bounds)) if bounds else None
