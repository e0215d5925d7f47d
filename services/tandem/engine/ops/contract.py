"""The contract of an operator set: what the decoder asks for, and nothing about how it is done.

Shapes: N tokens of a plan, all rows one after another; H hidden size; Q query heads; K key/value heads; D head_dim.
Activations have the operator set's own type (`activation_dtype`); the residual stream, norm statistics and softmax
are float32. Tensors that an operator returns belong to the caller unless its sentence says otherwise. An operator
set is used by one thread at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Where a plan's tokens stand. Host arrays, int64; R rows.

    Row r has the tokens [offsets[r], offsets[r + 1]) at positions starts[r], starts[r] + 1, ...; its position p is in
    page page_table[r, p // page_tokens]. The table is padded with zeros. `slots[n]` is page * page_tokens + slot of
    token n.
    """

    page_tokens: int
    offsets: np.ndarray  # [R + 1]
    starts: np.ndarray  # [R]
    positions: np.ndarray  # [N]
    slots: np.ndarray  # [N]
    page_table: np.ndarray  # [R, pages]

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norm of each query and key head before rope. Weights [D], float32."""

    query: torch.Tensor
    key: torch.Tensor
    epsilon: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """What all layers of a model share. `frequencies` [D / 2] float32: radians per position of each rotated pair."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]  # per layer: last positions that are attended to, own included; None: all
    frequencies: torch.Tensor
    attention_factor: float  # what rope's cosine and sine are multiplied with


class Linear(Protocol):
    """A prepared linear: the outputs of one or several weights over the same input, side by side."""

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[N, inputs] activations -> [N, sum of outputs] activations."""
        ...

    def add_to(self, residual: torch.Tensor, inputs: torch.Tensor) -> None:
        """Add the result for `inputs` [N, inputs] to `residual` [N, outputs] float32, in place."""
        ...

    def plain_weights(self) -> list[torch.Tensor]:
        """The weights that it was prepared from, read back; not to be written to."""
        ...

    def plain_biases(self) -> list[torch.Tensor | None]:
        """The biases that belong to them."""
        ...


class GatedLinear(Linear, Protocol):
    """silu(gate) * up of two linears over the same input, each of `outputs`."""

    def halves(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, inputs] activations -> gate and up in front of the activation, [N, outputs] activations each."""
        ...


class Embedding(Protocol):
    """A prepared table of token vectors."""

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[N] int64 -> [N, H] float32, the residual stream. Raises IndexError for an id outside of the table."""
        ...


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """A gated linear and the linear after it."""

    gate_up: GatedLinear
    down: Linear

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[N, H] -> [N, H] activations."""
        return self.down(self.gate_up(inputs))

    def add_to(self, residual: torch.Tensor, inputs: torch.Tensor) -> None:
        """Add the result for `inputs` [N, H] to `residual` [N, H] float32, in place."""
        self.down.add_to(residual, self.gate_up(inputs))


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert. Gate and up [middle, H], down [H, middle]."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """A token's experts are those that its router's softmax over all puts first, of equal ones the lower number.

    Their probabilities are their weights; `normalized`: divided by their sum. All of it is float32. `here`: numbers of
    the experts that are prepared; where others are chosen, nothing is added.
    """

    experts_per_token: int
    normalized: bool
    here: range


class Experts(Protocol):
    """A router and experts. A token's experts' results are added up in the order of their numbers."""

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[N, H] activations -> [N, H] activations."""
        ...

    def add_to(self, residual: torch.Tensor, inputs: torch.Tensor) -> None:
        """Add the result for `inputs` [N, H] to `residual` [N, H] float32, in place."""
        ...

    def reserve(self, num_tokens: int) -> None:
        """Take the workspace that so many tokens need, without computing."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParts:
    """One decoder layer, its linears prepared by the operator set that runs it. Norm weights [H] float32."""

    input_norm: torch.Tensor
    qkv: Linear
    head_norms: HeadNorms | None
    output: Linear
    middle_norm: torch.Tensor
    mlp: GatedMlp | Experts


class Reduction(Protocol):
    """Adds up what the tensor ranks have each computed of one result. All of them call it, in the same order."""

    def add_to(self, residual: torch.Tensor, part: torch.Tensor) -> None:
        """Add the sum of all ranks' `part` [N, H] to `residual` [N, H] float32, in place.

        The parts are added in float32 in the order of the ranks, then their sum is added to the residual: the bits
        depend on the number of ranks, and on nothing else.
        """
        ...


class AttentionStep(Protocol):
    """The pool as one plan sees it. Layers are called in order; each stores before it attends."""

    @property
    def num_tokens(self) -> int: ...

    def rope_and_store(self, layer: int, qkv: torch.Tensor, norms: HeadNorms | None) -> torch.Tensor:
        """Norm (if any) and rotate queries and keys, store keys and values into the plan's slots.

        qkv [N, (Q + 2K) * D] -> rotated queries [N, Q, D]. Values that are not finite are stored as zero, so that a
        broken row cannot reach rows that use its pages later.
        """
        ...

    def attend(self, layer: int, queries: torch.Tensor) -> torch.Tensor:
        """Causal attention of every row over its pages, extend and decode rows alike. [N, Q, D] -> [N, Q * D]."""
        ...


class LayerStack(Protocol):
    """Decoder layers, prepared to run one after another."""

    def __call__(self, step: AttentionStep, residual: torch.Tensor) -> None:
        """Take a plan through the layers: reads and adds to `residual` [N, H] float32, stores into the pool."""
        ...

    def reserve(self, step: AttentionStep, hidden: int) -> None:
        """Take the workspace that such a plan needs, without running it."""
        ...


@dataclass(frozen=True, slots=True)
class KindTime:
    """Time of all operations of one kind. `waited`: of it, how long a compute thread had nothing to do, on
    average of all of them."""

    kind: str
    seconds: float
    waited_seconds: float


class Profiler(Protocol):
    """Adds up where an operator set's time goes. To be called while no operator runs."""

    def start(self) -> None:
        """Begin at zero."""
        ...

    def take(self) -> tuple[KindTime, ...]:
        """Return what was added up since the last call or the start, of every kind that there is, and begin anew."""
        ...

    def stop(self) -> None:
        """Add up nothing more; from now on profiling costs nothing again."""
        ...


