"""The report of `tandem bench engine` as a table for people and as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from tandem.engine.bench_engine import Cell, EngineReport


def write_report(report: EngineReport, json_path: str = "") -> None:
    """Print the table to stdout; with `json_path` write the JSON there."""
    sys.stdout.write("\n".join(lines_of(report)) + "\n")
    sys.stdout.flush()
    if json_path:
        Path(json_path).write_text(json.dumps(asdict(report), indent=1) + "\n")


def lines_of(report: EngineReport) -> Iterator[str]:
    machine = report.machine
    yield f"{report.model}: {report.architecture}, {report.weight_bytes / 1e9:.2f} GB of {report.dtype} weights"
    yield f"{machine.cpu}, {machine.num_threads} threads; {' '.join(machine.flags)}"
    yield f"operators {report.operators}, numerics {report.numerics or 'not claimed'}"
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in report.matrix_rates.items())
    yield f"limits ({report.limits_from}): read {report.read_bytes_per_second / 1e9:.1f} GB/s; {rates}"
    yield ""
    yield f"{'':<28}{'ms':>10}{'tokens/s':>11}{'floor ms':>11}  {'bound by':<9}{'time/floor':>11}"
    for cell in report.prefill:
        yield _line(f"prefill {cell.batch} x {cell.num_tokens // cell.batch}", cell)
    for cell in report.decode:
        yield _line(f"decode {cell.batch} at {cell.context}", cell)
    yield from ("", *(f"left out: {text}" for text in report.skipped)) if report.skipped else ()


def _line(name: str, cell: Cell) -> str:
    return (
        f"{name:<28}{cell.seconds * 1e3:>10.1f}{cell.tokens_per_second:>11.0f}{cell.floor_seconds * 1e3:>11.1f}"
        f"  {cell.bound:<9}{cell.ratio_to_floor:>11.2f}"
    )
