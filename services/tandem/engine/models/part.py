"""Which part of a model a rank has: its stage's layers, and of their matrices the rows or columns of its tensor rank.

Linears whose outputs are cut (queries, keys, values, gate, up) come before those whose inputs are cut (output, down),
so that only the sums of the latter have to be added up between ranks. Their biases belong to the first tensor rank.

Experts are cut like that, too, or spread: each of `expert_size` groups of neighbouring tensor ranks has a run of the
experts of a layer, and the ranks of a group cut those between them. Every rank has the router and all tokens, so what
an expert adds is part of the same sum.
"""

from __future__ import annotations

import math
import re

import torch

from tandem.core.sharding import KvPart, rank_part, sharding_fault
from tandem.engine.models.spec import DecoderSpec
from tandem.engine.models.tensors import EMBEDDING, FINAL_NORM, OUTPUT_HEAD, expected_tensors, is_kept_wide
from tandem.engine.place import RankPlace, cut
from tandem.errors import ConfigError

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_MIDDLE_OUTPUTS = ("gate_proj", "up_proj", "w1", "w3")
_MIDDLE_INPUTS = ("down_proj", "w2")
_SUMMED = ("o_proj", *_MIDDLE_INPUTS)  # linears over a cut input: each rank has a part of the sum


class ModelPart:
    """A rank's part of a model. Raises ConfigError if the model cannot be cut like that."""

    def __init__(self, spec: DecoderSpec, place: RankPlace, expert_size: int = 1) -> None:
        sharding = place.sharding
        fault = sharding_fault(spec.num_layers, spec.num_kv_heads, sharding)
        fault = fault or _experts_fault(spec, sharding.tensor_size, expert_size)
        if fault:
            raise ConfigError(f"parallel: {fault} of {spec.architecture}")
        self.spec = spec
        self.place = place
        self.kv: KvPart = rank_part(
            spec.num_layers, spec.num_kv_heads, sharding, place.tensor_rank, place.pipeline_rank
        )
        self.layers = range(self.kv.first_layer, self.kv.end_layer)
        self.num_heads = spec.num_heads // sharding.tensor_size
        self.vocabulary = cut(spec.vocab_size, sharding.tensor_size, place.tensor_rank)
        self._group_size = sharding.tensor_size // expert_size
        num_experts = spec.experts.num_experts if spec.experts is not None else 0
        self.experts = cut(num_experts, expert_size, place.tensor_rank // self._group_size)

    @property
    def has_embedding(self) -> bool:
        return self.place.is_first_stage

    @property
    def has_head(self) -> bool:
        return self.place.is_last_stage

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of this part's tensors."""
        return {
            name: self._cut_shape(name, shape)
            for name, shape in expected_tensors(self.spec).items()
            if self.holds(name)
        }

    def num_bytes(self, bytes_per_element: int) -> int:
        """Memory that this part's parameters take in a type of that size."""
        return sum(
            math.prod(shape) * (4 if is_kept_wide(name) else bytes_per_element) for name, shape in self.shapes().items()
        )

    def holds(self, name: str) -> bool:
        """Whether this part has something of a tensor."""
        if name == EMBEDDING:
            return self.has_embedding or (self.has_head and self.spec.tied_embeddings)
        if name in (FINAL_NORM, OUTPUT_HEAD):
            return self.has_head
        layer = _LAYER.match(name)
        if layer is None or int(layer[1]) not in self.layers:
            return False
        expert = _EXPERT.search(name)
        if expert is not None and int(expert[1]) not in self.experts:
            return False
        return self.place.tensor_rank == 0 or not (name.endswith(".bias") and _module(name) in _SUMMED)

    def cut(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return this part's share of a whole tensor as a view."""
        run = self._run(name)
        return tensor if run is None else tensor.narrow(run[0], run[1].start, len(run[1]))

    def _cut_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        run = self._run(name)
        return shape if run is None else (*shape[: run[0]], len(run[1]), *shape[run[0] + 1 :])

    def _run(self, name: str) -> tuple[int, range] | None:
        """The dimension that is cut, and what of it is this part's; None for a tensor that every rank has whole."""
        if self.place.sharding.tensor_size == 1:
            return None
        if name in (EMBEDDING, OUTPUT_HEAD):
            return 0, self.vocabulary
        module = _module(name)
        if module in _SUMMED and name.endswith(".bias"):
            return None
        queries = range(self.num_heads * self.place.tensor_rank, self.num_heads * (self.place.tensor_rank + 1))
        keys = range(self.kv.first_head, self.kv.end_head)
        runs = {
            "q_proj": (0, self._of_heads(queries)),
            "k_proj": (0, self._of_heads(keys)),
            "v_proj": (0, self._of_heads(keys)),
            "o_proj": (1, self._of_heads(queries)),
        }
        if module in _MIDDLE_OUTPUTS or module in _MIDDLE_INPUTS:
            return int(module in _MIDDLE_INPUTS), self._middle(name)
        return runs.get(module)

    def _middle(self, name: str) -> range:
        """This part's run of what lies between gate and down, of the layer or of each of its experts."""
        tensor_rank = self.place.tensor_rank
        if self.spec.experts is not None and _EXPERT.search(name):
            return cut(self.spec.experts.intermediate_size, self._group_size, tensor_rank % self._group_size)
        return cut(self.spec.intermediate_size, self.place.sharding.tensor_size, tensor_rank)

    def _of_heads(self, heads: range) -> range:
        return range(heads.start * self.spec.head_dim, heads.stop * self.spec.head_dim)


def _experts_fault(spec: DecoderSpec, tensor_size: int, expert_size: int) -> str:
    """Return why experts cannot be spread like this, "" if they can."""
    if expert_size == 1:
        return ""
    if spec.experts is None:
        return f"expert size {expert_size} asked for, and there are no experts"
    if tensor_size % expert_size:
        return f"expert size {expert_size} does not divide tensor size {tensor_size}"
    if expert_size > spec.experts.num_experts:
        return f"expert size {expert_size} is more than {spec.experts.num_experts} experts"
    return ""


def _module(name: str) -> str:
    """The linear that a parameter belongs to: model.layers.0.self_attn.q_proj.weight -> q_proj."""
    return name.rpartition(".")[0].rpartition(".")[2]
