"""Start, probes, stop, rollout: what Kubernetes is told fits what the programs do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tandem.rpc import server
from tandem.worker.main import DRAIN_MARGIN_SECONDS
from tests.chart.rendered import VALUE_SETS, Rendered, values_of
from tests.chart.test_configuration import loaded

KINDS = ("startup", "readiness", "liveness")


def _pre_stop_seconds(container: dict[str, Any]) -> int:
    if "lifecycle" not in container:
        return 0
    command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    return int(seconds)


@pytest.mark.parametrize("name", VALUE_SETS)
def test_nobody_is_killed_in_a_drain(name: str, tmp_path: Path) -> None:
    rendered = Rendered(values_of(name))
    for role in rendered.by_role("Deployment"):
        config, container = loaded(rendered, role, tmp_path), rendered.container(role)
        needed = _pre_stop_seconds(container) + config.server.drain_seconds + DRAIN_MARGIN_SECONDS
        needed += config.server.drain_delay_seconds if role == "gateway" else 0
        needed += config.handoff.lease_seconds if role == "prefill" else 0
        assert rendered.pod_templates()[role]["spec"]["terminationGracePeriodSeconds"] >= needed, role


@pytest.mark.parametrize(
    ("role", "values", "grace"),
    [
        ("decode", {}, 45),
        ("prefill", {}, 85),
        ("gateway", {}, 620),
        ("prefill", {"config": {"handoff": {"lease_seconds": 20}}}, 95),
        ("prefill", {"prefill": {"config": {"handoff": {"lease_seconds": 0.5}}}}, 76),
        ("decode", {"config": {"handoff": {"lease_seconds": 20}}}, 45),
        ("decode", {"decode": {"drain": {"seconds": 0.2}, "preStopSeconds": 4}}, 20),
        ("decode", {"decode": {"terminationGracePeriodSeconds": 35}}, 35),
        ("gateway", {"gateway": {"drain": {"delaySeconds": 0, "seconds": 10}}}, 25),
    ],
)
def test_grace_periods(role: str, values: dict[str, Any], grace: int) -> None:
    assert Rendered(values).pod_templates()[role]["spec"]["terminationGracePeriodSeconds"] == grace


def test_http_probes() -> None:
    rendered = Rendered()
    for role in ("gateway", "prefill", "decode"):
        container = rendered.container(role)
        asked = {kind: container[f"{kind}Probe"]["httpGet"] for kind in KINDS}
        assert {get["port"] for get in asked.values()} == {"metrics"}
        assert asked["readiness"]["path"] == "/readyz"
        assert asked["liveness"]["path"] == "/livez"
        # A gateway is started although there is no worker yet; a worker when it can serve.
        assert asked["startup"]["path"] == ("/livez" if role == "gateway" else "/readyz")


def test_grpc_probes() -> None:
    rendered = Rendered({"probes": {"grpc": True}})
    for role in ("gateway", "prefill", "decode"):
        container = rendered.container(role)
        asked = {kind: container[f"{kind}Probe"]["grpc"] for kind in KINDS}
        assert {probe["port"] for probe in asked.values()} == {50051}
        assert asked["readiness"]["service"] == server.READINESS
        assert asked["liveness"]["service"] == server.LIVENESS
        assert asked["startup"]["service"] == (server.LIVENESS if role == "gateway" else server.READINESS)
        assert not any("httpGet" in container[f"{kind}Probe"] for kind in KINDS)


def test_loading_weights_has_time() -> None:
    for name in VALUE_SETS:
        rendered = Rendered(values_of(name))
        for role, deployment in rendered.by_role("Deployment").items():
            probe, spec = rendered.container(role)["startupProbe"], deployment["spec"]
            seconds = probe["periodSeconds"] * probe["failureThreshold"]
            assert seconds >= 600
            assert spec["progressDeadlineSeconds"] > seconds + spec["minReadySeconds"], (
                "a rollout that waits has failed"
            )


def test_a_rollout_adds_before_it_takes() -> None:
    for deployment in Rendered().of("Deployment").values():
        assert deployment["spec"]["strategy"] == {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1},
        }
        assert deployment["spec"]["minReadySeconds"] == 3


def test_disruptions_come_one_at_a_time_and_are_never_stuck() -> None:
    for budget in Rendered().of("PodDisruptionBudget").values():
        assert budget["spec"]["maxUnavailable"] == 1
        assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
    (budget, *_) = Rendered({"kubeVersion": "1.26.0"}).of("PodDisruptionBudget").values()
    assert "unhealthyPodEvictionPolicy" not in budget["spec"]
