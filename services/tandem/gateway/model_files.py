"""The small files of a checkpoint that a gateway needs: tokenizer, configuration, chat template. Never the weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.config import ModelConfig
from tandem.errors import ConfigError

DEMO = "demo"
_PATTERNS = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """Parsed, as they are; a file that is not there is an empty dict."""

    name: str  # what clients call the model
    folder: Path
    tokenizer: dict[str, Any]
    tokenizer_config: dict[str, Any]
    special_tokens: dict[str, Any]
    config: dict[str, Any]
    generation_config: dict[str, Any]
    chat_templates: dict[str, str]  # by name; the usual one is "default"

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        value = self.generation_config.get("eos_token_id", self.config.get("eos_token_id"))
        return tuple(value) if isinstance(value, list) else () if value is None else (value,)


def load_model_files(model: ModelConfig) -> ModelFiles:
    """Find and read the files of `model`, from the hub if it is no folder; raises ConfigError."""
    folder = model_folder(model)
    tokenizer_config = _read(folder, "tokenizer_config.json")
    tokenizer = _read(folder, "tokenizer.json")
    if not tokenizer:
        raise ConfigError(f"model.path: {folder} has no tokenizer.json")
    return ModelFiles(
        name=served_name(model),
        folder=folder,
        tokenizer=tokenizer,
        tokenizer_config=tokenizer_config,
        special_tokens=_read(folder, "special_tokens_map.json"),
        config=_read(folder, "config.json"),
        generation_config=_read(folder, "generation_config.json"),
        chat_templates=_chat_templates(folder, tokenizer_config),
    )


def served_name(model: ModelConfig) -> str:
    """Return the name that clients use for `model`."""
    if model.served_name:
        return model.served_name
    if model.path == DEMO:
        from tandem.demo import MODEL_NAME

        return MODEL_NAME
    return Path(model.path).name or model.path


def model_folder(model: ModelConfig) -> Path:
    """Return the folder with the files; a hub id is downloaded, without its weights. Raises ConfigError."""
    if model.path == DEMO:
        from tandem.demo import model_path

        return model_path()
    folder = Path(model.path)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or model.path.startswith(".") or model.path.count("/") > 1:
        raise ConfigError(f"model.path: there is no folder {model.path}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model.path, revision=model.revision or None, allow_patterns=_PATTERNS))
    except Exception as error:  # the library raises from half a dozen trees; each means the same here
        raise ConfigError(f"model.path: {model.path} is no folder and could not be downloaded: {error}") from error


def _read(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"model.path: {path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"model.path: {path} is no JSON object")
    return content


def _chat_templates(folder: Path, tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """The template file wins over the one in tokenizer_config.json, as in the libraries that write both."""
    path = folder / "chat_template.jinja"
    found = tokenizer_config.get("chat_template")
    if isinstance(found, str):
        found = {"default": found}
    elif isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    else:
        found = {}
    return found | {"default": path.read_text(encoding="utf-8")} if path.is_file() else found
