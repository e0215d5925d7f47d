"""Experts spread over tensor ranks: the same tokens as one rank alone, and each rank reads its own experts only."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.config import Config, ModelConfig, ParallelConfig
from tandem.core.messages.handoff import Sharding
from tandem.engine.models.part import ModelPart
from tandem.engine.models.spec import read_spec
from tandem.engine.models.tensors import expected_tensors
from tandem.engine.place import RankPlace
from tandem.engine.start import start_engine
from tandem.errors import ConfigError
from tests.engine.checkpoints import VARIANTS, write_checkpoint
from tests.engine.test_ranks import Outputs, Starter, generate, ranks

__all__ = ["ranks"]
# tensor, pipeline, expert size
SIZES = [(2, 1, 2), (2, 2, 2), (4, 1, 2), (4, 1, 4)]


def written(name: str, folder: Path) -> Path:
    variant = next(variant for variant in VARIANTS if variant.name == name)
    write_checkpoint(variant, folder, num_key_value_heads=4)
    return folder


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen3_moe_fused"])
def test_spread_experts_give_the_tokens_of_one_rank(tmp_path: Path, ranks: Starter, name: str) -> None:
    """The bits depend on tensor and expert size alone, whatever the chunks."""
    written(name, tmp_path)
    alone = generate(ranks(tmp_path, 1, 1), Sharding(), chunk_max=9)
    of_sizes: dict[tuple[int, int], Outputs] = {}
    for tensor_size, pipeline_size, expert_size in SIZES:
        engines = ranks(tmp_path, tensor_size, pipeline_size, expert_size)
        found = generate(engines, Sharding(tensor_size, pipeline_size), chunk_max=5 * pipeline_size)
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in alone], (tensor_size, expert_size)
        if engines[0].numerics:
            assert engines[0].numerics.endswith(f"-tensor{tensor_size}-expert{expert_size}")
            assert of_sizes.setdefault((tensor_size, expert_size), found) == found


def test_each_rank_has_its_experts(tmp_path: Path) -> None:
    """Every tensor is on the ranks that need it: parts of all ranks add up to the whole, routers and norms repeated."""
    spec = read_spec(written("qwen3_moe", tmp_path))
    shapes = expected_tensors(spec)
    for tensor_size, pipeline_size, expert_size in SIZES:
        sharding = Sharding(tensor_size, pipeline_size)
        places = [RankPlace(rank, sharding) for rank in range(tensor_size * pipeline_size)]
        parts = [ModelPart(spec, place, expert_size).shapes() for place in places]
        for name, shape in shapes.items():
            held = [part[name] for part in parts if name in part]
            if ".experts." in name:
                assert len(held) == tensor_size // expert_size
            if len(shape) == 2 and not name.endswith("mlp.gate.weight"):
                assert sum(one[0] * one[1] for one in held) == shape[0] * shape[1], name
            else:
                assert set(held) <= {shape} and held


@pytest.mark.parametrize(
    ("name", "tensor_size", "expert_size", "message"),
    [
        ("llama3", 2, 2, "expert size 2 asked for, and there are no experts of LlamaForCausalLM"),
        ("mixtral", 4, 3, "expert size 3 does not divide tensor size 4"),
    ],
)
def test_what_cannot_be_spread_is_refused(
    tmp_path: Path, name: str, tensor_size: int, expert_size: int, message: str
) -> None:
    config = Config(
        model=ModelConfig(path=str(written(name, tmp_path)), device="cpu"),
        parallel=ParallelConfig(tensor_size=tensor_size, expert_size=expert_size),
    )
    with pytest.raises(ConfigError, match=message):
        start_engine(config, lambda _: None, RankPlace(0, Sharding(tensor_size, 1)))
