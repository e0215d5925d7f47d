"""A worker's snapshot becomes exactly the metrics of the table."""

from __future__ import annotations

from dataclasses import fields

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tandem.core.stats import HistogramCounts, LoadSnapshot, PageCounts, PeerFigures, TransportFigures
from tandem.telemetry import table
from tandem.telemetry.gateway import GatewayMetrics
from tandem.telemetry.worker import ReplicaFigures, WorkerFacts, WorkerVitals, register_worker

FACTS = WorkerFacts(
    role="decode", model="demo", page_tokens=16, info={"role": "decode", "loop": "overlap_decode"}, transports=["tcp"]
)
ELSEWHERE = {"transferred_bytes", "transfer_seconds", "checksum_mismatches", "failed_pulls"}  # by transport, not summed


def registry_of(load: LoadSnapshot, facts: WorkerFacts = FACTS, *, vllm: bool = False) -> CollectorRegistry:
    registry = CollectorRegistry()
    replicas = [ReplicaFigures(load, 1.0), ReplicaFigures(LoadSnapshot(), 7.0)]
    register_worker(registry, lambda: load, lambda: WorkerVitals(sessions=2), lambda: replicas, facts, vllm=vllm)
    return registry


def value_of(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"tandem_worker_{name}", {"role": "decode", **labels})


def test_every_figure_of_a_snapshot_is_shown() -> None:
    shown = {*table.WORKER_LOAD_METRICS, *table.WORKER_HISTOGRAMS, *ELSEWHERE}
    shown |= {"pages", "fenced_instance_ids", "ended_requests", "transports", "peers"}
    assert {field.name for field in fields(LoadSnapshot)} == shown
    assert {field.name for field in fields(WorkerVitals)} == set(table.WORKER_VITALS)


@pytest.mark.parametrize("role", ["prefill", "decode", "unified"])
def test_the_exposition_is_the_table(role: str) -> None:
    peers = (PeerFigures(address="p:1", landed=1, failed=0, num_bytes=9, numerics="n", differing=1),)
    facts = WorkerFacts(role=role, model="demo", transports=["tcp"])
    registry = registry_of(LoadSnapshot(peers=peers), facts, vllm=True)
    metrics = [*table.WORKER_METRICS, *table.VLLM_METRICS, *(table.DECODE_METRICS if role == "decode" else ())]
    families = {family.name: family for family in text_string_to_metric_families(generate_latest(registry).decode())}
    shown = {metric.name + ("_info" if metric.kind == "info" else ""): metric for metric in metrics}
    assert set(shown) == set(families)
    for name, metric in shown.items():
        family = families[name]
        assert family.documentation == metric.help
        assert family.type == ("gauge" if metric.kind == "info" else metric.kind)
        for sample in family.samples:
            assert {*metric.labels} <= {*sample.labels} <= {*metric.labels, "le"}, name
            assert sample.labels.get("role", role) == role


def test_values() -> None:
    counts = (1,) + (0,) * (len(table.WORKER_HISTOGRAMS["queue_seconds"].buckets) - 1) + (2,)
    load = LoadSnapshot(
        running_requests=2,
        steps=7,
        pages=PageCounts(free=3, held=1, cached=4, quarantined=2, total=10),
        draining=True,
        ended_requests={"stop": 3},
        queue_seconds=HistogramCounts(counts, 1500.0),
        transports=(
            TransportFigures(
                transport="tcp", pulls={"done": 4}, num_bytes=8, seconds=0.5, mismatched_pages=1, failures={"lost": 2}
            ),
        ),
    )
    registry = registry_of(load)
    assert value_of(registry, "running_requests") == 2
    assert value_of(registry, "steps_total") == 7
    assert value_of(registry, "draining") == 1
    assert value_of(registry, "sessions") == 2
    assert value_of(registry, "pages", state="quarantined") == 2
    assert value_of(registry, "kv_usage_ratio") == 0.3
    assert value_of(registry, "info", loop="overlap_decode") == 1
    assert value_of(registry, "transport", transport="tcp", rank="0") == 1
    assert value_of(registry, "ended_requests_total", reason="stop") == 3
    assert value_of(registry, "ended_requests_total", reason="failed") == 0
    assert value_of(registry, "queue_seconds_bucket", le="0.001") == 1
    assert value_of(registry, "queue_seconds_bucket", le="600.0") == 1
    assert value_of(registry, "queue_seconds_count") == 3
    assert value_of(registry, "queue_seconds_sum") == 1500.0
    assert value_of(registry, "pulls_total", transport="tcp", result="done") == 4
    assert value_of(registry, "transferred_bytes_total", transport="tcp") == 8
    assert value_of(registry, "checksum_mismatches_total", transport="tcp") == 1
    assert value_of(registry, "handoff_failures_total", transport="tcp", reason="lost") == 2


