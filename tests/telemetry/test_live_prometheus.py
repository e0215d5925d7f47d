"""Every panel and every alert finds data in a real Prometheus that scrapes the real service under load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.e2e.oracle import make_checkpoint
from tests.e2e.service import Service
from tests.telemetry.expressions import compared_vectors
from tests.telemetry.live import PROMETHEUS, RULES, Load, Prometheus
from tests.telemetry.panels import BOARDS, panels

DATA_SECONDS = 150.0  # of load, at most, until there is data everywhere
WINDOW = "20s"  # of rates: twenty scrapes


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    make_checkpoint(tmp_path / "checkpoint")
    service = Service(tmp_path / "checkpoint", tmp_path)
    try:
        yield service
    finally:
        service.close()


def expressions() -> dict[str, str]:
    """Return where each expression stands, by the expression."""
    found: dict[str, str] = {}
    for board in BOARDS:
        for panel in panels(board):
            for expression in panel.expressions(window=WINDOW):
                found.setdefault(expression, f"{board}: {panel.title}")
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            name = rule.get("alert") or rule["record"]
            for vector in compared_vectors(rule["expr"]):
                found.setdefault(vector, f"alerts: {name}")
    return found


@pytest.mark.slow
@pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed: apt-get install prometheus")
def test_every_panel_and_alert_returns_data(service: Service, tmp_path: Path) -> None:
    workers = {"tandem-prefill-0": service.worker("prefill")}
    workers |= {f"tandem-decode-{number}": service.worker("decode") for number in range(2)}
    for worker in workers.values():
        worker.wait_ready()
    prefill, *decodes = workers.values()
    gateway = service.gateway([prefill], decodes, "--server.metrics-port", "0")
    prometheus = Prometheus(tmp_path / "prometheus", {"tandem-gateway-0": gateway, **workers})
    try:
        load = Load(service, gateway)
        wanted = expressions()
        assert len(wanted) > 80
        try:
            missing = prometheus.without_data(wanted, seconds=DATA_SECONDS)
        finally:
            codes = load.stop()
        assert not missing, "\n".join(f"{wanted[expression]}: {expression}" for expression in missing)
        assert {"OK", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "CANCELLED"} <= codes.keys(), codes
        assert not prometheus.has_data("tandem_gateway_wishes_total"), "what nobody exports has none"
        roles = {sample["metric"]["role"] for sample in prometheus.query("last_over_time(tandem_worker_info[60s])")}
        assert roles == {"prefill", "decode"}
        assert "level=warn" not in prometheus.log().replace('component="telemetry"', "")
    finally:
        prometheus.close()
