"""A model that can be computed by hand: what a slot holds, and the next token, are hashes of every slot before.

A page with one wrong slot anywhere in the prefix changes every later slot and token.
"""

from __future__ import annotations

from collections.abc import Sequence

from tandem.core.messages.sampling import SamplingParams

_MASK = (1 << 61) - 1
VOCABULARY = 97


def mix(a: int, b: int) -> int:
    x = (a * 0x9E3779B97F4A7C15 + b * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & ((1 << 64) - 1)
    x ^= x >> 29
    return (x * 0xD6E8FEB86659FD93) & _MASK


def slot_value(token: int, position: int, prefix_sum: int) -> int:
    """What the KV slot of `position` holds, given the sum of all slots before; never 0, which is an unused slot."""
    return mix(mix(token + 1, position + 1), prefix_sum) | 1


def draw(prefix_sum: int, seed: int, output_index: int, banned: Sequence[int], history: Sequence[int]) -> int:
    value = mix(mix(prefix_sum, seed + 1), output_index + 1)
    for token in history:
        value = mix(value, token + 1)
    while value % VOCABULARY in banned:
        value = mix(value, 1)
    return value % VOCABULARY


def page_checksum(slots: Sequence[int]) -> int:
    total = 0x5EED
    for value in slots:
        total = mix(total, value + 1)
    return total


def reference(prompt: Sequence[int], sampling: SamplingParams, eos: int, max_context: int) -> list[int]:
    """Return the output of an undisturbed single run."""
    total = 0
    for position, token in enumerate(prompt):
        total = (total + slot_value(token, position, total)) & _MASK
    output: list[int] = []
    while len(output) < sampling.max_tokens and len(prompt) + len(output) < max_context:
        banned = (eos,) if len(output) < sampling.min_tokens else ()
        history = (*prompt, *output) if sampling.needs_history else ()
        token = draw(total, sampling.seed, len(output), banned, history)
        output.append(token)
        if token == eos:
            break
        total = (total + slot_value(token, len(prompt) + len(output) - 1, total)) & _MASK
    return output


def add(prefix_sum: int, value: int) -> int:
    return (prefix_sum + value) & _MASK
