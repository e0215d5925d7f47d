"""The table of metrics as Markdown, between two marks of docs/observability.md; `generate` writes and checks it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tandem.telemetry import table
from tandem.telemetry.table import Metric

PAGE = Path(__file__).resolve().parents[2] / "docs" / "observability.md"
BEGIN, END = "<!-- metrics: made by python -m deploy.dashboards.generate -->", "<!-- end of metrics -->"
_SECTIONS: tuple[tuple[str, Sequence[Metric]], ...] = (
    ("Gateway", table.GATEWAY_METRICS),
    ("Every worker", tuple(metric for metric in table.WORKER_METRICS if metric is not table.BUILD_INFO)),
    ("Decode workers", table.DECODE_METRICS),
    ("With `telemetry.vllm_metrics`, workers", table.VLLM_METRICS),
    ("With `telemetry.genai_metrics`, gateway", table.GENAI_METRICS),
)


def rendered() -> str:
    """Return the page with the table as it should be."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    parts = []
    for title, metrics in _SECTIONS:
        parts.append(f"**{title}**\n\n| metric | labels | |\n|---|---|---|\n" + "".join(map(_row, metrics)))
    return f"{before}{BEGIN}\n\n" + "\n".join(parts) + f"\n{END}{after}"


def _row(metric: Metric) -> str:
    end = {"counter": "_total", "info": "_info"}.get(metric.kind, "")
    labels = ", ".join(metric.labels)
    kind = " (histogram)" if metric.kind == "histogram" else ""
    return f"| `{metric.name}{end}` | {labels} | {metric.help}{kind} |\n"
