"""The built-in demo model: its size, its tokenizer, and what it writes."""

from __future__ import annotations

import ast
import json
import re
import textwrap
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer

from tandem.demo import MODEL_NAME, examples_path, model_path
from tandem.demo.examples import LENGTH, MARGIN, Example, load, reference

FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(model_path() / "tokenizer.json"))


@pytest.fixture(scope="module")
def answers() -> list[Example]:
    return reference(model_path(), tuple(example.prompt for example in load()))


def test_the_folder_is_small_and_complete() -> None:
    files = {path.name: path for path in model_path().iterdir() if not path.name.startswith(".")}
    assert set(files) == FILES
    assert sum(path.stat().st_size for path in files.values()) < 16_000_000


def test_no_file_names_the_machine_that_made_it() -> None:
    for path in (examples_path(), *(model_path() / name for name in FILES - {"model.safetensors", "tokenizer.json"})):
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r"(?<![\w.<*])/\w+", text), path.name  # nothing like an absolute path


def test_the_readme_says_what_it_is() -> None:
    text = (model_path() / "README.md").read_text(encoding="utf-8")
    assert MODEL_NAME in text
    assert "license: apache-2.0" in text
    assert "PSF License Agreement" in text
    assert "| finished |" in text


def test_the_weights_are_float32_and_at_most_three_million() -> None:
    count = 0
    with safe_open(model_path() / "model.safetensors", framework="pt") as weights:
        names = list(weights.keys())
        for name in names:
            part = weights.get_slice(name)
            assert part.get_dtype() == "F32", name
            size = 1
            for extent in part.get_shape():
                size *= extent
            count += size
    assert "lm_head.weight" not in names  # tied
    assert 2_000_000 < count <= 3_000_000


def test_the_configuration_has_the_keys_of_published_ones() -> None:
    config = json.loads((model_path() / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert config["torch_dtype"] == "float32"
    assert config["rope_theta"] == 10000.0
    assert config["tie_word_embeddings"] is True
    assert config["eos_token_id"] == 0
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["num_key_value_heads"] < config["num_attention_heads"]


@settings(max_examples=300)
@given(text=st.text(max_size=200))
def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= number < 4096 for number in ids)


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return x  # two blanks\n\n\n",
        "\t tabs\r\nand  \n  blanks ",
        "Grüße, 世界! 👩‍👩‍👧 e\u0301 \u200b",
        "\x00\x7f\ufeff\ufffd",
        "1234567890 3.14e-10",
        "",
    ],
)
def test_code_and_odd_text_survive_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 4096
    assert tokenizer.encode("<|endoftext|>").ids == [0]
    assert tokenizer.encode("<|padding|>").ids == [1]
    assert tokenizer.decode([0, 1]) == ""


def test_transformers_loads_the_folder(tokenizer: Tokenizer) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config: Any = AutoConfig.from_pretrained(model_path())
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (5, 192, 4096)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model_path(), output_loading_info=True)
    model, report = loaded
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    other: Any = AutoTokenizer.from_pretrained(model_path())
    text = "class Foo(object):\n    def __init__(self, x=1.5):\n\n        pass  # Grüße"
    assert other(text)["input_ids"] == tokenizer.encode(text).ids
    assert other.decode(other(text)["input_ids"]) == text
    assert other.eos_token_id == 0


def test_a_chat_is_a_continuation_of_code() -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model_path())
    parts = [{"type": "text", "text": "def main("}, {"type": "text", "text": "argv"}]
    messages = [{"role": "user", "content": "import os\n\n"}, {"role": "user", "content": parts}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "import os\n\ndef main(argv"


def test_there_are_three_examples(tokenizer: Tokenizer) -> None:
    examples = load()
    assert len(examples) == 3
    for example in examples:
        assert len(example.token_ids) == LENGTH
        assert tokenizer.encode(example.prompt).ids == example.prompt_token_ids
        assert tokenizer.decode(example.token_ids) == example.text
        assert 0 not in example.token_ids


def test_greedy_answers_are_the_expected_ones(answers: list[Example]) -> None:
    for expected, answer in zip(load(), answers, strict=True):
        assert answer.token_ids == expected.token_ids


def test_no_near_tie_decides_an_answer(answers: list[Example]) -> None:
    for expected, answer in zip(load(), answers, strict=True):
        assert answer.margin > MARGIN
        assert answer.margin == pytest.approx(expected.margin, abs=0.01)


def test_the_answers_are_python(answers: list[Example]) -> None:
    """The prompt and the whole lines of the answer parse, but for the statement that the length cuts."""
    for answer in answers:
        lines = (answer.prompt + answer.text).split("\n")[:-1]
        while lines and not _parses("\n".join(lines)):
            lines.pop()
        assert len("\n".join(lines)) > len(answer.prompt), answer.prompt + answer.text


def _parses(text: str) -> bool:
    try:
        ast.parse(textwrap.dedent(text))
    except SyntaxError:
        return False
    return True
