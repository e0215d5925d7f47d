"""Rotary position embedding: which variant a checkpoint asks for, and its frequencies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tandem.engine.models.fields import Fields

_COMMON = frozenset({"rope_theta", "rope_type", "type", "partial_rotary_factor"})
_KEYS = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor", "original_max_position_embeddings"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
            "finetuned",
        }
    ),
}


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Every position divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Slow frequencies divided by `factor`, fast ones kept, those between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """Slow frequencies divided by `factor`, fast ones kept, a ramp over dimensions between; queries and keys scaled."""

    factor: float
    original_context: int
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool


@dataclass(frozen=True, slots=True)
class RopeSpec:
    theta: float
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None

    @property
    def attention_factor(self) -> float:
        """What cosine and sine are multiplied with."""
        return self.scaling.attention_factor if isinstance(self.scaling, YarnScaling) else 1.0


def parse_rope(fields: Fields, default_theta: float) -> tuple[RopeSpec, int]:
    """Read a config's rope in its published (rope_theta, rope_scaling) or newer (rope_parameters) spelling.

    Returns the rope and the context length that it allows. What is not understood is noted as a fault: an unknown
    type, an unknown parameter, a partial rotation.
    """
    context = fields.integer("max_position_embeddings", 2048)
    both = [name for name in ("rope_scaling", "rope_parameters") if fields.values.get(name)]
    scaling = fields.inner(both[0] if both else "rope_scaling")
    theta = scaling.optional_number("rope_theta") or fields.number("rope_theta", default_theta)
    kind = scaling.text("rope_type") or scaling.text("type") or "default"
    if kind not in _KEYS:
        scaling.fault(f"rope type {kind!r} is not supported (supported: {', '.join(_KEYS)})")
        return RopeSpec(theta), context
    for name in sorted(set(scaling.values) - _COMMON - _KEYS[kind]):
        if scaling.values[name] is not None:
            scaling.fault(f"parameter {name} of rope type {kind!r} is not supported")
    for place in (fields, scaling):
        if place.number("partial_rotary_factor", 1.0) != 1.0:
            place.fault("partial_rotary_factor other than 1 is not supported")
    if kind == "linear":
        return RopeSpec(theta, LinearScaling(scaling.number("factor"))), context
    if kind in ("llama3", "yarn"):
        original = fields.optional_integer("original_max_position_embeddings")
        original = original or scaling.integer("original_max_position_embeddings", context)
        if kind == "llama3":
            return RopeSpec(theta, _parse_llama3(scaling, original)), context
        yarn = _parse_yarn(scaling, original, context)
        return RopeSpec(theta, yarn), max(context, int(original * yarn.factor))
    # `dynamic` changes frequencies only beyond max_position_embeddings, where they would depend on the length of
    # the request and no cached key could be shared: such positions are not served, and below it is the default.
    return RopeSpec(theta), context


def _parse_llama3(scaling: Fields, original_context: int) -> Llama3Scaling:
    parsed = Llama3Scaling(
        factor=scaling.number("factor"),
        low_freq_factor=scaling.number("low_freq_factor"),
        high_freq_factor=scaling.number("high_freq_factor"),
        original_context=original_context,
    )
    if parsed.high_freq_factor == parsed.low_freq_factor:
        scaling.fault("high_freq_factor equals low_freq_factor")
    return parsed


def _parse_yarn(scaling: Fields, original_context: int, context: int) -> YarnScaling:
    factor = scaling.number("factor", context / original_context)
    attention_factor = scaling.optional_number("attention_factor")
    if attention_factor is None:
        mscale = scaling.number("mscale", 0.0, above=-1.0)
        mscale_all_dim = scaling.number("mscale_all_dim", 0.0, above=-1.0)
        if mscale and mscale_all_dim:
            attention_factor = _yarn_scale(factor, mscale) / _yarn_scale(factor, mscale_all_dim)
        else:
            attention_factor = _yarn_scale(factor, 1.0)
    return YarnScaling(
        factor=factor,
        original_context=original_context,
        attention_factor=attention_factor,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        truncate=scaling.flag("truncate", True),
    )


def _yarn_scale(factor: float, multiplier: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """Radians per position of each rotated pair. [head_dim / 2], float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    match rope.scaling:
        case LinearScaling(factor):
            return frequencies / factor
        case Llama3Scaling() as llama3:
            return _scale_llama3(frequencies, llama3)
        case YarnScaling() as yarn:
            return _scale_yarn(frequencies, yarn, rope.theta, head_dim)
        case None:
            return frequencies


def _scale_llama3(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    turns = scaling.original_context * frequencies / (2 * math.pi)  # in the context that the model was trained with
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def _scale_yarn(frequencies: torch.Tensor, scaling: YarnScaling, theta: float, head_dim: int) -> torch.Tensor:
    def dimension_of(turns: float) -> float:
        """The dimension (of head_dim) whose frequency makes that many turns in the original context."""
        return head_dim * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001  # a step instead of a ramp
    divided = ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0.0, 1.0)
    return frequencies * (1.0 - divided) + frequencies / scaling.factor * divided
