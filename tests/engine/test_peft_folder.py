"""Adapter folders: what is refused, by name, and that what is written is read again, by PEFT too."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from tandem.engine.lora.peft_folder import CONFIG, TENSORS, random_adapter, read_adapter, write_adapter
from tandem.engine.lora.weights import LoraShape
from tandem.engine.models.spec import DecoderSpec, read_spec
from tandem.errors import ConfigError
from tests.engine.adapters_made import write_peft_adapter
from tests.engine.checkpoints import VARIANTS, edit_json, write_checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, DecoderSpec]:
    folder = tmp_path_factory.mktemp("model")
    model = write_checkpoint(VARIANTS[0], folder)
    return model, read_spec(folder)


@pytest.fixture
def adapter(made: tuple[Any, DecoderSpec], tmp_path: Path) -> Path:
    write_peft_adapter(made[0], tmp_path / "adapter", seed=1)
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        ("peft_type", "IA3", "peft_type 'IA3'"),
        ("task_type", "SEQ_CLS", "task_type 'SEQ_CLS'"),
        ("r", 0, "r is 0"),
        ("r", True, "r is True"),
        ("lora_alpha", "much", "lora_alpha is 'much'"),
        ("bias", "all", "bias 'all'"),
        ("use_dora", True, "use_dora is not supported"),
        ("modules_to_save", ["lm_head"], "modules_to_save is not supported"),
        ("rank_pattern", {"q_proj": 2}, "rank_pattern is not supported"),
        ("fan_in_fan_out", True, "fan_in_fan_out is not supported"),
        ("init_lora_weights", "pissa", "init_lora_weights 'pissa'"),
        ("target_modules", ["q_proj", "lm_head"], "target_modules lm_head"),
        ("invented_in_2031", {"a": 1}, "invented_in_2031 is not supported"),
    ],
)
def test_settings_that_are_refused(
    made: tuple[Any, DecoderSpec], adapter: Path, setting: str, value: object, told: str
) -> None:
    edit_json(adapter / CONFIG, lambda config: config.update({setting: value}))
    with pytest.raises(ConfigError, match=CONFIG) as caught:
        read_adapter(adapter, made[1])
    assert told in caught.value.message


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / TENSORS)
    first = min(tensors)
    tensors |= {name or first: value for name, value in changes.items() if value is not None}
    for name, value in changes.items():
        if value is None:
            tensors.pop(name or first)
    save_file(tensors, folder / TENSORS)


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        (FIRST, None, f"{FIRST} is missing"),
        (FIRST, torch.zeros(4, 7), "has shape (4, 7)"),
        (FIRST, torch.zeros(4, 72, dtype=torch.int32), "has type I32"),
        (FIRST, torch.full((4, 72), float("nan")), "not finite"),
        ("base_model.model.lm_head.lora_A.weight", torch.zeros(4, 48), "1 tensors are for no linear"),
        ("base_model.model.model.layers.3.mlp.up_proj.lora_A.weight", torch.zeros(4, 48), "for no linear"),
    ],
)
def test_tensors_that_are_refused(
    made: tuple[Any, DecoderSpec], adapter: Path, name: str, value: torch.Tensor | None, told: str
) -> None:
    edit_tensors(adapter, **{name: value})
    with pytest.raises(ConfigError) as caught:
        read_adapter(adapter, made[1])
    assert told in caught.value.message


def test_files_that_are_refused(made: tuple[Any, DecoderSpec], adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not an adapter in PEFT format"):
        read_adapter(tmp_path / "nowhere", made[1])
    (adapter / TENSORS).write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        read_adapter(adapter, made[1])
    (adapter / TENSORS).rename(adapter / "adapter_model.bin")
    with pytest.raises(ConfigError, match="may hold code and is not read"):
        read_adapter(adapter, made[1])


def test_what_is_written_is_read_by_both(made: tuple[Any, DecoderSpec], tmp_path: Path) -> None:
    model, spec = made
    weights = random_adapter(spec, LoraShape(rank=4, alpha=8, rslora=True), ("q_proj", "down_proj"), seed=3)
    for pair in weights.matrices.values():
        pair.b.normal_(generator=torch.Generator().manual_seed(4))
    folder = tmp_path / "adapter"
    write_adapter(folder, random_adapter(spec, LoraShape(rank=2, alpha=2), ("v_proj",), seed=1), "base")
    write_adapter(folder, weights, "base")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"], "nothing is left beside it"
    assert read_adapter(folder, spec).digest == weights.digest
    loaded: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
    own = loaded.base_model.model.model.layers[1].mlp.down_proj
    assert torch.equal(own.lora_A["default"].weight, weights.matrices[1, "down_proj"].a)
    assert own.scaling["default"] == weights.shape.scale
    assert json.loads((folder / CONFIG).read_text())["base_model_name_or_path"] == "base"


def test_a_seed_gives_the_same_start(made: tuple[Any, DecoderSpec]) -> None:
    shape = LoraShape(rank=4, alpha=8)
    first, again, other = (random_adapter(made[1], shape, ("q_proj",), seed) for seed in (1, 1, 2))
    assert first.digest == again.digest != other.digest
    assert all(not pair.b.any() for pair in first.matrices.values())
