"""What is in a PromQL expression: the series that it reads, and the vectors that its comparisons compare."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import promql_parser

from tandem.telemetry import table

_SERIES = {"counter": ("_total",), "gauge": ("",), "info": ("_info",), "histogram": ("_bucket", "_sum", "_count")}
SERIES = {metric.name + end: metric for metric in table.ALL_METRICS for end in _SERIES[metric.kind]}
_COMPARISONS = {"==", "!=", ">", "<", ">=", "<=", "and", "or", "unless"}
TARGET_LABELS = {"namespace", "pod", "container", "job", "instance"}  # what a scrape of pods adds


def walk(node: Any) -> Iterator[Any]:
    """Yield a parsed expression and everything inside it."""
    yield node
    for name in ("lhs", "rhs", "expr", "param", "vector_selector"):
        child = getattr(node, name, None)
        if child is not None:
            yield from walk(child)
    for argument in getattr(node, "args", None) or ():
        yield from walk(argument)


def selectors(expression: str) -> list[Any]:
    """Return every vector selector; raises ValueError if the expression does not parse."""
    return [node for node in walk(promql_parser.parse(expression)) if isinstance(node, promql_parser.VectorSelector)]


def unknown_metrics(expression: str, recorded: Collection[str] = ()) -> list[str]:
    """Return series that no program exports and no rule records, and labels that they do not have."""
    faults = []
    for selector in selectors(expression):
        metric = SERIES.get(selector.name)
        if metric is None:
            if selector.name not in recorded:
                faults.append(f"{selector.name} in {expression}")
            continue
        known = {*metric.labels, *TARGET_LABELS, "le"}
        if metric.kind == "info":
            known |= {"loop", "model", "dtype", "operators", "fingerprint", "version"}
        labels = {matcher.name for matcher in selector.matchers.matchers}
        faults += [f"{selector.name} has no label {label}" for label in labels - known]
    return faults


def compared_vectors(expression: str) -> list[str]:
    """Return the vectors that an alert compares with thresholds: what has to have data for it to work at all."""
    return list(dict.fromkeys(_vectors(promql_parser.parse(expression))))


def _vectors(node: Any) -> Iterator[str]:
    if isinstance(node, promql_parser.ParenExpr):
        yield from _vectors(node.expr)
    elif isinstance(node, promql_parser.BinaryExpr) and str(node.op) in _COMPARISONS:
        yield from _vectors(node.lhs)
        yield from _vectors(node.rhs)
    elif any(isinstance(inner, promql_parser.VectorSelector) for inner in walk(node)):
        yield node.prettify()
