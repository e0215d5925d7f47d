"""The adapters of a starting worker, and what it needs to take in more of them later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tandem.config import Config
from tandem.core.messages.worker import AdapterInfo
from tandem.engine.lora.adapters import AdapterStore
from tandem.engine.lora.peft_folder import read_adapter
from tandem.engine.models.decoder import Decoder
from tandem.engine.models.spec import DecoderSpec
from tandem.engine.ops.contract import Operators
from tandem.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraEngine:
    """What adapters are computed and trained with. `adapters` are those of the start; `folder` holds the tokenizer."""

    store: AdapterStore
    adapters: tuple[AdapterInfo, ...]
    decoder: Decoder
    spec: DecoderSpec
    folder: Path
    device: torch.device


def load_adapters(
    config: Config,
    spec: DecoderSpec,
    decoder: Decoder,
    operators: Operators,
    folder: Path,
    device: torch.device,
    progress: Callable[[str], None],
) -> LoraEngine:
    """Load the configured adapters; raises ConfigError with what is wrong with one. Before the pool takes its share."""
    store = AdapterStore(operators, spec, device)
    adapters = []
    for entry in config.model.adapters:
        name, _, path = entry.partition("=")
        try:
            weights = read_adapter(Path(path).expanduser(), spec)
        except ConfigError as error:
            raise ConfigError(f"model.adapters: {name}: {error.message}") from error
        adapters.append(AdapterInfo(name, store.add(weights)))
        progress(f"adapter {name}: rank {weights.shape.rank}, {len(weights.matrices)} linears")
    return LoraEngine(store=store, adapters=tuple(adapters), decoder=decoder, spec=spec, folder=folder, device=device)
