"""Mixtures of experts: what a config.json says about them, and what their tensors are called."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.engine.models.fields import Fields

# What other mixtures have and this description cannot say, and the values with which it changes nothing.
_REFUSED: dict[str, tuple[object, ...]] = {
    "n_shared_experts": (0,),
    "num_shared_experts": (0,),
    "shared_expert_intermediate_size": (0,),
    "n_group": (1,),
    "scoring_func": ("softmax",),
    "routed_scaling_factor": (1,),
    "first_k_dense_replace": (0,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSpec:
    """Experts instead of one gated MLP, in the layers of which `layers[i]` is true.

    A token goes to the `experts_per_token` experts that its router's softmax over all of them puts first; with
    `normalized` their weights are divided by their sum.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    normalized: bool
    layers: tuple[bool, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsFamily:
    """How an architecture names its experts, and what it leaves unsaid in its config.json.

    Within a layer, `module` has `gate.weight` (the router) and `experts.N.X.weight` for X the `gate`, `up`, `down`.
    """

    module: str
    gate: str
    up: str
    down: str
    num_experts: int
    experts_per_token: int
    own_size: int | None = None  # `moe_intermediate_size` has the experts' size; None: it is `intermediate_size`
    normalized: bool | None = None  # None: `norm_topk_prob` says
    chosen_layers: bool = False  # `decoder_sparse_step` and `mlp_only_layers` decide; else all layers have experts


MIXTRAL = ExpertsFamily(
    module="block_sparse_moe", gate="w1", up="w3", down="w2", num_experts=8, experts_per_token=2, normalized=True
)
QWEN3_MOE = ExpertsFamily(
    module="mlp",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
    num_experts=128,
    experts_per_token=8,
    own_size=768,
    chosen_layers=True,
)


def parse_experts(fields: Fields, family: ExpertsFamily, num_layers: int) -> ExpertsSpec:
    """Read the experts of a config; what is not supported is noted as a fault."""
    for name, neutral in _REFUSED.items():
        value = fields.values.get(name)
        if value is not None and value not in neutral:
            fields.fault(f"{name} {value!r} is not supported")
    spec = ExpertsSpec(
        num_experts=_num_experts(fields, family.num_experts),
        experts_per_token=fields.integer("num_experts_per_tok", family.experts_per_token),
        intermediate_size=(
            fields.integer("intermediate_size")
            if family.own_size is None
            else fields.integer("moe_intermediate_size", family.own_size)
        ),
        normalized=fields.flag("norm_topk_prob", False) if family.normalized is None else family.normalized,
        layers=_layers(fields, num_layers) if family.chosen_layers else (True,) * num_layers,
    )
    if spec.experts_per_token > spec.num_experts:
        fields.fault(f"num_experts_per_tok {spec.experts_per_token} is more than there are experts, {spec.num_experts}")
    return spec


def _num_experts(fields: Fields, default: int) -> int:
    """Checkpoints say num_local_experts or num_experts; newer transformers write one for the other."""
    local, plain = (fields.optional_integer(name) for name in ("num_local_experts", "num_experts"))
    if local is not None and plain is not None and local != plain:
        fields.fault(f"num_local_experts is {local}, and num_experts is {plain}")
    return local or plain or default


def _layers(fields: Fields, num_layers: int) -> tuple[bool, ...]:
    step = fields.integer("decoder_sparse_step", 1)
    plain = fields.values.get("mlp_only_layers") or []
    if not isinstance(plain, list) or not all(isinstance(layer, int) for layer in plain):
        fields.fault(f"mlp_only_layers is not a list of layers: {plain!r}")
        plain = []
    return tuple(layer not in plain and (layer + 1) % step == 0 for layer in range(num_layers))
