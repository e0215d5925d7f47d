"""The few kinds of panels that the dashboards are made of, and the words that their expressions share."""

from __future__ import annotations

from typing import Literal

from grafana_foundation_sdk.builders import common as shared
from grafana_foundation_sdk.builders import dashboard, prometheus, stat, text, timeseries
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import text as text_models
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableRefresh,
    VariableSort,
)

GATEWAY = 'namespace=~"$namespace"'
WORKER = 'namespace=~"$namespace",role=~"$role"'
RATE = "$__rate_interval"
ERROR_CODES = "DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|UNAVAILABLE|ABORTED|INTERNAL"
_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_SPANS = {"small": (4, 4), "third": (8, 8), "half": (12, 8)}
NOT_RENDERED = (
    "**Not rendered by Grafana.** This dashboard is generated, parses with Grafana's own SDK, and every query of it "
    "was "
    "answered by a real Prometheus; no Grafana has shown it yet."
)

Size = Literal["small", "third", "half"]
Panel = stat.Panel | timeseries.Panel
Query = tuple[str, str]  # expression, legend


def rate(metric: str, where: str, by: str = "") -> str:
    """Return the summed rate of a counter or a part of a histogram."""
    return f"sum{_by(by)} (rate({metric}{{{where}}}[{RATE}]))"


def quantile(share: float, histogram: str, where: str, by: str = "") -> str:
    """Return a quantile of a histogram."""
    inner = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({inner}) (rate({histogram}_bucket{{{where}}}[{RATE}])))"


def mean(histogram: str, where: str, by: str = "") -> str:
    """Return the mean of a histogram's observations."""
    return f"{rate(histogram + '_sum', where, by)} / {rate(histogram + '_count', where, by)}"


def quantiles(histogram: str, where: str, shares: tuple[float, ...] = (0.5, 0.95, 0.99)) -> list[Query]:
    """Return one query a quantile, named p50, p95, ..."""
    return [(quantile(share, histogram, where), f"p{share * 100:g}") for share in shares]


def graph(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    stacked: bool = False,
    size: Size = "third",
    top: float | None = None,
) -> timeseries.Panel:
    """Return lines over time; `top` fixes the axis, as for shares."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(_SOURCE)
        .unit(unit)
        .min(0)
        .span(_SPANS[size][0])
        .height(_SPANS[size][1])
        .fill_opacity(40 if stacked else 8)
        .line_width(1)
        .show_points(common.VisibilityMode.NEVER)
        .legend(
            shared.VizLegendOptions()
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(shared.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING))
    )
    if top is not None:
        panel = panel.max(top)
    if stacked:
        panel = panel.stacking(shared.StackingConfig().mode(common.StackingMode.NORMAL))
    for expression, legend in queries:
        panel = panel.with_target(prometheus.Dataquery().expr(expression).legend_format(legend).range())
    return panel


def number(
    title: str, description: str, unit: str, expression: str, *, warn: float | None = None, legend: str = ""
) -> stat.Panel:
    """Return the present value; red from `warn` on, or below it if it is negative."""
    steps = [Threshold(value=None, color="green")]
    if warn is not None and warn >= 0:
        steps.append(Threshold(value=warn, color="red"))
    elif warn is not None:
        steps = [Threshold(value=None, color="red"), Threshold(value=-warn, color="green")]
    query = prometheus.Dataquery().expr(expression).instant()
    panel = (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(_SOURCE)
        .unit(unit)
        .span(_SPANS["small"][0])
        .height(_SPANS["small"][1])
        .no_value("-")
        .thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
        .color_mode(common.BigValueColorMode.VALUE)
        .graph_mode(common.BigValueGraphMode.NONE)
        .reduce_options(shared.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
    )
    if legend:
        panel = panel.text_mode(common.BigValueTextMode.VALUE_AND_NAME)
        query = query.legend_format(legend)
    return panel.with_target(query)


def board(uid: str, title: str, description: str, purpose: str, *, role: bool = True) -> dashboard.Dashboard:
    """Return a dashboard with its variables and, on top, what it is for."""
    note = text.Panel().title("").mode(text_models.TextMode.MARKDOWN).content(f"{purpose}\n\n{NOT_RENDERED}")
    made = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["tandem"])
        .refresh("30s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .readonly()
        .link(
            dashboard.DashboardLink("Tandem")
            .type(DashboardLinkType.DASHBOARDS)
            .tags(["tandem"])
            .as_dropdown(False)
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_variable("namespace", "Namespace", "label_values(tandem_build_info, namespace)"))
    )
    if role:
        values = 'label_values(tandem_worker_info{namespace=~"$namespace"}, role)'
        made = made.with_variable(_variable("role", "Role", values))
    return made.with_panel(note.span(24).height(3))


def _variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(_SOURCE)
        .query(query)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
    )


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""
