"""Finds the checkpoint folder that a configuration names: a folder, the built-in demo, or a Hugging Face hub id."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.config import ModelConfig
from tandem.demo import model_path
from tandem.errors import ConfigError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer*")
_PROGRESS_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`revision` is the commit of a hub snapshot, empty for a plain folder."""

    folder: Path
    revision: str = ""


def locate_checkpoint(config: ModelConfig, progress: Callable[[str], None]) -> Checkpoint:
    """Return the folder, downloading a hub id if need be (HF_HUB_OFFLINE is respected); raises ConfigError."""
    if config.path == "demo":
        return Checkpoint(_existing(model_path()))
    folder = Path(config.path).expanduser()
    if folder.is_dir():
        return Checkpoint(_existing(folder))
    if not _HUB_ID.fullmatch(config.path):
        raise ConfigError(f"model.path: {config.path}: no such folder")
    return _download(config.path, config.revision, progress)


def _existing(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.path: {folder} holds no config.json: not a Hugging Face checkpoint")
    return folder


def _download(hub_id: str, revision: str, progress: Callable[[str], None]) -> Checkpoint:
    import huggingface_hub  # costs a quarter of a second; a folder does not need it

    progress(f"looking for {hub_id} on the Hugging Face hub and in its local cache")
    try:
        snapshot = huggingface_hub.snapshot_download(
            hub_id,
            revision=revision or None,
            allow_patterns=list(_FILES),
            tqdm_class=_progress_bar(hub_id, progress),
        )
    except (OSError, ValueError) as error:  # every hub error is one of these: HTTP, offline, unknown, gated, disk full
        cause = " ".join(str(error).split())
        raise ConfigError(
            f"model.path: {hub_id} is no folder here, and it cannot be had from the Hugging Face hub: {cause}"
        ) from error
    return Checkpoint(_existing(Path(snapshot)), Path(snapshot).name)


def _progress_bar(hub_id: str, progress: Callable[[str], None]) -> type[Any]:
    """A progress bar class that reports bytes or files as text now and then, and draws nothing."""
    import huggingface_hub.utils

    plain: Any = huggingface_hub.utils.tqdm  # type: ignore[attr-defined]  # exported, though not in its stubs

    class TextProgress(plain):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **named: Any) -> None:
            named["disable"] = False
            named["file"] = _NoTerminal()
            self._reported_at = 0.0
            super().__init__(*arguments, **named)

        def display(self, *_arguments: Any, **_named: Any) -> bool:
            now = time.monotonic()
            if self.n and now - self._reported_at >= _PROGRESS_SECONDS:
                self._reported_at = now
                scale, unit = (1e6, "MB") if self.unit == "B" else (1, "files")
                total = f" of {self.total / scale:.0f}" if self.total else ""
                progress(f"downloading {hub_id}: {self.n / scale:.0f}{total} {unit}")
            return True

    return TextProgress


class _NoTerminal:
    """Where a progress bar writes that must not write."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        return
