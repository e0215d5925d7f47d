"""A worker's metrics: its last LoadSnapshot and what it runs, as they are at a scrape. Nothing is counted here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from tandem.core.stats import LoadSnapshot
from tandem.telemetry.table import FENCED_PEERS, PAGES, TRANSPORT, WORKER_INFO, WORKER_LOAD_METRICS

PAGE_STATES = ("free", "held", "cached", "quarantined")


class WorkerCollector(Collector):
    """Shows `load()`; `facts` (role, loop, model, dtype, ...) are the labels of the info metric."""

    def __init__(
        self, load: Callable[[], LoadSnapshot], *, facts: Mapping[str, str], transports: Sequence[str]
    ) -> None:
        self._load = load
        self._facts = dict(facts)
        self._transports = tuple(transports)

    def collect(self) -> Iterable[Metric]:
        """Yield every worker metric of the table."""
        load = self._load()
        for field, metric in WORKER_LOAD_METRICS.items():
            family = GaugeMetricFamily if metric.kind == "gauge" else CounterMetricFamily
            yield family(metric.name, metric.help, value=float(getattr(load, field)))
        pages = GaugeMetricFamily(PAGES.name, PAGES.help, labels=PAGES.labels)
        for state in PAGE_STATES:
            pages.add_metric([state], float(getattr(load.pages, state)))
        yield pages
        yield GaugeMetricFamily(FENCED_PEERS.name, FENCED_PEERS.help, value=len(load.fenced_instance_ids))
        yield InfoMetricFamily(WORKER_INFO.name, WORKER_INFO.help, value=self._facts)
        transports = GaugeMetricFamily(TRANSPORT.name, TRANSPORT.help, labels=TRANSPORT.labels)
        for rank, transport in enumerate(self._transports):
            transports.add_metric([transport, str(rank)], 1.0)
        yield transports


def register_worker(
    registry: CollectorRegistry,
    load: Callable[[], LoadSnapshot],
    *,
    facts: Mapping[str, str],
    transports: Sequence[str],
) -> None:
    """Show a worker's metrics in `registry`; `load` is called at every scrape, from the exporter's thread."""
    registry.register(WorkerCollector(load, facts=facts, transports=transports))
