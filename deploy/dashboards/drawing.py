"""Panels drawn from queried data as one small page of SVG: a picture of what the dashboards show, without Grafana."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

COLUMN, ROW, GAP = 52, 27, 8  # pixels of a grid unit, and between panels
MAX_LEGEND = 5
_COLORS = ("#7eb26d", "#eab839", "#6ed0e0", "#ef843c", "#e24d42", "#1f78c1", "#ba43a9", "#705da0", "#508642", "#cca300")
_STYLE = """
body{margin:0;background:#111217;color:#ccccdc;font:12px 'DejaVu Sans',sans-serif}
.panel{position:absolute;background:#181b1f;border:1px solid #2c3235;border-radius:3px;overflow:hidden}
.title{padding:5px 9px;font-size:12.5px;font-weight:bold;white-space:nowrap}
.number{font-size:27px;text-align:center;padding-top:14px;color:#73bf69}.number.many{font-size:17px;padding-top:8px}
.bad{color:#f2495c}
.text{padding:11px 13px;font-size:13.5px;line-height:1.55}.row{position:absolute;font-size:14px;font-weight:bold}
.legend{padding:1px 9px;font-size:10.5px;line-height:15px}.legend span{margin-right:11px;white-space:nowrap}
i{display:inline-block;width:11px;height:3px;margin:0 5px 3px 0}
text{fill:#9fa7b3;font-size:10px}
"""


@dataclass(frozen=True, slots=True)
class Line:
    """One series: its legend, and (Unix time, value) in order; a value may be nan."""

    legend: str
    points: list[tuple[float, float]]


def page(board: dict[str, Any], lines: dict[int, list[Line]], began: float, ended: float) -> tuple[str, int, int]:
    """Return the HTML of a dashboard, its width and its height; `lines` by the panel's place in it."""
    parts, bottom = [], 0
    for number, panel in enumerate(board["panels"]):
        place = panel["gridPos"]
        x, y = place["x"] * COLUMN + GAP, place["y"] * ROW + GAP
        width, height = place["w"] * COLUMN - GAP, place["h"] * ROW - GAP
        bottom = max(bottom, y + height)
        box = f'style="left:{x}px;top:{y}px;width:{width}px;height:{height}px"'
        if panel["type"] == "row":
            parts.append(f'<div class="row" {box}>&#9662; {escape(panel["title"])}</div>')
            continue
        title = f'<div class="title">{escape(panel["title"])}</div>' if panel["title"] else ""
        if panel["type"] == "text":
            body = f'<div class="text">{_markdown(panel["options"]["content"])}</div>'
        elif panel["type"] == "stat":
            body = _stat(panel, lines[number])
        else:
            body = _graph(panel, lines[number], width, height - 28, began, ended)
        parts.append(f'<div class="panel" {box}>{title}{body}</div>')
    html = f'<!doctype html><meta charset="utf-8"><style>{_STYLE}</style>{"".join(parts)}'
    return html, 24 * COLUMN + GAP, bottom + GAP


def format_value(value: float, unit: str) -> str:
    """Write a value as people read it, in the units that the dashboards use."""
    if math.isnan(value):
        return "-"
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    if unit == "s":
        for factor, name in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
            if abs(value) * factor >= 1 or name == "µs" or value == 0:
                return f"{value * factor:.3g} {name}"
    suffix = {"reqps": " req/s", "ops": "/s", "Bps": "B/s"}.get(unit, "")
    for factor, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {name}{suffix}"
    return f"{value:.3g}{' ' if unit == 'Bps' else ''}{suffix}"


def _markdown(text: str) -> str:
    for mark, tag in (("**", "b"), ("*", "i style='all:unset;font-style:italic'")):
        pieces = text.split(mark)
        text = pieces[0]
        for number, piece in enumerate(pieces[1:]):
            text += (f"<{tag}>" if number % 2 == 0 else f"</{tag.split()[0]}>") + piece
    return text.replace("\n\n", "<br>")


def _stat(panel: dict[str, Any], lines: Sequence[Line]) -> str:
    defaults = panel["fieldConfig"]["defaults"]
    named = panel["options"].get("textMode") == "value_and_name"
    shown = []
    for line in lines:
        value = next((value for _, value in reversed(line.points) if not math.isnan(value)), math.nan)
        color = "green"
        for step in defaults["thresholds"]["steps"]:
            if step["value"] is None or value >= step["value"]:
                color = step["color"]
        value_text = format_value(value, defaults["unit"])
        text = escape(f"{line.legend} {value_text}" if named else value_text)
        shown.append(f'<div class="{"bad" if color == "red" else ""}">{text}</div>')
    return f'<div class="number{" many" if len(shown) > 1 else ""}">{"".join(shown) or "-"}</div>'


def _graph(panel: dict[str, Any], lines: Sequence[Line], width: int, height: int, began: float, ended: float) -> str:
    defaults = panel["fieldConfig"]["defaults"]
    stacked = defaults["custom"].get("stacking", {}).get("mode") == "normal"
    legend_height = 17 * (1 + (len(lines) > 3) + (len(lines) > MAX_LEGEND))
    left, bottom, top, right = 58, height - legend_height - 18, 6, width - 10
    base = [0.0] * max((len(line.points) for line in lines), default=0)
    layers: list[tuple[Line, list[float], list[float]]] = []
    for line in lines:
        values = [value for _, value in line.points]
        if stacked:
            upper = [below + (0.0 if math.isnan(value) else value) for below, value in zip(base, values, strict=False)]
            layers.append((line, base[: len(upper)], upper))
            base = upper + base[len(upper) :]
        else:
            layers.append((line, [0.0] * len(values), values))
    highest = defaults.get("max") or max((v for _, _, upper in layers for v in upper if not math.isnan(v)), default=0.0)
    ceiling = _round_up(highest) if highest > 0 else 1.0
    scale_x = (right - left) / max(1e-9, ended - began)
    parts = [_axes(ceiling, defaults["unit"], (left, right, top, bottom), began, ended)]
    for number, (line, lower, upper) in enumerate(layers):
        color = _COLORS[number % len(_COLORS)]
        for run in _runs(line, lower, upper):
            spots = [(left + (at - began) * scale_x, _y(high, ceiling, top, bottom)) for at, _, high in run]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
            if stacked:
                back = [(left + (at - began) * scale_x, _y(low, ceiling, top, bottom)) for at, low, _ in reversed(run)]
                area = path + " " + " ".join(f"{x:.1f},{y:.1f}" for x, y in back)
                parts.append(f'<polygon points="{area}" fill="{color}" fill-opacity="0.35"/>')
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.4"/>')
    svg = f'<svg width="{width}" height="{bottom + 18}">{"".join(parts)}</svg>'
    return svg + _legend(lines)


def _runs(line: Line, lower: list[float], upper: list[float]) -> list[list[tuple[float, float, float]]]:
    """Cut a series where it has no value."""
    runs: list[list[tuple[float, float, float]]] = [[]]
    for (at, value), low, high in zip(line.points, lower, upper, strict=False):
        if math.isnan(value):
            runs.append([])
        else:
            runs[-1].append((at, low, high))
    return [run for run in runs if run]


def _axes(ceiling: float, unit: str, box: tuple[int, int, int, int], began: float, ended: float) -> str:
    left, right, top, bottom = box
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = bottom - share * (bottom - top)
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#2c3235"/>')
        label = escape(format_value(share * ceiling, unit))
        parts.append(f'<text x="{left - 6}" y="{y + 3:.1f}" text-anchor="end">{label}</text>')
    for number in range(4):
        at = began + (ended - began) * number / 3
        x = left + (right - left) * number / 3
        anchor = ("start", "middle", "middle", "end")[number]
        clock = time.strftime("%H:%M:%S", time.gmtime(at))
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="{anchor}">{clock}</text>')
    return "".join(parts)


def _legend(lines: Sequence[Line]) -> str:
    shown = [
        f'<span><i style="background:{_COLORS[number % len(_COLORS)]}"></i>{escape(line.legend)}</span>'
        for number, line in enumerate(lines[:MAX_LEGEND])
    ]
    if len(lines) > MAX_LEGEND:
        shown.append(f"<span>and {len(lines) - MAX_LEGEND} more</span>")
    return f'<div class="legend">{"".join(shown)}</div>'


def _y(value: float, ceiling: float, top: int, bottom: int) -> float:
    return bottom - min(1.0, value / ceiling) * (bottom - top)


def _round_up(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if value <= step * power * 1.000001)
