"""Writes a Llama or Qwen2 checkpoint as GGUF, for llama.cpp: matrices as they are stored, the rest float32.

Needs numpy and the `gguf` package. There is no tokenizer in the file: the comparison speaks token ids.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_TYPES = {"BF16": (np.uint16, gguf.GGMLQuantizationType.BF16), "F32": (np.float32, gguf.GGMLQuantizationType.F32)}


def write_gguf(folder: Path, target: Path) -> None:
    """Write `target`; raises ValueError for a checkpoint that this does not know how to say in GGUF."""
    config = json.loads((folder / "config.json").read_text())
    architecture = _ARCHITECTURES.get(config["architectures"][0])
    if architecture is None:
        raise ValueError(f"{config['architectures'][0]} is not one of {', '.join(_ARCHITECTURES)}")
    writer = gguf.GGUFWriter(target, architecture)
    _write_fields(writer, config)
    for name, (stored, array) in _tensors(folder).items():
        array = _permuted(name, array, config) if architecture == "llama" else array
        _add(writer, _name_of(name), stored, array)
    factors = _rope_factors(config)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_fields(writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")


def _tensors(folder: Path) -> dict[str, tuple[str, np.ndarray]]:
    """All tensors of the safetensors files, mapped: stored type, and values (uint16 for BF16)."""
    found: dict[str, tuple[str, np.ndarray]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        content = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length)
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                array = content[start:end].view(_TYPES[entry["dtype"]][0]).reshape(entry["shape"])
                found[name] = (entry["dtype"], array)
    return found


def _name_of(name: str) -> str:
    base, _, kind = name.rpartition(".")
    if base.startswith("model.layers."):
        layer, _, part = base.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{_LAYER_NAMES[part]}.{kind}"
    return f"{_NAMES[base]}.{kind}"


def _permuted(name: str, array: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """llama.cpp rotates neighbouring dimensions of Llama's queries and keys, published weights have halves."""
    if not name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")):
        return array
    heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def _add(writer: Any, name: str, stored: str, array: np.ndarray) -> None:
    if array.ndim == 1 and stored == "BF16":  # norms and biases are float32 in GGUF
        array, stored = (array.astype(np.uint32) << 16).view(np.float32), "F32"
    if stored == "BF16":
        writer.add_tensor(name, np.ascontiguousarray(array).view(np.uint8), raw_dtype=_TYPES[stored][1])
    else:
        writer.add_tensor(name, np.ascontiguousarray(array))


def _rope_factors(config: dict[str, Any]) -> np.ndarray | None:
    """What each of llama3's frequencies is divided by; None for a plain rope."""
    scaling = config.get("rope_scaling")
    if not scaling:
        return None
    if scaling.get("rope_type") != "llama3":
        raise ValueError(f"rope_scaling {scaling.get('rope_type')} is not known here")
    low, high, factor = (float(scaling[name]) for name in ("low_freq_factor", "high_freq_factor", "factor"))
    original = float(scaling["original_max_position_embeddings"])
    half = _head_dim(config) // 2
    factors = []
    for index in range(half):
        length = 2 * math.pi * config["rope_theta"] ** (index / half)
        smooth = min(1.0, max(0.0, (original / length - low) / (high - low)))
        factors.append(1.0 / (smooth + (1.0 - smooth) / factor))
    return np.array(factors, dtype=np.float32)


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
