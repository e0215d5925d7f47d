"""The command line: help that is complete, errors of one line, exit codes."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tandem.cli.config_help import help_text
from tandem.cli.main import main
from tandem.config_load import PROGRAM_SECTIONS, Program, load
from tandem.config_values import SETTINGS
from tandem.core.roles import all_loops

PROGRAMS: tuple[Program, ...] = ("gateway", "prefill", "decode", "unified")


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_names_every_setting_with_default_and_explanation(program: Program) -> None:
    text = " ".join(help_text(program).split())
    for setting in SETTINGS.values():
        shown = setting.flag in text
        assert shown == (setting.section in PROGRAM_SECTIONS[program]), setting.key
        if shown:
            assert " ".join(setting.field.metadata["help"].split()) in text


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_fits_a_terminal(program: Program) -> None:
    assert max(len(line) for line in help_text(program).splitlines()) <= 120


@pytest.mark.parametrize("words", [["--help"], ["prefill", "--help"], ["up", "--help"], ["generate", "-h"], []])
def test_help_is_success(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(words)
    except SystemExit as end:
        code = int(end.code or 0)
    assert code == 0
    assert "tandem" in capsys.readouterr().out


def test_the_printed_configuration_is_a_file_that_can_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["decode", "--print-config", "--loop", "normal", "--cache.page-tokens", "64"]) == 0
    text = capsys.readouterr().out
    assert tomllib.loads(text)["cache"]["page_tokens"] == 64
    file = tmp_path / "decode.toml"
    file.write_text(text)
    flags = ["--loop", "normal", "--cache.page-tokens", "64"]
    assert load("decode", ["--config", str(file)], {}) == load("decode", flags, {})


def test_faults_are_a_line_each_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prefill", "--server.prot", "1", "--loop", "fast"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 2 and all(line.startswith("tandem prefill: ") for line in lines)
    assert "did you mean --server.port?" in lines[0]


@pytest.mark.parametrize(
    "words",
    [
        ["up", "--decode", "0"],
        ["up", "--prefill", "-1"],
        ["up", "--set", "cache.page_token=4"],
        ["up", "--set", "cache.page_tokens=0"],
        ["generate", "--token-ids", "1,x"],
        ["generate", "--token-ids=-1"],
    ],
)
def test_wrong_usage_is_exit_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("words", [["upp"], ["up", "--transport", "pigeon"], ["generate", "--nonsense"]])
def test_what_argparse_refuses_is_exit_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_nobody_answers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.cli.client._CONNECT_SECONDS", 0.2)
    assert main(["generate", "--address", "127.0.0.1:1", "hello"]) == 1
    error = capsys.readouterr().err
    assert "no gateway answers at 127.0.0.1:1" in error and "tandem up" in error


def marked(text: str) -> list[str]:
    return [line.split()[1] for line in text.splitlines() if line.startswith("* ") and "selected" not in line]


@pytest.mark.parametrize(
    ("words", "selected", "reason"),
    [
        ([], ["overlap", "overlap_prefill", "overlap_decode"], "scheduler.loop is auto"),
        (["prefill", "--parallel.pipeline-size", "4"], ["pipelined_prefill"], "parallel.pipeline_size is 4"),
        (["decode", "--loop", "normal"], ["normal_decode"], "overlap is off"),
    ],
)
def test_loops_are_listed_and_the_selected_one_is_marked(
    words: list[str], selected: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["loops", *words]) == 0
    text = capsys.readouterr().out
    assert all(f" {loop.name} " in text for loop in all_loops(2))
    assert "event_loop_pp_disagg_prefill" in text and "event_loop_normal " in text
    assert marked(text) == selected and reason in text
    assert max(map(len, text.splitlines())) <= 130


@pytest.mark.parametrize("words", [["pre"], ["--loop", "overlap", "--parallel.pipeline-size", "2"]])
def test_loops_refuses_what_cannot_be(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["loops", *words]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_experts_are_spread_over_tensor_ranks_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["unified", "--parallel.tensor-size", "3", "--parallel.expert-size", "2"]) == 2
    assert "parallel.expert_size: 2 does not divide parallel.tensor_size 3" in capsys.readouterr().err


def test_the_command_line_loads_neither_torch_nor_grpc() -> None:
    script = (
        "import sys, tandem.cli.main, tandem.cli.programs, tandem.cli.cluster, tandem.cli.loops, tandem.cli.doctor;"
        "print([name for name in ('torch', 'grpc', 'mooncake') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_no_frontend_loads_torch() -> None:
    script = "import sys, tandem.worker.main, tandem.cli.up, tandem.cli.demo; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
