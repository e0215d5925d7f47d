"""Values: what is refused, by whom, and with which words; the schema and the table follow what they are made from."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import helm_python as helm
import pytest

from tandem.config_values import SETTINGS
from tests.chart.rendered import CHART, ROOT, VALUE_SETS, Rendered, chart, values_of

SCRIPT = ROOT / "scripts" / "chart"

# (values, what the message has to name)
REFUSED_BY_SCHEMA: list[tuple[dict[str, Any], str]] = [
    ({"prefill": {"loop": "pipelined"}}, "prefill/loop"),
    ({"decode": {"replicas": -1}}, "decode/replicas"),
    ({"decode": {"replicas": "three"}}, "decode/replicas"),
    ({"decode": {"replicas": 1.5}}, "decode/replicas"),
    ({"decode": {"replicsa": 3}}, "replicsa"),
    ({"decoder": {}}, "decoder"),
    ({"gateway": {"replicas": 0}}, "gateway/replicas"),
    ({"gateway": {"loop": "normal"}}, "loop"),
    ({"gateway": {"service": {"type": "ExternalName"}}}, "service/type"),
    ({"gateway": {"service": {"port": 70000}}}, "service/port"),
    ({"transport": "rdma"}, "transport"),
    ({"model": {"device": "gpu"}}, "model/device"),
    ({"model": {"maxContextTokens": -1}}, "maxContextTokens"),
    ({"model": {"claim": "Not_A_Name"}}, "model/claim"),
    ({"model": {"cacheSizeLimit": "lots"}}, "cacheSizeLimit"),
    ({"image": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
    ({"image": {"pullSecrets": [{"name": "x"}]}}, "pullSecrets"),
    ({"decode": {"drain": {"seconds": -0.5}}}, "drain/seconds"),
    ({"decode": {"preStopSeconds": "5s"}}, "preStopSeconds"),
    ({"decode": {"resources": {"request": {}}}}, "request"),
    ({"decode": {"hugePages": "4G"}}, "decode/hugePages"),
    ({"decode": {"hugePages": "3Mi"}}, "decode/hugePages"),
    ({"gateway": {"hugePages": "4Gi"}}, "hugePages"),
    ({"decode": {"pdb": {"maxUnavailable": "150%"}}}, "maxUnavailable"),
    ({"decode": {"strategy": {"maxSurge": -1}}}, "maxSurge"),
    ({"decode": {"autoscaling": {"minReplicas": 0}}}, "minReplicas"),
    ({"decode": {"podLabels": {"app.kubernetes.io/name": "mine"}}}, "app.kubernetes.io/name"),
    ({"decode": {"podAnnotations": {"port": 1}}}, "podAnnotations/port"),
    ({"decode": {"extraEnv": [{"value": "x"}]}}, "extraEnv"),
    ({"config": {"shedular": {}}}, "shedular"),
    ({"config": {"scheduler": {"budget": 1}}}, "budget"),
    ({"decode": {"config": {"scheduler": {"budget_tokens": 0}}}}, "decode/config/scheduler/budget_tokens"),
    ({"decode": {"config": {"cache": {"memory_fraction": 0.99}}}}, "memory_fraction"),
    ({"decode": {"config": {"cache": {"prefix_cache": "yes"}}}}, "prefix_cache"),
    ({"decode": {"config": {"model": {"ops": "cuda"}}}}, "config/model/ops"),
    ({"decode": {"config": {"gateway": {}}}}, "gateway"),
    ({"gateway": {"config": {"scheduler": {}}}}, "scheduler"),
    ({"unified": {"config": {"handoff": {}}}}, "handoff"),
    ({"discovery": {"mode": "static"}}, "discovery/mode"),
    ({"tls": {"clients": {"secret": "x"}}}, "secret"),
    ({"tls": {"reloadSeconds": 0}}, "reloadSeconds"),
    ({"telemetry": {"traceRatio": 1.5}}, "traceRatio"),
    ({"telemetry": {"otlpEndpoint": "collector:4317"}}, "otlpEndpoint"),
    ({"probes": {"liveness": {"periodSeconds": 0}}}, "periodSeconds"),
    ({"rdma": {"portMin": 80}}, "portMin"),
    ({"monitoring": {"podMonitor": {"interval": "soon"}}}, "interval"),
    ({"logging": {"level": "loud"}}, "logging/level"),
    ({"kubeVersion": "newest"}, "kubeVersion"),
    ({"nameOverride": "Tandem"}, "nameOverride"),
]

TLS = {"clients": {"secretName": "certificate"}}
REFUSED_BY_TEMPLATES: list[tuple[dict[str, Any], str]] = [
    ({"decode": {"replicas": 0}, "prefill": {"replicas": 0}}, "decode.replicas, unified.replicas"),
    ({"decode": {"replicas": 0}, "unified": {"replicas": 1}}, "prefill.replicas"),
    ({"prefill": {"drain": {"seconds": 60}, "terminationGracePeriodSeconds": 30}}, "prefill.terminationGracePeriod"),
    ({"gateway": {"terminationGracePeriodSeconds": 600}}, "gateway.terminationGracePeriodSeconds"),
    ({"decode": {"strategy": {"maxSurge": 0}}}, "decode.strategy"),
    ({"decode": {"strategy": {"maxUnavailable": "0%", "maxSurge": "0%"}}}, "decode.strategy"),
    ({"decode": {"autoscaling": {"minReplicas": 9}}}, "decode.autoscaling.minReplicas"),
    ({"serviceAccount": {"create": False}}, "serviceAccount.name"),
    ({"gateway": {"service": {"nodePort": 30000}}}, "gateway.service.nodePort"),
    ({"probes": {"grpc": True}, "kubeVersion": "1.23.9"}, "probes.grpc"),
    ({"probes": {"grpc": True}, "tls": TLS}, "probes.grpc"),
    ({"probes": {"grpc": True}, "tls": {"peers": {"secretName": "peers"}}}, "probes.grpc"),
    ({"tls": {"clients": {"requireClientCertificate": True}}}, "tls.clients.secretName"),
    ({"tls": {"clients": TLS["clients"] | {"clientCaSecretName": "x"}}}, "tls.clients.clientCaSecretName"),
    ({"decode": {"hugePages": "6Mi", "parallel": {"dataSize": 2}}}, "decode.hugePages"),
    ({"decode": {"hugePages": "4Gi", "config": {"cache": {"pool_bytes": 1}}}}, "decode.config.cache.pool_bytes"),
    ({"decode": {"hugePages": "4Gi"}, "config": {"cache": {"huge_pages": "off"}}}, "config.cache.huge_pages"),
    ({"rdma": {"enabled": True}}, "rdma.trustedNetwork"),
    ({"transport": "mooncake-tcp"}, "rdma.trustedNetwork"),
    ({"transport": "mooncake-rdma", "rdma": {"trustedNetwork": True}}, "rdma.enabled"),
    ({"transport": "tcp", "rdma": {"enabled": True, "trustedNetwork": True}}, "transport"),
    ({"rdma": {"portMin": 2000, "portMax": 1999}}, "rdma.portMin"),
    ({"rdma": {"trustedNetwork": True}, "kubeVersion": "1.21.0"}, "rdma.portMin, rdma.portMax"),
]


@pytest.mark.parametrize(("values", "named"), REFUSED_BY_SCHEMA, ids=lambda part: part if isinstance(part, str) else "")
def test_the_schema_refuses(values: dict[str, Any], named: str) -> None:
    with pytest.raises(helm.HelmValuesError, match=re.escape(named)) as refusal:
        Rendered(values)
    assert str(refusal.value).count("\n- at") == 1, f"more than that is wrong: {refusal.value}"


@pytest.mark.parametrize(
    ("values", "named"), REFUSED_BY_TEMPLATES, ids=lambda part: part if isinstance(part, str) else ""
)
def test_the_templates_refuse_what_does_not_fit_together(values: dict[str, Any], named: str) -> None:
    with pytest.raises(helm.HelmRenderError, match=rf"\): {re.escape(named)}"):
        Rendered(values)


def test_a_release_must_be_named_with_a_letter_first() -> None:
    with pytest.raises(helm.HelmRenderError, match="fullnameOverride"):
        Rendered(name="2nd")
    assert "second-gateway" in Rendered({"fullnameOverride": "second"}, name="2nd").of("Service")


def test_every_setting_that_the_chart_writes_is_set_in_one_place() -> None:
    """A `config` value about it would contradict ports, mounts, rights or grace periods: it is refused."""
    for key in _written():
        section, _, field = key.partition(".")
        default = SETTINGS[key].field.default
        values: dict[str, Any] = {"decode": {"hugePages": "1Gi"}}  # else the chart says nothing of the cache
        values["config"] = {section: {field: list(default) if isinstance(default, tuple) else default}}
        with pytest.raises(helm.HelmRenderError, match=re.escape(f"config.{key}: the chart sets it")):
            Rendered(values)


def _written() -> set[str]:
    """Return the fields that the chart writes into any program's file in any value set, without `config` values."""
    written: set[str] = set()
    for name in VALUE_SETS:
        values = values_of(name)
        for role in ("", "gateway", "prefill", "decode", "unified"):
            (values.get(role, {}) if role else values).pop("config", None)
        rendered = Rendered(values)
        for role in rendered.by_role("Deployment"):
            tree = rendered.config(role)
            written |= {f"{section}.{field}" for section, fields in tree.items() for field in fields}
    assert len(written) > 30
    return written


