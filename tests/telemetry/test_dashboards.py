"""The dashboards: what the code makes, readable by Grafana's SDK, of metrics that exist, with words that help."""

from __future__ import annotations

import json
from typing import Any

import promql_parser
import pytest
from deploy.dashboards import generate
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests.telemetry.expressions import SERIES, TARGET_LABELS, selectors, unknown_metrics, walk
from tests.telemetry.panels import BOARDS, everything, load, panels


def test_the_files_and_the_table_of_metrics_are_what_the_code_makes() -> None:
    assert generate.stale() == []
    assert set(BOARDS) == {"overview", "handoff", "workers"}


@pytest.mark.parametrize("board", BOARDS)
def test_the_sdk_parses_them(board: str) -> None:
    data = load(board)
    parsed = Dashboard.from_json(data)
    assert parsed.uid == f"tandem-{board}"
    again = json.loads(json.dumps(parsed, cls=JSONEncoder))
    assert {panel["title"] for panel in again["panels"]} == {panel["title"] for panel in data["panels"]}
    assert len(again["panels"]) == len(data["panels"]) > 10


@pytest.mark.parametrize("board", BOARDS)
def test_expressions_parse_and_use_metrics_of_the_table(board: str) -> None:
    faults = []
    for panel in panels(board):
        for expression in panel.expressions(window="5m"):
            faults += unknown_metrics(expression)
            faults += _unknown_groups(expression)
    assert not faults, faults


@pytest.mark.parametrize("board", BOARDS)
def test_legends_name_labels_that_the_result_has(board: str) -> None:
    for panel in panels(board):
        for target, expression in zip(panel.targets, panel.expressions(window="5m"), strict=True):
            groups = _groups(promql_parser.parse(expression))
            legend = target.get("legendFormat") or ""
            assert set(_braced(legend)) <= groups, f"{panel.title}: {legend} of {expression}"


@pytest.mark.parametrize("board", BOARDS)
def test_they_follow_the_variables(board: str) -> None:
    names = {variable["name"] for variable in load(board)["templating"]["list"]}
    assert names == {"datasource", "namespace", "role"}
    for panel in panels(board):
        assert panel.data["datasource"]["uid"] == "${datasource}"
        for target in panel.targets:
            assert 'namespace=~"$namespace"' in target["expr"] or target["expr"].startswith("vector("), panel.title


@pytest.mark.parametrize("board", BOARDS)
def test_panels_say_what_they_show_and_what_to_do(board: str) -> None:
    for panel in panels(board):
        assert panel.targets, panel.title
        assert len(panel.data["description"]) > 5, panel.title
        assert panel.data["fieldConfig"]["defaults"]["unit"], panel.title
        assert all(target.get("legendFormat") for target in panel.targets) or panel.data["type"] == "stat", panel.title
    titles = [panel.title for panel in panels(board)]
    assert len(titles) == len(set(titles))
    texts = [panel["options"]["content"] for panel in everything(board) if panel["type"] == "text"]
    assert "Not rendered by Grafana" in "".join(texts)


@pytest.mark.parametrize("board", BOARDS)
def test_panels_do_not_lie_over_each_other(board: str) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in load(board)["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} over {taken[x, y]}"
                taken[x, y] = panel["title"]


def test_the_check_itself_sees_faults() -> None:
    assert unknown_metrics("rate(tandem_gateway_wishes_total[5m])")
    assert unknown_metrics('tandem_worker_pages{colour="red"}')
    assert _unknown_groups("sum by (colour) (tandem_worker_pages)") == [
        "colour in sum by (colour) (tandem_worker_pages)"
    ]


def _groups(node: Any) -> set[str]:
    """Return the labels that aggregations of this expression keep."""
    found: set[str] = set()
    for inner in walk(node):
        if isinstance(inner, promql_parser.AggregateExpr) and inner.modifier is not None:
            found |= set(inner.modifier.labels)
    return found


def _unknown_groups(expression: str) -> list[str]:
    known = set(TARGET_LABELS) | {"le"}
    for selector in selectors(expression):
        metric = SERIES.get(selector.name)
        if metric is not None:
            known |= set(metric.labels)
            known |= {"loop", "operators", "dtype", "model"} if metric.kind == "info" else set()
    return [f"{label} in {expression}" for label in _groups(promql_parser.parse(expression)) - known]


def _braced(legend: str) -> list[str]:
    return [part.split("}}")[0].strip() for part in legend.split("{{")[1:]]
