"""How tokens are drawn, and what is said about them. Values only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """One request's sampling, every default resolved (the gateway merges generation_config.json and mints a seed).

    `temperature == 0` is greedy. `top_k == 0` and `top_p == 1` and `min_p == 0` are off.
    The draw for output index i is a function of (logits, seed, i) only.
    `max_tokens == 0` scores the prompt and ends. `logprobs` and `prompt_logprobs`: None is off, n is the chosen
    token's log-probability plus the n most likely alternatives.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def needs_history(self) -> bool:
        """Whether a draw depends on the tokens before it beyond the logits; such a request runs with chain 1."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability (natural log, of the raw model distribution) of one token, and of the `top` alternatives.

    `logprob` is None only for the first prompt token, which nothing predicts.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()
