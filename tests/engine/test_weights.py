"""Loading: every fault of a checkpoint is named before anything is served, and equal models have equal digests."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tandem.engine.models.spec import read_spec
from tandem.engine.weights import CheckpointFiles, Weights
from tandem.errors import ConfigError
from tests.engine.checkpoints import VARIANTS, edit_json, write_checkpoint

LLAMA3 = next(variant for variant in VARIANTS if variant.name == "llama3")
TIED = next(variant for variant in VARIANTS if variant.name == "qwen2")
SHARDED = next(variant for variant in VARIANTS if variant.name == "llama2")
MIXTRAL = next(variant for variant in VARIANTS if variant.name == "mixtral_fused")
FUSED_DOWN = "model.layers.1.mlp.experts.down_proj"
Tensors = dict[str, torch.Tensor]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Weights:
    spec = read_spec(folder)
    with CheckpointFiles(folder, spec) as files:
        return files.load(dtype, torch.device("cpu"), lambda _: None)


def read_all(folder: Path, dtype: torch.dtype) -> Tensors:
    spec = read_spec(folder)
    with CheckpointFiles(folder, spec) as files:
        return dict(files.load(dtype, torch.device("cpu"), lambda _: None).tensors)


def change(folder: Path, edit: Callable[[Tensors], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "missing tensors for LlamaForCausalLM: model.norm.weight"),
        (lambda t: t.pop("lm_head.weight"), "missing tensors for LlamaForCausalLM: lm_head.weight"),
        (
            lambda t: t.update({"model.layers.0.mlp.router.weight": torch.ones(2)}),
            "unexpected tensors for LlamaForCausalLM: model.layers.0.mlp.router.weight",
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(3, 48)}),
            r"model.layers.1.mlp.up_proj.weight has shape \(3, 48\), the config asks for \(72, 48\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}),
            "tensor model.norm.weight has type I8",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(48).to(torch.float8_e4m3fn)}),
            "tensor model.norm.weight has type F8_E4M3",
        ),
    ],
)
def test_wrong_tensors(tmp_path: Path, edit: Callable[[Tensors], object], message: str) -> None:
    write_checkpoint(LLAMA3, tmp_path)
    change(tmp_path, edit)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path)


def test_many_missing_tensors_are_summed_up(tmp_path: Path) -> None:
    write_checkpoint(LLAMA3, tmp_path)
    change(tmp_path, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1" in name])
    with pytest.raises(ConfigError, match=r"missing tensors .* and 1 more"):
        load(tmp_path)


def test_rope_frequencies_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    write_checkpoint(LLAMA3, tmp_path)
    change(tmp_path, lambda tensors: tensors.update({"model.layers.2.self_attn.rotary_emb.inv_freq": torch.ones(6)}))
    load(tmp_path)


def test_a_tied_head_must_be_the_embedding(tmp_path: Path) -> None:
    write_checkpoint(TIED, tmp_path)
    embedding = "model.embed_tokens.weight"
    change(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].clone()}))
    assert "lm_head.weight" not in load(tmp_path).tensors
    change(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding] + 1}))
    with pytest.raises(ConfigError, match=r"tie_word_embeddings is set, but lm_head.weight is there and differs"):
        load(tmp_path)


def test_broken_files(tmp_path: Path) -> None:
    write_checkpoint(SHARDED, tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    whole = shards[0].read_bytes()
    shards[0].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=rf"{shards[0].name}: not a readable safetensors file"):
        load(tmp_path)
    shards[0].unlink()
    with pytest.raises(ConfigError, match=f"missing files of the checkpoint: {shards[0].name}"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": []}))
    with pytest.raises(ConfigError, match="no weight_map"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ConfigError, match=r"neither model.safetensors nor .* not supported: pytorch_model.bin"):
        load(tmp_path)


def test_unchanged_types_stay_mapped_from_the_file(tmp_path: Path) -> None:
    write_checkpoint(LLAMA3, tmp_path, dtype=torch.bfloat16)
    mapped = load(tmp_path, torch.bfloat16)
    assert mapped.num_mapped_bytes > 0.9 * mapped.num_bytes
    spec = read_spec(tmp_path)
    with CheckpointFiles(tmp_path, spec) as files:
        widened = files.load(torch.float32, torch.device("cpu"), lambda _: None)
        assert widened.num_mapped_bytes == 0
        assert all(tensor.dtype == torch.float32 for tensor in widened.tensors.values())


def test_conversion_is_told(tmp_path: Path) -> None:
    write_checkpoint(LLAMA3, tmp_path, dtype=torch.float16)
    lines: list[str] = []
    spec = read_spec(tmp_path)
    with CheckpointFiles(tmp_path, spec) as files:
        assert files.dtype == "float16"
        files.load(torch.bfloat16, torch.device("cpu"), lines.append)
    assert lines == ["converts float16 weights to bfloat16"]


def test_digest(tmp_path: Path) -> None:
    """Equal for equal weights however they are cut into files; different for different ones."""
    for name, variant, seed in (("whole", SHARDED, 0), ("cut", SHARDED, 0), ("other", SHARDED, 1)):
        write_checkpoint(variant, tmp_path / name, seed=seed)
    folder = tmp_path / "whole"
    tensors: Tensors = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    digests = {name: load(tmp_path / name).digest for name in ("whole", "cut", "other")}
    assert digests["whole"] == digests["cut"] != digests["other"]
    tensors["model.norm.weight"] = tensors["model.norm.weight"].flip(0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(folder).digest != digests["whole"]


def test_published_and_fused_experts_are_one_model(tmp_path: Path) -> None:
    """The digest is of what the tensors are, not of how they lie in the file; routers are never narrowed."""
    write_checkpoint(MIXTRAL, tmp_path / "fused")
    write_checkpoint(replace(MIXTRAL, fused=False), tmp_path / "published")
    assert load(tmp_path / "published").digest == load(tmp_path / "fused").digest
    published, fused = (read_all(tmp_path / name, torch.bfloat16) for name in ("published", "fused"))
    assert published.keys() == fused.keys()
    assert all(torch.equal(published[name], fused[name]) for name in published)
    assert {name for name in fused if fused[name].dtype == torch.float32} == {
        name for name in fused if name.endswith(("norm.weight", "block_sparse_moe.gate.weight"))
    }


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update({FUSED_DOWN: t[FUSED_DOWN][:3].clone()}), r"down_proj has shape \(3, 48, 72\), the config"),
        (
            lambda t: t.pop(FUSED_DOWN),
            "missing tensors for Mixtral.* model.layers.1.block_sparse_moe.experts.0.w2.weight",
        ),
        (
            lambda t: t.update({"model.layers.1.block_sparse_moe.experts.2.w2.weight": torch.ones(48, 72)}),
            "experts.2.w2.weight is there twice, alone and in model.layers.1.mlp.experts.down_proj",
        ),
    ],
)
def test_wrong_fused_tensors(tmp_path: Path, edit: Callable[[Tensors], object], message: str) -> None:
    write_checkpoint(MIXTRAL, tmp_path)
    change(tmp_path, edit)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path)


def test_config_that_does_not_fit_the_weights(tmp_path: Path) -> None:
    write_checkpoint(LLAMA3, tmp_path)
    edit_json(tmp_path / "config.json", lambda config: config.update(attention_bias=True))
    with pytest.raises(ConfigError, match=r"missing tensors .*q_proj.bias"):
        load(tmp_path)