def test_the_figures_of_each_replica() -> None:
    pages = PageCounts(free=3, held=1, cached=4, quarantined=2, total=10)
    registry = registry_of(LoadSnapshot(running_requests=2, generated_tokens=9, pages=pages))
    assert value_of(registry, "replicas") == 2
    assert value_of(registry, "replica_running_requests", replica="0") == 2
    assert value_of(registry, "replica_running_requests", replica="1") == 0
    assert value_of(registry, "replica_generated_tokens_total", replica="0") == 9
    assert value_of(registry, "replica_pages", replica="0", state="cached") == 4
    assert value_of(registry, "replica_pages", replica="1", state="cached") == 0
    assert value_of(registry, "replica_loop_silent_seconds", replica="1") == 7
    assert value_of(registry, "replica_running_requests", replica="2") is None


def test_bounded_series_are_there_before_the_first_event() -> None:
    registry = registry_of(LoadSnapshot())
    assert value_of(registry, "batch_requests_count") == 0
    for transport in ("tcp", "none"):
        for reason in table.HANDOFF_FAILURES:
            assert value_of(registry, "handoff_failures_total", transport=transport, reason=reason) == 0
        assert value_of(registry, "transferred_bytes_total", transport=transport) == 0


def test_the_model_server_contract() -> None:
    load = LoadSnapshot(running_requests=2, waiting_requests=5, pages=PageCounts(free=5, held=5, total=10))
    registry = registry_of(load, vllm=True)
    assert registry.get_sample_value("vllm:num_requests_running", {"model_name": "demo"}) == 2
    assert registry.get_sample_value("vllm:num_requests_waiting", {"model_name": "demo"}) == 5
    assert registry.get_sample_value("vllm:kv_cache_usage_perc", {"model_name": "demo"}) == 0.5
    labels = {"model_name": "demo", "block_size": "16", "num_gpu_blocks": "10"}
    assert registry.get_sample_value("vllm:cache_config_info", labels) == 1
    assert "vllm:" not in generate_latest(registry_of(load)).decode()


def test_the_gateway_registers_its_table() -> None:
    registry = CollectorRegistry()
    GatewayMetrics(registry)
    assert {family.name for family in registry.collect()} == {metric.name for metric in table.GATEWAY_METRICS}
    assert b"_created" not in generate_latest(registry)
    for code in table.CODES:
        assert registry.get_sample_value("tandem_gateway_requests_total", {"api": "Chat", "code": code}) == 0
    for reason in table.FINISHES:
        assert registry.get_sample_value("tandem_gateway_finished_total", {"reason": reason}) == 0


def test_the_genai_metrics() -> None:
    registry = CollectorRegistry()
    metrics = GatewayMetrics(registry, genai_model="demo")
    assert {metric.name for metric in table.GENAI_METRICS} <= {family.name for family in registry.collect()}
    metrics.ended("StreamChat", "OK", 2.0, ttft_seconds=0.5, tpot_seconds=0.1, finish="stop")
    metrics.ended("StreamChat", "INTERNAL", 2.0, ttft_seconds=0.5, tpot_seconds=0.1, finish="none")
    labels = {
        "gen_ai_operation_name": "chat",
        "gen_ai_provider_name": "tandem",
        "gen_ai_request_model": "demo",
        "gen_ai_response_model": "demo",
    }
    for error in ("", "INTERNAL"):
        name = "gen_ai_server_request_duration_seconds_count"
        assert registry.get_sample_value(name, {**labels, "error_type": error}) == 1
    assert registry.get_sample_value("gen_ai_server_time_to_first_token_seconds_sum", labels) == 0.5
    assert registry.get_sample_value("gen_ai_server_time_per_output_token_seconds_sum", labels) == 0.1


def test_names_are_unique_and_in_base_units() -> None:
    names = [metric.name for metric in table.ALL_METRICS]
    assert len(names) == len(set(names))
    assert not [name for name in names if name.endswith(("_total", "_ms", "_milliseconds"))]
    assert all(metric.help for metric in table.ALL_METRICS)


def test_the_words_of_labels_are_those_of_the_code() -> None:
    """The table cannot import the gateway, so this compares them."""
    from tandem.gateway.prepared import FinishReason
    from tandem.gateway.resumption import Bound, Cause
    from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb

    assert {*table.RESUMPTION_CAUSES} == {cause.value for cause in Cause}
    assert {*table.RESUMPTION_BOUNDS} == {bound.value for bound in Bound}
    assert {*table.FINISHES} == {reason.value for reason in FinishReason} | {"none"}
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["InferenceService"].methods}
    assert {*table.APIS} <= methods