def test_what_the_chart_owns_are_settings() -> None:
    text = (CHART / "templates" / "_checks.tpl").read_text()
    owned = re.findall(r"^(\w+\.\w+): (\S+)$", text, re.MULTILINE)
    assert len(owned) > 30
    for key, value in owned:
        assert key in SETTINGS, key
        node: Any = chart().values
        for part in value.strip('"').replace("ROLE", "decode").split(".") if value != '""' else ():
            node = node[part]


def test_free_objects_of_kubernetes_and_of_a_parent_chart_are_taken() -> None:
    values = {
        "global": {"anything": 1},
        "podSecurityContext": {"runAsUser": None, "supplementalGroups": [4000]},
        "decode": {"affinity": {"nodeAffinity": {}}, "tolerations": [{"operator": "Exists"}]},
    }
    context = Rendered(values).pod_templates()["decode"]["spec"]["securityContext"]
    assert context["supplementalGroups"] == [4000]
    assert "runAsUser" not in context  # as OpenShift wants it


# ---- what is generated --------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of what scripts/chart reads and writes."""
    shutil.copytree(CHART, tmp_path / "deploy" / "helm" / "tandem")
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")
    package = tmp_path / "services" / "tandem"
    package.mkdir(parents=True)
    for name in ("__init__", "config", "config_load", "config_values", "errors"):
        shutil.copy(ROOT / "services" / "tandem" / f"{name}.py", package)
    return tmp_path


