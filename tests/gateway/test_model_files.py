"""Where a gateway's model files come from and what it makes of them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tandem.config import ModelConfig
from tandem.errors import ConfigError
from tandem.gateway import model_files
from tandem.gateway.model_files import load_model_files
from tandem.gateway.tokenizer import Tokenizer
from tests.gateway.model import END, ids_of, model_folder


def test_a_folder(tmp_path: Path) -> None:
    files = load_model_files(ModelConfig(path=str(model_folder(tmp_path / "some-model"))))
    assert files.name == "some-model"
    assert files.eos_token_ids == (END,)
    assert "default" in files.chat_templates
    assert load_model_files(ModelConfig(path=str(tmp_path / "some-model"), served_name="x")).name == "x"


def test_templates_in_every_form(tmp_path: Path) -> None:
    model_folder(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(
        json.dumps({"chat_template": [{"name": "default", "template": "a"}, {"name": "t", "template": "b"}]})
    )
    config = ModelConfig(path=str(tmp_path))
    assert load_model_files(config).chat_templates == {"default": "a", "t": "b"}
    (tmp_path / "chat_template.jinja").write_text("c")
    assert load_model_files(config).chat_templates == {"default": "c", "t": "b"}
    path.unlink()
    assert load_model_files(config).chat_templates == {"default": "c"}


def test_what_cannot_be_used_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        load_model_files(ModelConfig(path=str(tmp_path)))
    with pytest.raises(ConfigError, match="no folder"):
        load_model_files(ModelConfig(path=str(tmp_path / "absent")))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="no JSON"):
        load_model_files(ModelConfig(path=str(tmp_path)))
    (tmp_path / "tokenizer.json").write_text('{"version": "9"}')
    with pytest.raises(ConfigError, match="cannot be used"):
        Tokenizer(load_model_files(ModelConfig(path=str(tmp_path))))


def test_a_hub_id_is_downloaded_without_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, object] = {}

    def download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(model_folder(tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    files = load_model_files(ModelConfig(path="some/model", revision="r1"))
    assert (files.name, asked["name"], asked["revision"]) == ("model", "some/model", "r1")
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list)
    assert "tokenizer.json" in patterns
    assert not any("safetensors" in pattern or "*" in pattern for pattern in patterns)

    def fail(name: str, **options: object) -> str:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ConfigError, match="offline"):
        load_model_files(ModelConfig(path="some/model"))


def test_the_demo_model_is_known_by_name() -> None:
    if not (model_files.model_folder(ModelConfig()) / "tokenizer.json").exists():
        pytest.skip("the demo model is not there")
    files = load_model_files(ModelConfig())
    assert files.name == "tandem-demo"
    assert files.config["vocab_size"] == 4096


def test_encoding_uses_the_post_processor_and_drops_truncation(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    from tests.gateway.model import byte_tokenizer

    model_folder(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = TemplateProcessing(single="<|special|> $A", special_tokens=[("<|special|>", 1)])
    tokenizer.enable_truncation(max_length=3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer(load_model_files(ModelConfig(path=str(tmp_path))))

    async def encode() -> None:
        assert await loaded.encode("hello", add_special_tokens=True) == [1, *ids_of("hello")]
        assert await loaded.encode("hello", add_special_tokens=False) == ids_of("hello")
        messages = [{"role": "user", "content": "x"}]
        text, ids = await loaded.encode_chat(messages, tools=[], arguments={}, continue_final_message=False)
        assert (text, ids) == ("[user]x[assistant]", ids_of("[user]x[assistant]"))

    asyncio.run(encode())
    loaded.close()
