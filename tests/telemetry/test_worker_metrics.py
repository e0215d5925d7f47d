"""A worker's snapshot becomes exactly the metrics of the table."""

from __future__ import annotations

from dataclasses import fields

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tandem.core.stats import LoadSnapshot, PageCounts
from tandem.telemetry.gateway import GatewayMetrics
from tandem.telemetry.table import GATEWAY_METRICS, WORKER_LOAD_METRICS, WORKER_METRICS
from tandem.telemetry.worker import register_worker


def test_every_figure_of_a_snapshot_is_shown() -> None:
    shown = set(WORKER_LOAD_METRICS) | {"pages", "fenced_instance_ids"}
    assert {field.name for field in fields(LoadSnapshot)} == shown


def test_exposition_follows_the_snapshot() -> None:
    registry = CollectorRegistry()
    loads = [LoadSnapshot(running_requests=2, steps=7, pages=PageCounts(free=3, held=1, total=4), draining=True)]
    register_worker(registry, lambda: loads[0], facts={"role": "decode", "loop": "overlap_decode"}, transports=["tcp"])
    families = {family.name: family for family in text_string_to_metric_families(generate_latest(registry).decode())}
    shown = {metric.name + ("_info" if metric.kind == "info" else ""): metric for metric in WORKER_METRICS}
    assert set(shown) == set(families)
    for name, metric in shown.items():
        assert families[name].documentation == metric.help
    assert registry.get_sample_value("tandem_worker_running_requests") == 2
    assert registry.get_sample_value("tandem_worker_steps_total") == 7
    assert registry.get_sample_value("tandem_worker_draining") == 1
    assert registry.get_sample_value("tandem_worker_pages", {"state": "free"}) == 3
    assert registry.get_sample_value("tandem_worker_info", {"role": "decode", "loop": "overlap_decode"}) == 1
    assert registry.get_sample_value("tandem_worker_transport", {"transport": "tcp", "rank": "0"}) == 1
    loads[0] = LoadSnapshot(steps=9)
    assert registry.get_sample_value("tandem_worker_steps_total") == 9


def test_the_gateway_registers_its_table() -> None:
    registry = CollectorRegistry()
    GatewayMetrics(registry)
    assert {family.name for family in registry.collect()} == {metric.name for metric in GATEWAY_METRICS}


def test_names_are_unique_and_in_base_units() -> None:
    names = [metric.name for metric in (*GATEWAY_METRICS, *WORKER_METRICS)]
    assert len(names) == len(set(names))
    assert not [name for name in names if name.endswith(("_total", "_ms", "_milliseconds"))]
    assert all(metric.help for metric in (*GATEWAY_METRICS, *WORKER_METRICS))
