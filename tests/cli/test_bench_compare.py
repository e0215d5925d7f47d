"""bench/compare.py: its report's arithmetic, and one small run of real processes."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tandem.cli.bench_shapes import SHAPES
from tandem.engine.bench_model import MakeModelRequest, make_model

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("compare_report")


def comparison_of(report: Any) -> Any:
    machine = {
        "cpu": "Some(R) CPU @ 2.00GHz (family 6, model 1)",
        "flags": ["avx2", "avx512f"],
        "matrix_rates": {"avx2 float32": 1e11},
        "weight_bytes": 1_000_000,
        "architecture": "LlamaForCausalLM",
    }
    facts = {"version": "1", "start_seconds": 1.0, "peak_bytes": 1_000_000}
    names = ("tandem", "peer", "gone")
    comparison = report.Comparison("2026-01-01", "m", machine, 2, 16, 8, {name: dict(facts) for name in names}, {})
    for ours, theirs in ((1.0, 2.0), (3.0, 4.0), (10.0, 2.0)):  # a disturbed round moves no median
        comparison.limits.append({"read": 1e10, "multiply": 1e11, "floors": {"prefill 1": 2.0, "decode 2": 0.5}})
        for name, seconds in (("tandem", ours), ("peer", theirs), ("gone", 1.0)):
            comparison.add("prefill 1", name, {"seconds": seconds, "tokens": [int(seconds)]})
            comparison.add("decode 2", name, {"seconds": [9.0, seconds, seconds]})
    comparison.drop("gone", "failed at decode of 2")
    return comparison


def test_ratios_are_those_within_a_round(report: Any) -> None:
    comparison = comparison_of(report)
    assert comparison.median("decode 2", "tandem") == 3.0
    assert comparison.ratio("decode 2", "peer") == 0.75  # of 0.5, 0.75 and 5
    assert comparison.floor_ratio("prefill 1") == 1.5
    assert comparison.same_tokens("tandem") == (3, 3)
    assert comparison.same_tokens("peer") == (0, 3)


def test_the_table_has_every_engine_and_says_who_failed(report: Any, tmp_path: Path) -> None:
    table, values = report.write_results(comparison_of(report), tmp_path / "results")
    assert table.name == "2026-01-01-some-family-6-model-1-avx512f-m.md"
    text = table.read_text()
    assert "| decode step of 2 at 8 | 3000.0 | 2000.0 (0.75) | 6.00 |" in text
    assert "| gone | failed at decode of 2 |" in text
    assert json.loads(values.read_text())["tandem_over"]["decode 2"] == {"tandem": 1.0, "peer": 0.75}


def test_prompts_are_new_in_every_trial_and_equal_for_everybody(report: Any) -> None:
    protocol = importlib.import_module("compare_protocol")
    setup = protocol.Setup("m", 1, 16, (1, 2), 8, (1,), 2, 100, {})
    first = protocol.prompts_of(setup, 0, 2)
    assert [len(prompt) for prompt in first] == [16, 16] and first[0] != first[1]
    assert protocol.prompts_of(setup, 0, 2) == first
    assert protocol.prompts_of(setup, 1, 2) != first


def test_no_prompt_begins_like_a_context_of_decode_steps(report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts are the beginnings of trial 0's prompts: an engine with a prefix cache would have half a prompt."""
    compare = importlib.import_module("compare")
    trials = []

    class Engine:
        def ask(self, *, kind: str, batch: int, trial: int) -> dict[str, Any]:
            trials.append(trial)
            return {"seconds": 1.0, "tokens": [0]}

    monkeypatch.setattr(compare.time, "sleep", lambda seconds: None)
    for trial in (-1, 0, 1):
        compare._ask({"tandem": Engine()}, comparison_of(report), "tandem", kind="prefill", batch=1, trial=trial)
    assert 0 not in trials and len(set(trials)) == 3


def test_a_comparison_with_a_peer_that_does_not_start(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_model(MakeModelRequest(config=SHAPES["tiny"], folder=str(folder), dtype="float32"), lambda text: None)
    words = ["--model", str(folder), "--rounds", "1", "--threads", "1", "--prompt-tokens", "16", "--context", "8"]
    words += ["--prefill-batches", "1,2", "--decode-batches", "2", "--steps", "2", "--transformers", ""]
    words += ["--llama-python", sys.executable, "--out", str(tmp_path / "results"), "--work", str(tmp_path)]
    command = [sys.executable, str(BENCH / "compare.py"), *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    (values,) = (tmp_path / "results").glob("*.json")
    found = json.loads(values.read_text())
    assert set(found["engines"]) == {"tandem"} and found["absent"] == {"llama.cpp": "did not start"}
    assert set(found["medians"]) == {"prefill 1", "prefill 2", "decode 2"}
    (table,) = (tmp_path / "results").glob("*.md")
    assert str(tmp_path) not in values.read_text() + table.read_text()


@pytest.mark.slow
def test_transformers_gives_the_same_first_tokens(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_model(MakeModelRequest(config=SHAPES["tiny-qwen2"], folder=str(folder), dtype="float32"), lambda text: None)
    words = ["--model", str(folder), "--rounds", "1", "--threads", "1", "--prompt-tokens", "16", "--context", "8"]
    words += ["--prefill-batches", "1,2", "--decode-batches", "2", "--steps", "2", "--transformers", "float32"]
    command = [sys.executable, str(BENCH / "compare.py"), *words, "--out", str(tmp_path), "--work", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("3 of 3") == 2
