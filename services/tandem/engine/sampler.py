"""Draws tokens: a batch of rows at once, each row's token a function of its own logits, seed and output index only.

The order of operations is bias, penalties, bans, temperature, min_p, top_k, top_p.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tandem.core.messages.plans import Sample
from tandem.engine.ordering import top_values
from tandem.engine.uniforms import uniforms

# Logits worked on at a time by kind of device: bounds the temporaries. Small ones stay in a CPU's cache.
_CHUNK_ELEMENTS = {"cpu": 1 << 20}
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 23
_ELEMENT_BYTES = 64  # of the temporaries that exist at once, for each of these logits
_CANDIDATES = 256  # most supports of top_k and top_p fit in; a row that needs more is ordered completely


def sample_tokens(logits: torch.Tensor, samples: Sequence[Sample]) -> torch.Tensor:
    """Draw one token for each row. logits [n, vocabulary] float32, left unchanged -> [n] int64 on the same device.

    Temperature 0 takes the largest logit, the lowest id among equals. A row that has no distribution (NaN, +inf,
    nothing allowed) takes the largest of what it has and disturbs no other row.
    """
    at_once = _rows_at_once(logits.device, logits.shape[-1])
    parts = [
        _sample(logits[start : start + at_once], samples[start : start + at_once])
        for start in range(0, len(samples), at_once)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def sampling_bytes(device: torch.device, vocab_size: int) -> int:
    """Return the bytes that drawing takes at once beside the logits, however many rows there are."""
    return _rows_at_once(device, vocab_size) * vocab_size * _ELEMENT_BYTES


def _rows_at_once(device: torch.device, vocab_size: int) -> int:
    return max(1, _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS_ELSEWHERE) // vocab_size)


def _sample(logits: torch.Tensor, samples: Sequence[Sample]) -> torch.Tensor:
    logits = _adjusted(logits, samples)
    drawn_rows = [row for row, sample in enumerate(samples) if sample.params.temperature > 0]
    if not drawn_rows:
        return _largest(logits)
    logits = _without_nan(logits)
    greedy = _largest(logits)
    chosen = [samples[row] for row in drawn_rows]
    rows = torch.tensor(drawn_rows, device=logits.device)
    scaled = logits if len(drawn_rows) == len(samples) else logits[rows]
    largest = scaled.amax(dim=-1, keepdim=True)
    has_distribution = largest.isfinite()[:, 0]
    # The largest becomes 0 first, so that no temperature overflows and exp needs no further care.
    temperatures = _column([sample.params.temperature for sample in chosen], logits)
    scaled = torch.where(has_distribution[:, None], (scaled - largest) / temperatures, 0.0)
    drawn = _draw(scaled, chosen)
    return greedy.index_put((rows,), torch.where(has_distribution, drawn, greedy[rows]))


def _largest(logits: torch.Tensor) -> torch.Tensor:
    """Index of each row's largest value, the lowest among equals; NaN is never it. On a CPU nothing is copied."""
    if logits.device.type != "cpu":
        return _without_nan(logits).argmax(dim=-1)
    values = logits.numpy()
    largest = values.argmax(axis=-1)  # ten times as fast as torch's own
    if np.isnan(values[np.arange(len(values)), largest]).any():  # numpy, too, takes NaN for the largest
        return _largest(_without_nan(logits))
    return torch.from_numpy(largest)


def _without_nan(logits: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(logits, nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))


def _adjusted(logits: torch.Tensor, samples: Sequence[Sample]) -> torch.Tensor:
    """Logits with bias, penalties and bans; the very same tensor if no row has any."""
    biased = [(row, token, value) for row, s in enumerate(samples) for token, value in s.params.logit_bias]
    penalised = [row for row, sample in enumerate(samples) if sample.params.needs_history and sample.history]
    banned = [(row, token) for row, sample in enumerate(samples) for token in sample.banned]
    if not (biased or penalised or banned):
        return logits
    logits = logits.clone()
    vocabulary = logits.shape[-1]
    _put(logits, [entry for entry in biased if entry[1] < vocabulary], accumulate=True)
    for row in penalised:
        _penalise(logits[row], samples[row])
    _put(logits, [(row, token, float("-inf")) for row, token in banned if token < vocabulary], accumulate=False)
    return logits


def _put(logits: torch.Tensor, entries: Sequence[tuple[int, int, float]], *, accumulate: bool) -> None:
    """Set or add to logits in place; entries are (row, token, value)."""
    if entries:
        rows, tokens, values = zip(*entries, strict=True)
        where = torch.tensor(rows, device=logits.device), torch.tensor(tokens, device=logits.device)
        logits.index_put_(where, logits.new_tensor(values), accumulate=accumulate)


