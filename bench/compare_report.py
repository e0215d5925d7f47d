"""What bench/compare.py found: medians, ratios, and the files in bench/results. No path of a machine gets into them."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TANDEM = "tandem"


@dataclass
class Comparison:
    """`times[cell][engine]` has one value a round, in seconds; a decode round's value is the median of its steps.

    `tokens[cell][engine]` are the first tokens of every round. `other_load`: the share of the machine's processors
    that went to everybody else while this ran.
    """

    date: str
    model: str
    machine: dict[str, Any]
    threads: int
    prompt_tokens: int
    context: int
    engines: dict[str, dict[str, Any]]
    absent: dict[str, str]
    other_load: float = 0.0
    times: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    tokens: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    limits: list[dict[str, Any]] = field(default_factory=list)

    def add(self, cell: str, engine: str, reply: dict[str, Any]) -> None:
        """Note one engine's answer."""
        seconds = reply["seconds"]
        value = statistics.median(seconds) if isinstance(seconds, list) else seconds
        self.times.setdefault(cell, {}).setdefault(engine, []).append(value)
        self.tokens.setdefault(cell, {}).setdefault(engine, []).extend(reply.get("tokens", ()))

    def drop(self, engine: str, reason: str) -> None:
        """Forget an engine that failed on the way; the report names it with the reason."""
        del self.engines[engine]
        self.absent[engine] = reason
        for found in (*self.times.values(), *self.tokens.values()):
            found.pop(engine, None)

    def median(self, cell: str, engine: str) -> float:
        return statistics.median(self.times[cell][engine])

    def ratio(self, cell: str, engine: str) -> float:
        """Tandem's time over another's, in the same round; below 1 Tandem is faster."""
        pairs = zip(self.times[cell][_TANDEM], self.times[cell][engine], strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)

    def floor_ratio(self, cell: str) -> float:
        floor = statistics.median(limits["floors"][cell] for limits in self.limits)
        return self.median(cell, _TANDEM) / floor

    def same_tokens(self, engine: str) -> tuple[int, int]:
        """How many first tokens of prompts are Tandem's, and of how many."""
        pairs = [
            pair
            for found in self.tokens.values()
            for pair in zip(found.get(_TANDEM, ()), found.get(engine, ()), strict=True)
        ]
        return sum(ours == theirs for ours, theirs in pairs), len(pairs)


def write_results(comparison: Comparison, folder: Path, label: str = "") -> list[Path]:
    """Write the table and the JSON, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    words = (comparison.date, slug_of(comparison.machine), comparison.model, label)
    stem = folder / "-".join(filter(None, words))
    table, values = stem.with_name(stem.name + ".md"), stem.with_name(stem.name + ".json")
    table.write_text("\n".join(table_of(comparison)) + "\n")
    values.write_text(json.dumps(values_of(comparison), indent=1) + "\n")
    return [table, values]


def slug_of(machine: dict[str, Any]) -> str:
    """The processor as a part of a file name."""
    widest = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd") if flag in machine["flags"]]
    words = re.sub(r"\(R\)|\(TM\)|processor|cpu|@.*?(?=\(|$)", "", machine["cpu"], flags=re.IGNORECASE)
    return "-".join(re.findall(r"[a-z0-9]+", f"{words} {widest[0] if widest else ''}".lower().replace("_", "")))


def values_of(comparison: Comparison) -> dict[str, Any]:
    names = comparison.engines
    return {
        "date": comparison.date,
        "model": comparison.model,
        "machine": comparison.machine,
        "threads": comparison.threads,
        "prompt_tokens": comparison.prompt_tokens,
        "context": comparison.context,
        "engines": comparison.engines,
        "absent": comparison.absent,
        "other_load": comparison.other_load,
        "seconds": comparison.times,
        "medians": {cell: {name: comparison.median(cell, name) for name in names} for cell in comparison.times},
        "tandem_over": {cell: {name: comparison.ratio(cell, name) for name in names} for cell in comparison.times},
        "tandem_over_floor": {cell: comparison.floor_ratio(cell) for cell in comparison.times},
        "limits": comparison.limits,
    }


def table_of(comparison: Comparison) -> Iterator[str]:
    machine = comparison.machine
    read = statistics.median(limits["read"] for limits in comparison.limits)
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in machine["matrix_rates"].items())
    yield f"# {comparison.model}: Tandem beside its peers, {comparison.date}"
    yield ""
    yield f"- {machine['cpu']}, {comparison.threads} threads; {' '.join(machine['flags'])}"
    yield f"- limits, measured in the same run: memory read {read / 1e9:.1f} GB/s; {rates}"
    yield f"- {machine['architecture']}, random weights, {machine['weight_bytes'] / 1e9:.2f} GB"
    rounds = len(next(iter(comparison.times.values()))[_TANDEM])
    yield f"- {rounds} rounds, engines in turns; everybody else took {comparison.other_load:.0%} of the processors"
    yield ""
    yield "| engine | version | ready after | peak memory | first tokens like Tandem's |"
    yield "|---|---|---|---|---|"
    for name, facts in comparison.engines.items():
        same, count = comparison.same_tokens(name)
        yield (
            f"| {name} | {facts['version']} | {facts['start_seconds']:.0f} s "
            f"| {facts['peak_bytes'] / 1e9:.1f} GB | {same} of {count} |"
        )
    for name, reason in comparison.absent.items():
        yield f"| {name} | {reason} | | | |"
    yield ""
    yield "Milliseconds, median; in brackets Tandem's time over this one's, median of the rounds' ratios."
    yield ""
    yield "| | " + " | ".join(comparison.engines) + " | Tandem over floor |"
    yield "|---|" + "---|" * (len(comparison.engines) + 1)
    for cell in comparison.times:
        kind, batch = cell.split()
        length = comparison.prompt_tokens if kind == "prefill" else comparison.context
        what = f"prefill of {batch} x {length}" if kind == "prefill" else f"decode step of {batch} at {length}"
        shown = [_shown(comparison, cell, name) for name in comparison.engines]
        yield f"| {what} | " + " | ".join(shown) + f" | {comparison.floor_ratio(cell):.2f} |"


def _shown(comparison: Comparison, cell: str, name: str) -> str:
    milliseconds = f"{comparison.median(cell, name) * 1e3:.1f}"
    return milliseconds if name == _TANDEM else f"{milliseconds} ({comparison.ratio(cell, name):.2f})"
