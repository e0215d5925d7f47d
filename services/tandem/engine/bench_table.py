"""The report of `tandem bench engine` as a table for people and as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from tandem.engine.bench_engine import Cell, EngineReport
from tandem.engine.bench_profile import OUTSIDE, StepProfile


def write_report(report: EngineReport, json_path: str = "") -> None:
    """Print the table to stdout; with `json_path` write the JSON there."""
    sys.stdout.write("\n".join(lines_of(report)) + "\n")
    sys.stdout.flush()
    if json_path:
        Path(json_path).write_text(json.dumps(asdict(report), indent=1) + "\n")


def lines_of(report: EngineReport) -> Iterator[str]:
    machine = report.machine
    yield f"{report.model}: {report.architecture}, {report.weight_bytes / 1e9:.2f} GB of {report.dtype} weights"
    yield f"pages of {report.page_tokens} tokens"
    yield f"{machine.cpu}, {machine.num_threads} threads; {' '.join(machine.flags)}"
    yield f"operators {report.operators}, numerics {report.numerics or 'not claimed'}"
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in report.matrix_rates.items())
    yield f"limits ({report.limits_from}): read {report.read_bytes_per_second / 1e9:.1f} GB/s; {rates}"
    yield ""
    cells = {f"prefill {cell.batch} x {cell.num_tokens // cell.batch}": cell for cell in report.prefill}
    cells |= {f"decode {cell.batch} at {cell.context}": cell for cell in report.decode}
    heads = f"{'':<28}{'ms':>10}{'tokens/s':>11}{'floor ms':>11}  {'bound by':<9}{'time/floor':>11}"
    yield f"{heads}{'parts ms':>11}{'time/parts':>12}"
    yield from (_line(name, cell) for name, cell in cells.items())
    yield "parts: the sum of the floors of linears, output head, experts and attention."
    yield "They run one after another, so this is what a step can reach."
    profiles = {name: cell.profile for name, cell in cells.items() if cell.profile is not None}
    yield from _profile_lines(profiles) if profiles else ()
    yield from ("", *(f"left out: {text}" for text in report.skipped)) if report.skipped else ()


def _line(name: str, cell: Cell) -> str:
    return (
        f"{name:<28}{cell.seconds * 1e3:>10.1f}{cell.tokens_per_second:>11.0f}{cell.floor_seconds * 1e3:>11.1f}"
        f"  {cell.bound:<9}{cell.ratio_to_floor:>11.2f}"
        f"{cell.parts_floor_seconds * 1e3:>11.1f}{cell.ratio_to_parts_floor:>12.2f}"
    )


def _profile_lines(profiles: dict[str, StepProfile]) -> Iterator[str]:
    yield ""
    yield f"{'where the time goes':<28}{'ms':>10}{'share':>11}{'waited ms':>11}{'floor ms':>11}{'time/floor':>12}"
    for name, profile in profiles.items():
        yield f"{name:<28}{profile.seconds * 1e3:>10.2f}"
        for part in profile.parts:
            line = f"  {part.kind:<26}{part.seconds * 1e3:>10.2f}{part.share:>11.1%}{part.waited_seconds * 1e3:>11.2f}"
            if part.floor_seconds:
                line += f"{part.floor_seconds * 1e3:>11.2f}{part.seconds / part.floor_seconds:>12.2f}"
            yield line
    yield "The step whose time was the median of some more with the profiler on. waited: threads had no task, on"
    yield f"average of all. {OUTSIDE}: launch, batch, sampling, whatever is no phase of the operators."