class Operators(Protocol):
    """One set of operators. `numerics` is empty unless a row's bits are proven not to depend on other rows."""

    @property
    def name(self) -> str: ...

    @property
    def numerics(self) -> str: ...

    @property
    def packs_weights(self) -> bool:
        """Whether linears copy their weights, so that those given are not needed any more."""
        ...

    @property
    def workspace_bytes(self) -> int:
        """Bytes that are held between calls: they grow with the largest plan so far."""
        ...

    @property
    def activation_dtype(self) -> torch.dtype: ...

    @property
    def profiler(self) -> Profiler | None:
        """None for a set that cannot tell where its time goes."""
        ...

    def linear(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> Linear:
        """Prepare a linear once. Weights [outputs, inputs], biases [outputs] or None; they may be kept."""
        ...

    def gated_linear(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> GatedLinear:
        """Prepare silu(inputs * gate) * (inputs * up) of two weights [outputs, inputs] as one linear of `outputs`."""
        ...

    def gate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up, [N, outputs] each; over the halves of a gated linear it gives the linear's own bits."""
        ...

    def experts(self, router: torch.Tensor, experts: Iterable[ExpertWeights], routing: Routing) -> Experts:
        """Prepare a router [all experts, H] float32 and those that are here, taken one by one; they may be kept."""
        ...

    def embedding(self, table: torch.Tensor) -> Embedding:
        """Prepare a table [vocabulary, H]; it may be kept."""
        ...

    def tied_embedding(self, table: torch.Tensor) -> tuple[Embedding, Linear]:
        """Prepare a table [vocabulary, H] that is the output head's weight as well, in memory once."""
        ...

    def rms_norm(self, residual: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """[N, H] float32, weight [H] float32 -> [N, H] activations."""
        ...

    def layers(self, parts: Sequence[LayerParts], epsilon: float) -> LayerStack:
        """Prepare layers, the first of which is layer 0 of the pool; `epsilon` of their norms. The same bits as the
        operators one by one (`composed.ComposedLayers`)."""
        ...

    def logits(self, head: Linear, hidden: torch.Tensor) -> torch.Tensor:
        """[n, H] activations -> [n, vocabulary] float32."""
        ...

    def begin(self, batch: TokenBatch, pool: torch.Tensor, shape: AttentionShape) -> AttentionStep:
        """Prepare one plan's attention. `pool` is [page, layer, k|v, kv_head, slot, head_dim], written in place."""
        ...
