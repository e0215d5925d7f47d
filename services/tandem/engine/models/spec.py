"""The typed description of a decoder-only model, and how a checkpoint's config.json becomes one.

One decoder is built from it; what differs between model families is a value here, not a class. A config that asks
for anything this description cannot say is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tandem.engine.models.experts import MIXTRAL, QWEN3_MOE, ExpertsFamily, ExpertsSpec, parse_experts
from tandem.engine.models.fields import Fields, read_json
from tandem.engine.models.rope import RopeSpec, parse_rope

CHECKPOINT_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """`windows[i]`: how many last positions, its own included, a position of layer i attends to; None: all.

    `dtype` is the checkpoint's own, one of CHECKPOINT_DTYPES, or empty if its config does not say. `intermediate_size`
    is that of layers without experts.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_epsilon: float
    rope: RopeSpec
    windows: tuple[int | None, ...]
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    head_norms: bool
    tied_embeddings: bool
    max_context_tokens: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    experts: ExpertsSpec | None = None

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and self.experts.layers[layer]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """What an architecture leaves unsaid in its config.json."""

    num_kv_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / heads
    max_positions: int = 2048
    head_norms: bool = False
    qkv_bias: bool | None = None  # None: `attention_bias` says
    has_mlp_bias: bool = False
    has_windows: bool = True
    sliding_window: int | None = None
    window_switch: bool = False  # `use_sliding_window` decides
    window_layers: bool = False  # `max_window_layers` and `layer_types` say which layers have one
    rope_theta: float = 1e4
    norm_epsilon: float = 1e-6
    experts: ExpertsFamily | None = None


_FAMILIES = {
    "LlamaForCausalLM": _Family(has_mlp_bias=True, has_windows=False),
    "MistralForCausalLM": _Family(num_kv_heads=8, max_positions=4096 * 32, qkv_bias=False, sliding_window=4096),
    "MixtralForCausalLM": _Family(
        num_kv_heads=8,
        max_positions=4096 * 32,
        qkv_bias=False,
        rope_theta=1e6,
        norm_epsilon=1e-5,
        experts=MIXTRAL,
    ),
    "Qwen2ForCausalLM": _Family(
        max_positions=32768, qkv_bias=True, sliding_window=4096, window_switch=True, window_layers=True
    ),
    "Qwen3ForCausalLM": _Family(
        head_dim=128,
        max_positions=32768,
        head_norms=True,
        sliding_window=4096,
        window_switch=True,
        window_layers=True,
    ),
    "Qwen3MoeForCausalLM": _Family(
        num_kv_heads=4,
        max_positions=32768,
        head_norms=True,
        sliding_window=4096,
        window_switch=True,
        experts=QWEN3_MOE,
    ),
}
_ARCHITECTURE_OF = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def read_spec(folder: Path) -> DecoderSpec:
    """Read the spec of a checkpoint folder; raises ConfigError that names everything that is not supported."""
    config = read_json(folder / "config.json")
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else {}
    return parse_spec(config, generation, where=str(folder))