def _penalise(row: torch.Tensor, sample: Sample) -> None:
    """Apply the penalties to one row in place: repetition over prompt and output, the others over the output."""
    params = sample.params
    history = np.fromiter(sample.history, dtype=np.int64, count=len(sample.history))
    seen = torch.from_numpy(np.unique(history[history < len(row)])).to(row.device)
    values = row[seen]
    row[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    output = history[sample.num_prompt :]
    tokens, counts = np.unique(output[output < len(row)], return_counts=True)
    penalty = params.frequency_penalty * counts + params.presence_penalty
    row[torch.from_numpy(tokens).to(row.device)] -= torch.from_numpy(penalty).to(row)


def _draw(scaled: torch.Tensor, samples: Sequence[Sample]) -> torch.Tensor:
    """Draw from rows whose largest value is 0. The filters decide which of two orders a row is summed up in."""
    numbers = uniforms([sample.params.seed for sample in samples], [sample.output_index for sample in samples])
    targets = torch.from_numpy(numbers).to(scaled.device)[:, None]
    # A token below min_p times the largest probability is one whose (scaled) logit is below log(min_p).
    floors = _column([_log(sample.params.min_p) for sample in samples], scaled)
    weights = torch.where(scaled >= floors, scaled, float("-inf"))
    ordered = [row for row, sample in enumerate(samples) if _needs_order(sample, scaled.shape[-1])]
    if not ordered:
        return _pick(weights.exp().double(), targets)
    if len(ordered) == len(samples):
        return _draw_ordered(weights, samples, targets)
    plain = sorted(set(range(len(samples))) - set(ordered))
    drawn = torch.empty(len(samples), dtype=torch.int64, device=scaled.device)
    drawn[plain] = _pick(weights[plain].exp().double(), targets[plain])
    drawn[ordered] = _draw_ordered(weights[ordered], [samples[row] for row in ordered], targets[ordered])
    return drawn


def _needs_order(sample: Sample, vocabulary: int) -> bool:
    return sample.params.top_p < 1.0 or 0 < sample.params.top_k < vocabulary


def _draw_ordered(weights: torch.Tensor, samples: Sequence[Sample], targets: torch.Tensor) -> torch.Tensor:
    """Draw under top_k and top_p, over tokens in falling order of probability."""
    vocabulary = weights.shape[-1]
    everything = weights.exp().double().cumsum(dim=-1)[:, -1:]  # unlike sum, in one order for any number of rows
    limits = [sample.params.top_k if 0 < sample.params.top_k < vocabulary else vocabulary for sample in samples]
    top_k = torch.tensor(limits, device=weights.device)[:, None]
    top_p = torch.tensor([[sample.params.top_p] for sample in samples], dtype=torch.float64, device=weights.device)
    count = min(vocabulary, _CANDIDATES)
    values, tokens, certain = top_values(weights, count)
    kept, num_kept = _kept(values.exp().double(), everything, top_k, top_p)
    drawn = tokens.gather(-1, _pick(kept, targets)[:, None])[:, 0]
    too_few = (top_k > count) & (top_k < vocabulary)
    for row in ((num_kept > certain) | too_few[:, 0]).nonzero()[:, 0].tolist():
        only = slice(row, row + 1)
        values, tokens, _ = top_values(weights[only], vocabulary)
        kept, _ = _kept(values.exp().double(), everything[only], top_k[only], top_p[only])
        drawn[row] = tokens[0, _pick(kept, targets[only])[0]]
    return drawn


def _kept(
    ordered: torch.Tensor, everything: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities in falling order with those outside of top_k and top_p set to 0, and how many are left a row.

    A token stays under top_p if those before it do not reach top_p of all that top_k (or min_p alone) has left.
    """
    within_k = torch.where(torch.arange(ordered.shape[-1], device=ordered.device) < top_k, ordered, 0.0)
    sums = within_k.cumsum(dim=-1)
    total = torch.where(top_k <= ordered.shape[-1], sums[:, -1:], everything)
    keep = (sums - within_k < top_p * total) & (within_k > 0)
    keep[:, 0] = True  # also where top_p is 0
    return torch.where(keep, within_k, 0.0), keep.sum(dim=-1)


def _pick(weights: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Index at which the running sum of each row passes its target's share of the total. [n, V], [n, 1] -> [n]"""
    sums = weights.cumsum(dim=-1)
    picked = torch.searchsorted(sums, targets * sums[:, -1:], right=True)
    # Rounding may put the target at the total: then the last index with a weight, where the sum reaches its end.
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())
    return torch.minimum(picked, last)[:, 0]


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _log(value: float) -> float:
    return float(np.log(value)) if value > 0 else float("-inf")
