"""`tandem bench`: what it asks of the processes that measure, what it refuses, and that its shapes are real models."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tandem.cli import bench
from tandem.cli.bench_shapes import SHAPES
from tandem.cli.main import main
from tandem.config import CacheConfig
from tandem.engine.models.spec import parse_spec
from tandem.engine.models.tensors import expected_tensors

# Parameters as they are published; a tied output head is not counted again.
MILLIONS = {
    "qwen2.5-0.5b": 494,
    "qwen2.5-1.5b": 1544,
    "qwen3-0.6b": 596,
    "qwen3-1.7b": 1721,
    "qwen3-30b-a3b": 30532,
    "mixtral-8x7b": 46703,
    "llama-3.2-1b": 1236,
    "llama-3.2-3b": 3213,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_models_of_their_published_size(shape: str) -> None:
    spec = parse_spec(SHAPES[shape], {})
    parameters = sum(math.prod(size) for size in expected_tensors(spec).values())
    if shape in MILLIONS:
        assert round(parameters / 1e6) == MILLIONS[shape]
    else:
        assert parameters < 2_000_000


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, dict[str, Any]]]:
    """Program, kind and request of every process that would be started."""
    seen: list[tuple[str, str, dict[str, Any]]] = []

    def run(program: str, kind: str, request: dict[str, Any]) -> int:
        seen.append((program, kind, request))
        return 0

    monkeypatch.setattr(bench, "_run", run)
    return seen


def test_the_engine_benchmark_is_told_its_combinations(asked: list[tuple[str, str, dict[str, Any]]]) -> None:
    words = [
        "bench",
        "engine",
        "--model",
        "m",
        "--ops",
        "reference",
        "--batches",
        "1,4",
        "--contexts",
        "64",
        "--profile",
        "--page-tokens",
        "64",
    ]
    assert main(words) == 0
    ((program, kind, request),) = asked
    assert (program, kind) == ("tandem.engine.bench_main", "engine")
    assert (request["model"], request["ops"], request["batches"], request["contexts"]) == (
        "m",
        "reference",
        [1, 4],
        [64],
    )
    assert request["profile"] and request["page_tokens"] == 64
    assert main(["bench", "engine", "--model", "m"]) == 0
    assert not asked[-1][2]["profile"] and asked[-1][2]["page_tokens"] == CacheConfig().page_tokens


@pytest.mark.parametrize(
    "words",
    [
        ["engine", "--batches", "1,x"],
        ["engine", "--contexts", ","],
        ["engine", "--contexts", "0"],
        ["engine", "--cell-seconds", "0"],
        ["engine", "--page-tokens", "1025"],
        ["loops", "--rounds", "0"],
        ["loops", "--threads", "-1"],
        ["loops", "--roles", "prefil"],
        ["make-model", "--shape", "tiny", "--out", "x", "--seed", "-1"],
    ],
)
def test_what_cannot_be_asked_for_is_refused(
    words: list[str], asked: list[tuple[str, str, dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *words]) == 2
    assert asked == []
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_fewer_layers_can_be_made(asked: list[tuple[str, str, dict[str, Any]]]) -> None:
    for words, layers in (([], 48), (["--layers", "4"], 4)):
        assert main(["bench", "make-model", "--shape", "qwen3-30b-a3b", "--out", "x", *words]) == 0
        assert asked[-1][2]["config"]["num_hidden_layers"] == layers


def test_make_model_and_engine_in_their_processes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, result = tmp_path / "model", tmp_path / "result.json"
    assert main(["bench", "make-model", "--shape", "tiny", "--out", str(folder)]) == 0
    assert main(["bench", "make-model", "--shape", "tiny", "--out", str(folder)]) == 2
    assert "not an empty folder" in capfd.readouterr().err
    words = [
        "--batches",
        "2",
        "--contexts",
        "32,4096",
        "--prompt-tokens",
        "32",
        "--cell-seconds",
        "5",
        "--threads",
        "1",
    ]
    assert main(["bench", "engine", "--model", str(folder), *words, "--json", str(result)]) == 0
    table = capfd.readouterr().out
    assert "decode 2 at 32" in table and "left out: decode of 2 at 4096" in table
    report = json.loads(result.read_text())
    assert [cell["context"] for cell in report["decode"]] == [32]
    assert str(tmp_path) not in result.read_text() + table


def test_a_benchmark_that_fails_says_so_in_its_exit_code(tmp_path: Path) -> None:
    assert main(["bench", "engine", "--model", str(tmp_path)]) == 2


def test_the_command_line_of_benchmarks_loads_no_torch() -> None:
    script = "import sys, tandem.cli.bench; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
