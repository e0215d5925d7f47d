"""What `tandem bench` runs beside the command line: made checkpoints, floors, the engine benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tandem.cli.bench_shapes import SHAPES
from tandem.core.messages.plans import Row, Sample
from tandem.core.messages.sampling import SamplingParams
from tandem.engine import bench_limits
from tandem.engine.bench_engine import Cell, EngineBenchRequest, EngineReport, bench_engine
from tandem.engine.bench_limits import (
    ATTENTION,
    EXPERTS,
    HEAD,
    LINEAR,
    Probes,
    Rates,
    Work,
    describe_machine,
    part_works,
    work_of,
)
from tandem.engine.bench_model import MakeModelRequest, make_model
from tandem.engine.bench_plans import TimedPlans
from tandem.engine.bench_profile import OUTSIDE, step_profile
from tandem.engine.bench_table import lines_of, write_report
from tandem.engine.models.spec import parse_spec
from tandem.engine.native.library import PROFILE_KINDS, NativeUnavailable
from tandem.engine.ops.contract import KindTime
from tandem.engine.ops.cpu import CpuOperators
from tandem.errors import ConfigError
from tests.engine.conftest import EngineStarter


def made(folder: Path, shape: str = "tiny", **options: Any) -> Path:
    make_model(MakeModelRequest(config=SHAPES[shape], folder=str(folder), **options), lambda text: None)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    return found


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [("tiny", "bfloat16"), ("tiny", "float32"), ("tiny-mixtral", "bfloat16"), ("tiny-qwen3-moe", "bfloat16")],
)
def test_a_made_checkpoint_is_served(tmp_path: Path, shape: str, dtype: str, start: EngineStarter) -> None:
    folder = made(tmp_path / "model", shape, dtype=dtype)
    assert all(str(tensor.dtype) == f"torch.{dtype}" for tensor in tensors_of(folder).values())
    engine = start(folder)
    assert engine.layout.dtype == dtype
    plans = TimedPlans(engine)
    _, tokens = plans.execute([plans.prompt_rows(3, 16)])
    assert len(tokens) == 3 and len(set(tokens)) > 1


def test_values_depend_on_seed_and_name_not_on_shards(tmp_path: Path) -> None:
    one = tensors_of(made(tmp_path / "one"))
    folder = made(tmp_path / "many", shard_bytes=100_000)
    many, other = tensors_of(folder), tensors_of(made(tmp_path / "other", seed=1))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2 and set(index["weight_map"]) == set(one)
    assert one.keys() == many.keys() == other.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_layers_keep_the_size_of_what_they_get(tmp_path: Path) -> None:
    weight = tensors_of(made(tmp_path / "model"))["model.layers.0.self_attn.o_proj.weight"].float()
    assert weight.square().sum(1).mean().item() == pytest.approx(1.0, rel=0.05)


def test_a_folder_that_is_not_empty_and_a_full_disk_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(tmp_path / "model")
    with pytest.raises(ConfigError, match="not an empty folder"):
        made(folder)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ConfigError, match="of the disk are free"):
        made(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def row(start: int, num_tokens: int, *, sampled: bool = True) -> Row:
    sample = Sample(params=SamplingParams(), output_index=0) if sampled else None
    return Row(request_id=0, slot=0, start=start, num_tokens=num_tokens, token_ids=(), pages=(), sample=sample)


def test_work_counts_every_weight_once_and_every_visible_key() -> None:
    spec = parse_spec({**SHAPES["tiny"], "num_hidden_layers": 1}, {})
    hidden, middle, vocabulary, kv = 128, 320, 4096, 64  # kv: 2 heads of 32
    matrices = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * middle
    weights = matrices + vocabulary * hidden + 3 * hidden  # and three norms
    step = work_of(spec, [row(9, 1), row(19, 1)], 2)
    assert step.num_bytes == 2 * (weights + 2 * kv * (10 + 20))
    assert step.flops == 2 * 2 * (matrices + vocabulary * hidden) + 4 * 128 * (10 + 20)
    chunk = work_of(spec, [row(2, 3, sampled=False)], 4)
    assert chunk.num_bytes == 4 * (weights - vocabulary * hidden + 2 * kv * 5)
    assert chunk.flops == 2 * 3 * matrices + 4 * 128 * (3 + 4 + 5)


def test_work_counts_the_experts_that_tokens_choose() -> None:
    config = {**SHAPES["tiny-mixtral"], "num_hidden_layers": 1}
    one, two = (parse_spec({**config, "num_experts_per_tok": count}, {}) for count in (1, 2))
    expert = 3 * 128 * 96
    many = [row(0, 1) for _ in range(200)]
    assert work_of(two, [row(0, 1)], 2).num_bytes - work_of(one, [row(0, 1)], 2).num_bytes == 2 * expert
    assert work_of(two, many, 2).flops - work_of(one, many, 2).flops == 2 * 200 * expert
    assert work_of(two, many, 2).num_bytes - work_of(one, [row(0, 1)], 2).num_bytes == pytest.approx(
        2 * 7 * expert + 2 * 2 * 2 * 32 * 199
    )


def test_a_window_hides_keys() -> None:
    config = {**SHAPES["tiny-qwen2"], "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    spec = parse_spec(config, {})
    whole = parse_spec(SHAPES["tiny-qwen2"], {})
    seen = 4 * 128 * spec.num_layers
    assert work_of(whole, [row(9, 1)], 1).flops - work_of(spec, [row(9, 1)], 1).flops == seen * (10 - 4)
    hidden = 2 * 64 * spec.num_layers
    assert work_of(whole, [row(9, 1)], 1).num_bytes - work_of(spec, [row(9, 1)], 1).num_bytes == hidden * (10 - 4)


def test_the_floor_is_what_takes_longer() -> None:
    rates = Rates(read=10.0, multiply=100.0, attend=50.0)
    assert rates.floor_seconds(Work(20.0, 100.0)) == 2.0 and rates.bound(Work(20.0, 100.0)) == "memory"
    assert rates.floor_seconds(Work(20.0, 500.0)) == 5.0 and rates.bound(Work(20.0, 500.0)) == "compute"


def test_each_part_has_a_floor_of_its_own() -> None:
    rates = Rates(read=10.0, multiply=100.0, attend=50.0)
    parts = {LINEAR: Work(20.0, 100.0), HEAD: Work(0.0, 0.0), EXPERTS: Work(1.0, 300.0), ATTENTION: Work(20.0, 300.0)}
    assert rates.part_floors(parts) == {LINEAR: 2.0, HEAD: 0.0, EXPERTS: 3.0, ATTENTION: 6.0}
    assert parts.keys() <= set(PROFILE_KINDS), "or a profile would not show them"


@pytest.mark.parametrize("shape", ["tiny-qwen2", "tiny-mixtral"])
def test_parts_are_all_of_the_work(shape: str) -> None:
    spec = parse_spec(SHAPES[shape], {})
    rows = [row(9, 1), row(2, 3, sampled=False)]
    parts = part_works(spec, rows, 2)
    assert Work(sum(w.num_bytes for w in parts.values()), sum(w.flops for w in parts.values())) == work_of(
        spec, rows, 2
    )
    assert parts[HEAD].num_bytes == 2 * spec.vocab_size * spec.hidden_size
    assert bool(parts[EXPERTS].flops) == (spec.experts is not None)
    assert part_works(spec, rows[1:], 2)[HEAD] == Work(0.0, 0.0)


@pytest.fixture
def quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_limits, "_PROBE_BYTES", 1 << 22)
    monkeypatch.setattr(bench_limits, "_PROBE_ROUNDS", 1000)
    monkeypatch.setattr(bench_limits, "_TORCH_SIZE", 64)


@pytest.mark.usefixtures("quick_probes")
def test_torch_stands_in_for_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise NativeUnavailable("gone")

    monkeypatch.setattr(bench_limits, "load_library", missing)
    probes = Probes("reference", "bfloat16", 1)
    assert probes.source == "torch"
    rates = probes.measure()
    assert rates.read > 1e6 and rates.multiply > 1e6
    assert set(probes.matrix_rates()) == {"torch float32", "torch bfloat16"}


@pytest.mark.usefixtures("quick_probes")
def test_the_engine_is_measured_and_what_cannot_be_is_named(tmp_path: Path) -> None:
    folder = made(tmp_path / "model")
    request = EngineBenchRequest(
        model=str(folder),
        ops="reference",
        batches=(1, 3),
        contexts=(24, 600, 2049),
        prompt_tokens=16,
        num_threads=1,
        pool_bytes=64 * 16 * 512,  # 64 pages of 16 tokens
        page_tokens=16,
        cell_seconds=5.0,
        profile=True,
    )
    report = bench_engine(request, lambda text: None)
    assert report.model == "model" and report.operators == "reference" and report.limits_from
    assert [cell.batch for cell in report.prefill] == [1, 4]
    assert [(cell.batch, cell.context) for cell in report.decode] == [(1, 24), (3, 24), (1, 600)]
    for cell in (*report.prefill, *report.decode):
        assert cell.seconds > 0 and cell.ratio_to_floor > 0
        assert cell.tokens_per_second == pytest.approx(cell.num_tokens / cell.seconds)
        assert cell.ratio_to_parts_floor > 0 and cell.profile is None
    assert len(report.skipped) == 4 and "operators reference cannot tell" in report.skipped[0]
    assert "the pool has" in report.skipped[1] and "the model's context is 2048" in report.skipped[2]
    assert str(tmp_path) not in "\n".join(lines_of(report))


def test_what_would_take_too_long_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Probes, "measure", lambda probes: Rates(1.0, 1.0, 1.0))
    request = EngineBenchRequest(
        model=str(made(tmp_path / "model")),
        ops="reference",
        batches=(1,),
        contexts=(8,),
        prompt_tokens=8,
        num_threads=1,
    )
    report = bench_engine(request, lambda text: None)
    assert report.prefill == report.decode == () and len(report.skipped) == 3
    assert all("more than 20 s" in text for text in report.skipped)


@pytest.mark.usefixtures("quick_probes")
def test_a_profile_says_where_the_time_of_each_cell_goes(tmp_path: Path) -> None:
    try:
        CpuOperators()
    except NativeUnavailable as reason:
        pytest.skip(str(reason))
    request = EngineBenchRequest(
        model=str(made(tmp_path / "model", "tiny-mixtral")),
        batches=(2,),
        contexts=(600,),
        prompt_tokens=16,
        num_threads=2,
        page_tokens=64,
        cell_seconds=5.0,
        profile=True,
        json_path=str(tmp_path / "report.json"),
    )
    report = bench_engine(request, lambda text: None)
    assert report.page_tokens == 64 and not report.skipped
    for cell in (*report.prefill, *report.decode):
        assert cell.profile is not None and cell.profile.repetitions > 0
        times = {part.kind: part for part in cell.profile.parts}
        assert times.keys() | {"merge"} == {*PROFILE_KINDS, OUTSIDE} - {"other"}
        assert ("merge" in times) == (cell in report.decode), "only long contexts are cut into parts"
        assert sum(part.seconds for part in times.values()) == pytest.approx(cell.profile.seconds)
        assert sum(part.share for part in times.values()) == pytest.approx(1.0)
        floors = [part.floor_seconds for part in times.values() if part.floor_seconds is not None]
        assert len(floors) == 4 and all(floor > 0 for floor in floors)
    write_report(report, request.json_path)
    written = json.loads(Path(request.json_path).read_text())
    assert written["decode"][0]["profile"]["parts"][-1]["kind"] == OUTSIDE


def test_the_table_has_a_line_for_each_cell() -> None:
    kinds = (KindTime(LINEAR, 1.5, 0.25), KindTime("norm", 0.1, 0.0), KindTime(EXPERTS, 0.0, 0.0))
    cell = Cell(
        batch=4,
        context=0,
        num_tokens=4096,
        seconds=2.0,
        tokens_per_second=2048.0,
        floor_seconds=1.6,
        ratio_to_floor=1.25,
        parts_floor_seconds=1.7,
        ratio_to_parts_floor=1.18,
        bound="compute",
        repetitions=3,
        profile=step_profile(2.0, kinds, {LINEAR: 1.25, EXPERTS: 0.0}, 1),
    )
    report = EngineReport(
        model="m",
        architecture="LlamaForCausalLM",
        dtype="bfloat16",
        operators="reference",
        numerics="",
        machine=describe_machine(2, Path("/nowhere")),
        limits_from="torch",
        read_bytes_per_second=2e10,
        matrix_rates={"torch float32": 1e11},
        weight_bytes=1 << 30,
        page_tokens=16,
        prefill=(cell,),
        decode=(),
        skipped=(),
    )
    lines = list(lines_of(report))
    line, profiled = [line for line in lines if line.startswith("prefill 4 x 1024")]
    assert line.split()[4:] == ["2000.0", "2048", "1600.0", "compute", "1.25", "1700.0", "1.18"]
    assert profiled.split()[4:] == ["2000.00"]
    parts = [line.split() for line in lines[lines.index(profiled) + 1 : -2]]
    assert parts == [
        ["linear", "1500.00", "75.0%", "250.00", "1250.00", "1.20"],
        ["norm", "100.00", "5.0%", "0.00"],
        ["outside", "400.00", "20.0%", "0.00"],
    ]


def test_a_machine_is_described_by_its_cpuinfo(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("model name : Some CPU\ncpu family : 6\nmodel : 143\nflags : sse avx2 amx_bf16 fma\n" * 2)
    machine = describe_machine(4, file)
    assert machine.cpu == "Some CPU (family 6, model 143)"
    assert machine.flags == ("avx2", "fma", "amx_bf16")