def parse_spec(config: dict[str, object], generation: dict[str, object], where: str = "config.json") -> DecoderSpec:
    """Turn config.json and generation_config.json (may be empty) into a spec; raises ConfigError with every fault."""
    fields = Fields(config, where)
    architecture = _architecture(fields)
    fields.raise_faults()
    family = _FAMILIES[architecture]
    _refuse_unsupported(fields)
    num_layers = fields.integer("num_hidden_layers")
    num_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    attention_bias = fields.flag("attention_bias", False)
    rope, context = parse_rope(
        Fields({"max_position_embeddings": family.max_positions} | _present(config), where, fields.faults),
        family.rope_theta,
    )
    spec = DecoderSpec(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", family.num_kv_heads or num_heads),
        head_dim=fields.integer("head_dim", family.head_dim or max(1, hidden_size // num_heads), low=2),
        norm_epsilon=fields.number("rms_norm_eps", family.norm_epsilon),
        rope=rope,
        windows=_windows(fields, family, num_layers),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias if family.qkv_bias is None else False,
        mlp_bias=family.has_mlp_bias and fields.flag("mlp_bias", False),
        head_norms=family.head_norms,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        max_context_tokens=context,
        eos_token_ids=_eos_token_ids(fields, Fields(generation, f"{where}: generation_config.json", fields.faults)),
        dtype=_dtype(fields),
        experts=None if family.experts is None else parse_experts(fields, family.experts, num_layers),
    )
    if spec.num_heads % spec.num_kv_heads:
        fields.fault(f"{spec.num_heads} attention heads are no multiple of {spec.num_kv_heads} key/value heads")
    if spec.head_dim % 2:
        fields.fault(f"head_dim {spec.head_dim} is odd")
    fields.raise_faults()
    return spec


def experts_family(architecture: str) -> ExpertsFamily:
    """How a supported architecture with experts names them."""
    family = _FAMILIES[architecture].experts
    assert family is not None, f"{architecture} has no experts"
    return family


def _present(config: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in config.items() if value is not None}


def _architecture(fields: Fields) -> str:
    named = fields.values.get("architectures")
    name = named[0] if isinstance(named, list) and named else _ARCHITECTURE_OF.get(fields.text("model_type"))
    if name not in _FAMILIES:
        shown = name or fields.text("model_type") or "(none named)"
        fields.fault(f"architecture {shown} is not supported (supported: {', '.join(_FAMILIES)})")
    return str(name)


def _refuse_unsupported(fields: Fields) -> None:
    for name in ("quantization_config", "compression_config"):
        quantization = fields.values.get(name)
        if quantization:
            method = quantization.get("quant_method", "?") if isinstance(quantization, dict) else quantization
            fields.fault(f"{name}: quantized checkpoints are not supported (method {method})")
    activation = fields.text("hidden_act", "silu")
    if activation != "silu":
        fields.fault(f"hidden_act {activation!r} is not supported (supported: silu)")


def _windows(fields: Fields, family: _Family, num_layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer. An explicit null means none; an absent key means the family's own."""
    window = fields.optional_integer("sliding_window")
    if "sliding_window" not in fields.values:
        window = family.sliding_window
    layer_types = fields.values.get("layer_types")
    if family.window_switch and not fields.flag("use_sliding_window", False):
        window = None
    if family.window_layers:
        first = fields.integer("max_window_layers", 28, low=0)
        if layer_types is None:
            return tuple(window if layer >= first else None for layer in range(num_layers))
    if not family.has_windows:
        window = None  # Llama: transformers ignores the key, and so do we
    if layer_types is None:
        return (window,) * num_layers
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        fields.fault(f"layer_types does not list {num_layers} layers")
        return (None,) * num_layers
    for name in sorted({str(name) for name in layer_types} - {"full_attention", "sliding_attention"}):
        fields.fault(f"layer type {name!r} is not supported")
    if window is None and "sliding_attention" in layer_types:
        fields.fault("layer_types asks for sliding_attention, but no sliding_window is in force")
    if not family.window_layers and len(set(map(str, layer_types))) > 1:
        fields.fault("mixed layer_types are not supported for this architecture")
    return tuple(window if name == "sliding_attention" else None for name in layer_types)


def _eos_token_ids(config: Fields, generation: Fields) -> tuple[int, ...]:
    """generation_config.json decides if it says anything."""
    for fields in (generation, config):
        value = fields.values.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
            return tuple(dict.fromkeys(ids))
        fields.fault(f"eos_token_id is not a token id or a list of them: {value!r}")
    return ()


def _dtype(fields: Fields) -> str:
    name = (fields.text("dtype") or fields.text("torch_dtype")).removeprefix("torch.")
    if name and name not in CHECKPOINT_DTYPES:
        fields.fault(f"dtype {name!r} is not supported (supported: {', '.join(CHECKPOINT_DTYPES)})")
    return name
