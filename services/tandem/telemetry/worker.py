"""A worker's metrics: its last LoadSnapshot and what it runs, as they are at a scrape. Nothing is counted here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from tandem.core.stats import HistogramCounts, LoadSnapshot, PageCounts
from tandem.telemetry import table
from tandem.telemetry.build import build_family
from tandem.telemetry.table import Metric


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFacts:
    """What does not change in a worker's life. `info` are the labels of the info metric."""

    role: str
    model: str
    page_tokens: int = 0
    info: Mapping[str, str] = field(default_factory=dict)
    transports: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerVitals:
    """What the frontend knows of the worker at the moment of a scrape."""

    loop_silent_seconds: float = 0.0
    frontend_lag_seconds: float = 0.0
    sessions: int = 0
    drain_seconds: float = 0.0
    drain_limit_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ReplicaFigures:
    """What one replica said last, and how long ago it was heard of."""

    load: LoadSnapshot
    loop_silent_seconds: float = 0.0


class WorkerCollector(Collector):
    """Shows `load()`, `vitals()` and `replicas()`; `vllm`: the `vllm:` gauges as well."""

    def __init__(
        self,
        load: Callable[[], LoadSnapshot],
        vitals: Callable[[], WorkerVitals],
        replicas: Callable[[], Sequence[ReplicaFigures]],
        facts: WorkerFacts,
        *,
        vllm: bool = False,
    ) -> None:
        self._load = load
        self._vitals = vitals
        self._replicas = replicas
        self._facts = facts
        self._vllm = vllm

    def collect(self) -> Iterable[Family]:
        """Yield every worker metric of the table that this role has."""
        load, vitals, facts = self._load(), self._vitals(), self._facts
        yield build_family(facts.role)
        info = InfoMetricFamily(table.WORKER_INFO.name, table.WORKER_INFO.help, labels=("role",))
        info.add_metric([facts.role], {key: value for key, value in facts.info.items() if key != "role"})
        yield info
        for name, metric in table.WORKER_LOAD_METRICS.items():
            yield self._family(metric, [((), float(getattr(load, name)))])
        for name, metric in table.WORKER_VITALS.items():
            yield self._family(metric, [((), float(getattr(vitals, name)))])
        for name, metric in table.WORKER_HISTOGRAMS.items():
            yield self._histogram(metric, getattr(load, name))
        ended = [((reason,), float(load.ended_requests.get(reason, 0))) for reason in table.END_REASONS]
        yield self._family(table.ENDED_REQUESTS, ended)
        pages = [((state,), float(getattr(load.pages, state))) for state in table.PAGE_STATES]
        yield self._family(table.PAGES, pages)
        yield self._family(table.KV_USAGE, [((), _usage(load.pages))])
        yield self._family(table.FENCED_PEERS, [((), float(len(load.fenced_instance_ids)))])
        ranks = [((name, str(rank)), 1.0) for rank, name in enumerate(facts.transports)]
        yield self._family(table.TRANSPORT, ranks)
        yield from self._by_replica(self._replicas())
        if facts.role == "decode":
            yield from self._handoffs(load)
        if self._vllm:
            yield from self._vllm_gauges(load)

    def _by_replica(self, replicas: Sequence[ReplicaFigures]) -> Iterable[Family]:
        named = [(str(index), replica) for index, replica in enumerate(replicas)]
        yield self._family(table.REPLICAS, [((), float(len(named)))])
        for name, metric in table.REPLICA_LOAD_METRICS.items():
            yield self._family(metric, [((index,), float(getattr(each.load, name))) for index, each in named])
        pages = [
            ((index, state), float(getattr(each.load.pages, state)))
            for index, each in named
            for state in table.PAGE_STATES
        ]
        yield self._family(table.REPLICA_PAGES, pages)
        yield self._family(table.REPLICA_SILENT, [((index,), each.loop_silent_seconds) for index, each in named])

    def _handoffs(self, load: LoadSnapshot) -> Iterable[Family]:
        known = {figures.transport: figures for figures in load.transports}
        names = tuple(dict.fromkeys((*self._facts.transports, table.NO_TRANSPORT, *known)))
        pulls, failures = [], []
        for name in names:
            figures = known.get(name)
            results = figures.pulls if figures is not None else {}
            pulls += [((name, result), float(results.get(result, 0))) for result in table.PULL_RESULTS]
            reasons = figures.failures if figures is not None else {}
            failures += [((name, reason), float(reasons.get(reason, 0))) for reason in table.HANDOFF_FAILURES]
        yield self._family(table.PULLS, pulls)
        yield self._family(table.HANDOFF_FAILED, failures)
        for metric, attribute in (
            (table.TRANSFERRED_BYTES, "num_bytes"),
            (table.TRANSFER_SECONDS, "seconds"),
            (table.CHECKSUM_MISMATCHES, "mismatched_pages"),
        ):
            yield self._family(metric, [((name,), float(getattr(known.get(name), attribute, 0))) for name in names])
        for metric, attribute in (
            (table.PEER_LANDED, "landed"),
            (table.PEER_FAILED, "failed"),
            (table.PEER_BYTES, "num_bytes"),
            (table.PEER_NUMERICS, "differing"),
        ):
            yield self._family(metric, [((peer.address,), float(getattr(peer, attribute))) for peer in load.peers])

    def _vllm_gauges(self, load: LoadSnapshot) -> Iterable[Family]:
        model = self._facts.model
        for metric, value in (
            (table.VLLM_WAITING, float(load.waiting_requests)),
            (table.VLLM_RUNNING, float(load.running_requests)),
            (table.VLLM_KV_USAGE, _usage(load.pages)),
        ):
            family = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
            family.add_metric([model], value)
            yield family
        cache = GaugeMetricFamily(table.VLLM_CACHE.name, table.VLLM_CACHE.help, labels=table.VLLM_CACHE.labels)
        cache.add_metric([model, str(self._facts.page_tokens), str(load.pages.total)], 1.0)
        yield cache

    def _family(self, metric: Metric, samples: Iterable[tuple[tuple[str, ...], float]]) -> Family:
        kind = GaugeMetricFamily if metric.kind == "gauge" else CounterMetricFamily
        family = kind(metric.name, metric.help, labels=metric.labels)
        for labels, value in samples:
            family.add_metric([self._facts.role, *labels], value)
        return family

    def _histogram(self, metric: Metric, figures: HistogramCounts) -> Family:
        counts = figures.counts or (0,) * (len(metric.buckets) + 1)
        bounds = (*(str(float(bound)) for bound in metric.buckets), "+Inf")
        family = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
        buckets = [(bound, float(count)) for bound, count in zip(bounds, accumulate(counts), strict=True)]
        family.add_metric([self._facts.role], buckets, figures.total)
        return family


def _usage(pages: PageCounts) -> float:
    return (pages.total - pages.free - pages.cached) / pages.total if pages.total else 0.0


def register_worker(
    registry: CollectorRegistry,
    load: Callable[[], LoadSnapshot],
    vitals: Callable[[], WorkerVitals],
    replicas: Callable[[], Sequence[ReplicaFigures]],
    facts: WorkerFacts,
    *,
    vllm: bool = False,
) -> None:
    """Show a worker's metrics in `registry`; the callables are called at every scrape, by the exporter."""
    registry.register(WorkerCollector(load, vitals, replicas, facts, vllm=vllm))
