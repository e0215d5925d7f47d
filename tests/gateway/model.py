"""A tokenizer whose tokens are single bytes, as a checkpoint folder: what a worker sends can be written as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

END = 0
VOCAB_SIZE = 258
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if style %}({{ style }}){% endif %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """Ids: 0 is <|end|>, 1 is <|special|>, 2 + i the i-th character of the byte alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|end|>": 0, "<|special|>": 1} | {character: 2 + i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<|special|>", special=True)])
    return tokenizer


def ids_of(text: str) -> list[int]:
    """The tokens of `text`, one a byte."""
    ids: list[int] = byte_tokenizer().encode(text).ids
    return ids


def model_folder(folder: Path, *, template: str | None = TEMPLATE, **generation_config: Any) -> Path:
    """Write the files that a gateway reads and return `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"vocab_size": VOCAB_SIZE, "eos_token_id": END, "max_position_embeddings": 512}
    tokenizer_config = {"bos_token": "<|special|>", "eos_token": {"content": "<|end|>"}}
    if template is not None:
        tokenizer_config["chat_template"] = template
    for name, content in (
        ("config.json", config),
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", {"eos_token_id": END} | generation_config),
    ):
        (folder / name).write_text(json.dumps(content))
    return folder
