"""Reading config.json: both spellings, defaults of the families, and clear refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from tandem.engine.models.experts import ExpertsSpec
from tandem.engine.models.rope import RopeSpec, inverse_frequencies
from tandem.engine.models.spec import DecoderSpec, parse_spec
from tandem.errors import ConfigError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 2}
MIXTRAL = LLAMA | {"architectures": ["MixtralForCausalLM"], "num_key_value_heads": 4}
QWEN3_MOE = LLAMA | {"architectures": ["Qwen3MoeForCausalLM"], "num_key_value_heads": 4}


def parse(config: dict[str, Any], generation: dict[str, Any] | None = None, **changes: Any) -> DecoderSpec:
    return parse_spec(config | changes, generation or {})


def test_both_spellings_are_one() -> None:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    published = parse(
        LLAMA, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling}, torch_dtype="bfloat16", eos_token_id=7
    )
    older = parse(
        LLAMA, rope_theta=5e5, rope_scaling={"type": "llama3", **scaling}, torch_dtype="bfloat16", eos_token_id=[7]
    )
    newer = parse(
        LLAMA,
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling},
        dtype="bfloat16",
        eos_token_id=7,
    )
    assert published == older == newer
    assert newer.dtype == "bfloat16"


def test_generation_config_decides_about_the_end() -> None:
    assert parse(LLAMA, eos_token_id=1).eos_token_ids == (1,)
    assert parse(LLAMA, {"eos_token_id": [5, 3, 5]}, eos_token_id=1).eos_token_ids == (5, 3)
    assert parse(LLAMA, {"eos_token_id": None}, eos_token_id=[1, 2]).eos_token_ids == (1, 2)
    assert parse(LLAMA).eos_token_ids == ()


def test_windows() -> None:
    assert parse(LLAMA, sliding_window=8).windows == (None,) * 4
    assert parse(MISTRAL, sliding_window=8).windows == (8,) * 4
    assert parse(MISTRAL, sliding_window=None).windows == (None,) * 4
    assert parse(MISTRAL).windows == (4096,) * 4
    assert parse(QWEN2, sliding_window=8).windows == (None,) * 4
    switched: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 8}
    assert parse(QWEN2, **switched).windows == (None,) * 4
    assert parse(QWEN2, **switched, max_window_layers=1).windows == (None, 8, 8, 8)
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    assert parse(QWEN2, **switched, layer_types=types).windows == (8, None, None, 8)


def test_experts() -> None:
    mixtral = parse(MIXTRAL)
    assert mixtral.experts == ExpertsSpec(
        num_experts=8, experts_per_token=2, intermediate_size=96, normalized=True, layers=(True,) * 4
    )
    assert (mixtral.rope.theta, mixtral.norm_epsilon, mixtral.num_kv_heads) == (1e6, 1e-5, 4)
    assert mixtral.windows == (None,) * 4 != parse(MIXTRAL, sliding_window=8).windows
    assert parse(LLAMA).experts is None
    qwen = parse(QWEN3_MOE, decoder_sparse_step=2, mlp_only_layers=[3], num_experts=16, moe_intermediate_size=24)
    assert qwen.experts == ExpertsSpec(
        num_experts=16, experts_per_token=8, intermediate_size=24, normalized=False, layers=(False, True, False, False)
    )
    assert [qwen.has_experts(layer) for layer in range(4)] == [False, True, False, False]
    newer = parse(QWEN3_MOE, num_local_experts=16, norm_topk_prob=True).experts
    assert newer is not None and (newer.num_experts, newer.normalized) == (16, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_shared_experts": 1}, "n_shared_experts 1 is not supported"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size 64 is not supported"),
        ({"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' is not supported"),
        ({"num_experts": 4}, "num_experts_per_tok 8 is more than there are experts, 4"),
        ({"num_experts": 16, "num_local_experts": 8}, "num_local_experts is 8, and num_experts is 16"),
        ({"mlp_only_layers": ["last"]}, "mlp_only_layers is not a list of layers"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is not an integer of at least 1: 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals_of_experts(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(QWEN3_MOE, **changes)


def test_context_length() -> None:
    assert parse(LLAMA).max_context_tokens == 128
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert parse(LLAMA, rope_scaling=yarn).max_context_tokens == 512
    assert parse(LLAMA, rope_scaling={"type": "dynamic", "factor": 4.0}).max_context_tokens == 128


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "architecture GemmaForCausalLM is not supported"),
        ({"architectures": None, "model_type": "gpt2"}, "architecture gpt2 is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized checkpoints are not supported .method awq"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported"),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, "rope type 'longrope' is not supported"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "rope type 'proportional' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, "factor is not a number above 0: 'x'"),
        ({"rope_scaling": {"type": "default", "mrope_section": [1, 1]}}, "parameter mrope_section of rope type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": -4}, "hidden_size is not an integer of at least 1: -4"),
        ({"vocab_size": "many"}, "vocab_size is not an integer"),
        ({"num_key_value_heads": 3}, "4 attention heads are no multiple of 3"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is not a number above 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is not true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id is not a token id"),
        ({"layer_types": ["sliding_attention"] * 4}, "no sliding_window is in force"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer type 'chunked_attention' is not supported"),
        ({"layer_types": ["full_attention"]}, "layer_types does not list 4 layers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(LLAMA, **changes)


def test_all_faults_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(LLAMA, hidden_act="relu", vocab_size=0, torch_dtype="int4")
    assert len(caught.value.message.splitlines()) == 3


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 8.0, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.5},
        {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ],
    ids=str,
)
def test_frequencies_are_transformers(rope: dict[str, Any]) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    spec = parse(LLAMA, rope_parameters={"rope_theta": 1e4} | rope, head_dim=64)
    config = transformers.LlamaConfig(
        **{name: value for name, value in LLAMA.items() if name != "architectures"},
        head_dim=64,
        rope_parameters={"rope_theta": 1e4} | rope,
    )
    if rope["rope_type"] == "default":
        expected, factor = inverse_frequencies(RopeSpec(1e4), 64), 1.0
        assert expected[0] == 1.0
        assert float(expected[1]) == pytest.approx(1e4 ** (-2 / 64))
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    assert torch.allclose(inverse_frequencies(spec.rope, 64), expected, rtol=1e-5)
    assert spec.rope.attention_factor == pytest.approx(factor)
