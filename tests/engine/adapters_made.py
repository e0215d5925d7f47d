"""Random adapters, written by PEFT over the tiny checkpoints of transformers: their model is the oracle."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_peft_adapter(
    model: Any,
    folder: Path,
    *,
    seed: int,
    targets: tuple[str, ...] = ALL,
    rank: int = 4,
    alpha: int = 8,
    strength: float = 1.0,
    **settings: Any,
) -> Any:
    """Write a random adapter, B included, and return PEFT's model of it over a copy of `model`."""
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), task_type="CAUSAL_LM", **settings)
    adapted: Any = peft.get_peft_model(copy.deepcopy(model), config).eval()
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in sorted(adapted.named_parameters()):
            if "lora_" in name:
                values = generator.standard_normal(tuple(parameter.shape)) * strength / np.sqrt(parameter.shape[1])
                parameter.copy_(torch.from_numpy(values.astype(np.float32)))
    adapted.save_pretrained(str(folder))
    return adapted