def _run(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repository / "scripts" / "chart"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": ""}, timeout=60)


def test_schema_and_table_are_up_to_date() -> None:
    assert _run(ROOT, "--check").returncode == 0


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("services/tandem/config.py", '"most tokens of one plan (chunked prefill)", low=1', '"most", low=2'),
        ("services/tandem/config.py", "max_local_prefills: int", "max_prefills_here: int"),
        ("deploy/helm/tandem/values.yaml", "  replicas: 2\n", "  replicas: 3\n  more: true\n"),
        ("deploy/helm/tandem/values.yaml", "# -- image of the gateway", "# -- image"),
        ("deploy/helm/tandem/README.md", "| `gateway.replicas` |", "| `gateways` |"),
    ],
)
def test_a_change_of_what_they_are_made_from_is_noticed(repository: Path, path: str, old: str, new: str) -> None:
    assert _run(repository, "--check").returncode == 0
    text = (repository / path).read_text()
    assert text.count(old) == 1
    (repository / path).write_text(text.replace(old, new))
    check = _run(repository, "--check")
    assert check.returncode == 1 and "scripts/chart" in check.stderr
    assert _run(repository).returncode == 0
    assert _run(repository, "--check").returncode == 0


def test_every_value_is_explained() -> None:
    rows = re.findall(r"^\| `(\S+)` \| .* \| (.*) \|$", (CHART / "README.md").read_text(), re.MULTILINE)
    assert len(rows) > 80
    assert not [value for value, meaning in rows if not meaning.strip()]


def test_nothing_is_free_but_objects_of_kubernetes() -> None:
    """Every object of the schema is closed, or of Kubernetes or a map of texts."""
    free = {"global", "podSecurityContext", "affinity", "behavior", "items"}
    maps = {"requests", "limits", "nodeSelector", "podAnnotations", "podLabels", "labels", "annotations"}

    def visit(name: str, node: Any) -> None:
        if isinstance(node, list):
            for item in node:
                visit(name, item)
        if not isinstance(node, dict):
            return
        if node.get("type") == "object":
            closed = node.get("additionalProperties") is False
            assert closed or name in free or (name in maps and "additionalProperties" in node), name
        for key, child in node.items():
            visit(name if key in ("properties", "definitions") else key, child)

    visit("", chart().schema)
