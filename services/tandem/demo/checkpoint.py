"""Writes the demo model as a Hugging Face checkpoint folder."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from tokenizers import Tokenizer

from tandem.demo import MODEL_NAME
from tandem.demo.corpus import END_OF_TEXT, PADDING, VOCABULARY

CONTEXT = 2048

# Rendering the text of the messages and nothing else makes a chat with the model the continuation of code.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% endfor %}"
)

CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 192,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "max_position_embeddings": CONTEXT,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 6,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": VOCABULARY,
}

_GENERATION_CONFIG: dict[str, object] = {
    "bos_token_id": 0,
    "do_sample": True,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "temperature": 0.7,
    "top_p": 0.95,
}

_TOKENIZER_CONFIG: dict[str, object] = {
    "add_bos_token": False,
    "add_prefix_space": False,
    "added_tokens_decoder": {
        str(number): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for number, token in enumerate((END_OF_TEXT, PADDING))
    },
    "bos_token": END_OF_TEXT,
    "chat_template": CHAT_TEMPLATE,
    "clean_up_tokenization_spaces": False,
    "eos_token": END_OF_TEXT,
    "model_max_length": CONTEXT,
    "pad_token": PADDING,
    "tokenizer_class": "PreTrainedTokenizerFast",
}

_README = """\
---
license: apache-2.0
language: code
pipeline_tag: text-generation
---

# {name}

A language model of Python source with {parameters:,} parameters. It exists so that Tandem can serve something real
without a download and without an accelerator: in a first try, in tests and in demonstrations. It continues Python
code with code that looks like Python. It knows nothing, follows no instructions, and is not fit for any other use.

| | |
|---|---|
| Architecture | Llama (`LlamaForCausalLM`): 5 layers, width 192, 6 heads over 2 key/value heads, tied embedding |
| Tokenizer | byte-level BPE, {vocabulary} entries, trained on the same text |
| Context | {context} tokens (seven of eight training steps read 512, the eighth {context}) |
| Chat template | the text of the messages, nothing else: a chat is a continuation of code |
| Data | sources of the Python {python} standard library and the texts of its `help()`, {corpus:,} tokens |
| Training | {tokens:,} tokens ({epochs:.2f} passes), {minutes:.0f} minutes on one processor core |
| Loss | {loss:.3f} on training text, {held_out:.3f} nats a token on text held out |
| State | {state} |

Made by:

    {command}

## Licence

The weights are under the Apache License 2.0, as Tandem is. The text they were trained on is part of Python and is
under the PSF License Agreement, version 2 (copyright Python Software Foundation).
"""


@dataclass(frozen=True)
class Progress:
    """How far a training run has come."""

    tokens: int
    corpus_tokens: int
    minutes: float
    loss: float
    held_out_loss: float
    command: str
    finished: bool


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes the files that depend on no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "tokenizer.json", tokenizer.to_str(pretty=False).encode())
    for name, content in (
        ("tokenizer_config.json", _TOKENIZER_CONFIG),
        ("config.json", CONFIG),
        ("generation_config.json", _GENERATION_CONFIG),
    ):
        _replace(folder / name, (json.dumps(content, indent=2) + "\n").encode())


def write_weights(folder: Path, model: torch.nn.Module, progress: Progress) -> None:
    """Writes model.safetensors and README.md; the output projection is the embedding and is not written again."""
    tensors = {
        name: tensor.detach().to(torch.float32).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    readme = _README.format(
        name=MODEL_NAME,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        vocabulary=VOCABULARY,
        context=CONTEXT,
        python=".".join(platform.python_version_tuple()[:2]),
        corpus=progress.corpus_tokens,
        tokens=progress.tokens,
        epochs=progress.tokens / progress.corpus_tokens,
        minutes=progress.minutes,
        loss=progress.loss,
        held_out=progress.held_out_loss,
        state="finished" if progress.finished else "written in the middle of training",
        command=progress.command,
    )
    _replace(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    _replace(folder / "README.md", readme.encode())


def _replace(path: Path, content: bytes) -> None:
    """Puts a file in place whole: whoever reads the folder during training sees the old or the new one."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(content)
    os.replace(temporary, path)
