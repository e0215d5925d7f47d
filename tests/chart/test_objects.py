"""The objects themselves: valid for every supported Kubernetes, well named and labelled, there when asked for."""

from __future__ import annotations

import json
import re
from typing import Any

import helm_python as helm
import kubernetes_validate
import pytest
import yaml

from tandem.telemetry import table
from tests.chart.rendered import CHART, VALUE_SETS, WORKERS, Rendered, chart, keys_of, values_of

# The oldest and newest whose schemas there are, and one between.
VERSIONS = ("1.25", "1.30", kubernetes_validate.latest_version().rpartition(".")[0])
# Newer than 1.20, wherever they stand.
NEWER_FIELDS = {"endPort", "unhealthyPodEvictionPolicy", "minDomains", "matchLabelKeys", "nodeTaintsPolicy", "sleep"}
MAX_CONFIG_MAP_BYTES = 1 << 20
OPERATOR = {"PodMonitor", "ServiceMonitor", "PrometheusRule"}


def for_version(name: str, version: str) -> Rendered:
    return Rendered(values_of(name) | {"kubeVersion": f"{version}.0"})


def test_the_value_sets_are_there() -> None:
    wanted = {"default", "rdma", "tls", "hub", "pvc", "dns", "unified", "kubernetes-1.20", "everything"}
    assert wanted <= VALUE_SETS.keys()


@pytest.mark.parametrize("name", VALUE_SETS)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of the operator's kinds there is no schema
def test_objects_are_valid(name: str, version: str) -> None:
    documents = for_version(name, version).documents
    assert len(documents) > 10
    for document in documents:
        if document["kind"] not in OPERATOR:
            kubernetes_validate.validate(document, version, strict=True)


def test_objects_for_1_20_are_valid() -> None:
    """As far as the schemas of 1.25 can tell: the budget's group has moved since, its fields are the same."""
    for document in for_version("kubernetes-1.20", "1.20").documents:
        if document["kind"] == "PodDisruptionBudget":
            document["apiVersion"] = document["apiVersion"].replace("v1beta1", "v1")
        kubernetes_validate.validate(document, "1.25", strict=True)


def test_validation_sees_a_misspelt_field() -> None:
    (deployment, *_) = Rendered().of("Deployment").values()
    deployment["spec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagePullPolice"):
        kubernetes_validate.validate(deployment, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("name", VALUE_SETS)
def test_the_same_values_give_the_same_objects(name: str) -> None:
    """Else pods would be replaced by an upgrade that changes nothing."""
    first, *others = (Rendered(values_of(name)).documents for _ in range(4))
    assert all(first == other for other in others)


def test_lint() -> None:
    findings = helm.lint(str(CHART), strict=True)
    assert findings["errors"] == []
    assert all(message["severity"] < 2 for message in findings["messages"]), findings


@pytest.mark.parametrize(
    "name", [name for name in VALUE_SETS if name not in ("everything", "rdma", "rdma-host-network")]
)
def test_kubernetes_1_20_gets_only_what_it_knows(name: str) -> None:
    """The three others are refused there by name, see test_values."""
    rendered = for_version(name, "1.20")
    versions = {document["kind"]: document["apiVersion"] for document in rendered.documents}
    assert versions["PodDisruptionBudget"] == "policy/v1beta1"
    assert versions.get("HorizontalPodAutoscaler", "autoscaling/v2beta2") == "autoscaling/v2beta2"
    assert not NEWER_FIELDS & set(keys_of(rendered.documents))
    for template in rendered.pod_templates().values():
        for container in template["spec"]["containers"]:
            probes = [container.get(f"{kind}Probe", {}) for kind in ("startup", "readiness", "liveness")]
            assert not any("grpc" in probe for probe in probes)


@pytest.mark.parametrize(
    ("version", "budget", "autoscaler"),
    [
        ("1.20.2", "policy/v1beta1", "autoscaling/v2beta2"),
        ("1.21.0", "policy/v1", "autoscaling/v2beta2"),
        ("1.22.17", "policy/v1", "autoscaling/v2beta2"),
        ("v1.23.4-gke.100", "policy/v1", "autoscaling/v2"),
        ("1.35.0", "policy/v1", "autoscaling/v2"),
        ("", "policy/v1", "autoscaling/v2"),
    ],
)
def test_api_versions_follow_the_cluster(version: str, budget: str, autoscaler: str) -> None:
    rendered = Rendered({"kubeVersion": version, "decode": {"autoscaling": {"enabled": True}}})
    assert {document["apiVersion"] for document in rendered.of("PodDisruptionBudget").values()} == {budget}
    assert [document["apiVersion"] for document in rendered.of("HorizontalPodAutoscaler").values()] == [autoscaler]


def test_every_port_says_its_protocol() -> None:
    """Server-side apply on 1.20 refuses a port without."""
    for name in VALUE_SETS:
        rendered = Rendered(values_of(name))
        ports = [port for service in rendered.of("Service").values() for port in service["spec"]["ports"]]
        for template in rendered.pod_templates().values():
            ports += [port for container in template["spec"]["containers"] for port in container.get("ports", ())]
        for policy in rendered.of("NetworkPolicy").values():
            ports += [port for rule in policy["spec"]["ingress"] for port in rule["ports"]]
        assert all(port["protocol"] == "TCP" for port in ports)


# ---- names and labels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VALUE_SETS)
def test_labels(name: str) -> None:
    rendered = Rendered(values_of(name))
    for document in rendered.documents:
        labels = document["metadata"]["labels"]
        assert labels["app.kubernetes.io/name"] == labels["app.kubernetes.io/instance"] == "tandem"
        assert labels["app.kubernetes.io/part-of"] == "tandem"
        assert labels["app.kubernetes.io/version"] == chart().metadata["appVersion"]
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        assert labels["helm.sh/chart"] == f"tandem-{chart().version}"
        assert document["metadata"]["namespace"] == "prod"
    for role, template in rendered.pod_templates().items():
        assert template["metadata"]["labels"].get("llm-d.ai/role") == (role if role in WORKERS else None)


def test_selectors_never_change() -> None:
    """A Deployment's selector is immutable: nothing in it may follow a version or a value."""
    fixed = {"app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/component"}
    for name in VALUE_SETS:
        for role, document in Rendered(values_of(name)).by_role("Deployment").items():
            selector = document["spec"]["selector"]["matchLabels"]
            assert selector.keys() == fixed and selector["app.kubernetes.io/component"] == role
            assert selector.items() <= document["spec"]["template"]["metadata"]["labels"].items()
            assert not any(key.startswith("helm.sh/") for key in document["spec"]["template"]["metadata"]["labels"])


LONG = "a" + "b" * 51


@pytest.mark.parametrize("name", ["t", "tandem", "my.dotted.release", LONG + "c", LONG + "d"])
def test_names_fit(name: str) -> None:
    values = values_of("everything") | {"discovery": {"mode": "dns"}}
    rendered = Rendered(values, name=name)
    for document in rendered.documents:
        own = document["metadata"]["name"]
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", own), own
        if document["kind"] in ("Service", "Pod"):
            assert len(own) <= 63, own
        for value in document["metadata"]["labels"].values():
            assert len(value) <= 63, value
    services = {f"{service}.prod.svc:50051" for service in rendered.of("Service")}
    assert set(rendered.config("gateway")["discovery"]["dns_names"]) < services


def test_two_long_names_do_not_collide() -> None:
    """Both in one namespace; they differ in their last letter only."""
    names = [{(d["kind"], d["metadata"]["name"]) for d in Rendered(name=LONG + end).documents} for end in "cd"]
    assert not names[0] & names[1]


# ---- there when asked for -----------------------------------------------------------------------------------------


def test_a_default_install() -> None:
    rendered = Rendered()
    replicas = {role: document["spec"]["replicas"] for role, document in rendered.by_role("Deployment").items()}
    assert replicas == {"prefill": 1, "decode": 1, "gateway": 2}
    assert set(rendered.of("Service")) == {
        "tandem-gateway",
        "tandem-gateway-headless",
        "tandem-prefill-headless",
        "tandem-decode-headless",
    }
    assert rendered.by_role("PodDisruptionBudget").keys() == replicas.keys()
    assert not rendered.of("HorizontalPodAutoscaler")
    assert not OPERATOR & {document["kind"] for document in rendered.documents}
    assert [volume["name"] for volume in rendered.pod_templates()["decode"]["spec"]["volumes"]] == ["config", "tmp"]


def test_roles_without_replicas_leave_nothing_behind() -> None:
    rendered = Rendered(values_of("unified"))
    components = {document["metadata"]["labels"]["app.kubernetes.io/component"] for document in rendered.documents}
    assert components == {"unified", "gateway", "test", "monitoring"}
    assert "transfer" not in rendered.config("unified")


def test_disruption_budgets_can_be_left_out() -> None:
    roles = ("gateway", "prefill", "decode")
    assert not Rendered({role: {"pdb": {"enabled": False}} for role in roles}).of("PodDisruptionBudget")


def test_autoscalers() -> None:
    values = values_of("everything")
    rendered = Rendered(values)
    gauges = {metric.name for metric in (*table.WORKER_LOAD_METRICS.values(), table.KV_USAGE, table.INFLIGHT)}
    scalers = rendered.by_role("HorizontalPodAutoscaler")
    assert scalers.keys() == {"gateway", *WORKERS}
    for role, scaler in scalers.items():
        spec, deployment = scaler["spec"], rendered.by_role("Deployment")[role]
        assert spec["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
        assert "replicas" not in deployment["spec"], "an upgrade would undo what the autoscaler has done"
        assert spec["minReplicas"] <= spec["maxReplicas"]
        (metric,) = spec["metrics"]
        assert metric["pods"]["metric"]["name"] in gauges, "no such figure"
        assert metric["type"] == "Pods", "custom metrics, never CPU"
        assert metric["pods"]["metric"]["name"] == chart().values[role]["autoscaling"]["metric"]
    assert scalers["gateway"]["spec"]["behavior"] == values["gateway"]["autoscaling"]["behavior"]


def test_monitoring() -> None:
    rendered = Rendered(values_of("everything"))
    (pods,) = rendered.of("PodMonitor").values()
    (services,) = rendered.of("ServiceMonitor").values()
    selector = pods["spec"]["selector"]["matchLabels"]
    for role, template in rendered.pod_templates().items():
        if role == "test":
            continue
        assert selector.items() <= template["metadata"]["labels"].items()
        assert "metrics" in {port["name"] for port in rendered.container(role)["ports"]}
    chosen = services["spec"]["selector"]["matchLabels"].items()
    found = [service for service in rendered.of("Service").values() if chosen <= service["metadata"]["labels"].items()]
    assert {service["metadata"]["labels"]["app.kubernetes.io/component"] for service in found} == {"gateway", *WORKERS}
    assert all("metrics" in {port["name"] for port in service["spec"]["ports"]} for service in found)
    assert pods["metadata"]["labels"]["release"] == "prometheus"


def test_alerts() -> None:
    (rule,) = Rendered(values_of("everything")).of("PrometheusRule").values()
    source = yaml.safe_load((CHART / "alerts" / "tandem.yaml").read_text())
    assert rule["spec"] == source and source["groups"]
    assert rule["metadata"]["labels"]["release"] == "prometheus"


def test_dashboards() -> None:
    names = {path.name: path.read_text() for path in CHART.glob("dashboards/*.json")}
    assert len(names) >= 3
    maps = [d for d in Rendered().of("ConfigMap").values() if d["metadata"]["labels"].get("grafana_dashboard") == "1"]
    found = {name: text for document in maps for name, text in document["data"].items()}
    assert {name: text.strip() for name, text in found.items()} == {name: text.strip() for name, text in names.items()}
    assert all(len(text) < MAX_CONFIG_MAP_BYTES for text in found.values())
    assert all(json.loads(text)["panels"] for text in found.values())
    off = Rendered({"monitoring": {"dashboards": {"enabled": False}}}).of("ConfigMap").values()
    assert not any("grafana_dashboard" in document["metadata"]["labels"] for document in off)


def _grpc_port(rendered: Rendered, service: str) -> dict[str, Any]:
    ports = rendered.of("Service")[service]["spec"]["ports"]
    return next(port for port in ports if port["name"] == "grpc")


def test_services_lead_to_ports_of_their_pods() -> None:
    for name in VALUE_SETS:
        rendered = Rendered(values_of(name))
        for service in rendered.of("Service").values():
            selector = service["spec"]["selector"].items()
            pods = [
                role
                for role, template in rendered.pod_templates().items()
                if selector <= template["metadata"]["labels"].items()
            ]
            assert len(pods) == 1, service["metadata"]["name"]
            names = {port["name"] for port in rendered.container(pods[0])["ports"]}
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= names


def test_the_gateway_service() -> None:
    port = _grpc_port(Rendered(), "tandem-gateway")
    assert (port["port"], port["appProtocol"]) == (50051, "kubernetes.io/h2c")
    inside = Rendered().of("Service")["tandem-gateway"]["spec"]
    assert [port["name"] for port in inside["ports"]] == ["grpc", "metrics"]
    outside = Rendered(values_of("everything")).of("Service")["tandem-gateway"]
    assert [port["name"] for port in outside["spec"]["ports"]] == ["grpc"], "metrics are not for the world"
    assert outside["spec"]["ports"][0]["nodePort"] == 30051
    assert outside["metadata"]["annotations"] == {"example.com/internal": "true"}


def test_tls_is_not_called_plaintext() -> None:
    both = Rendered(values_of("tls"))
    clients = Rendered({"tls": {"clients": {"secretName": "certificate"}}})
    assert _grpc_port(both, "tandem-gateway")["appProtocol"] == "https"
    assert _grpc_port(both, "tandem-decode-headless")["appProtocol"] == "https"
    assert _grpc_port(clients, "tandem-gateway-headless")["appProtocol"] == "https"
    assert _grpc_port(clients, "tandem-decode-headless")["appProtocol"] == "kubernetes.io/h2c"


# ---- what people read ---------------------------------------------------------------------------------------------


def test_the_notes_have_the_next_three_commands() -> None:
    notes = Rendered(name="mine", namespace="here").notes
    steps = re.findall(r"^\d\. .*\n +(\S.*)$", notes, re.MULTILINE)
    assert steps[0].startswith("helm test mine -n here")
    assert steps[1] == "kubectl -n here port-forward svc/mine-tandem-gateway 50051"
    assert steps[2].startswith("tandem generate --address 127.0.0.1:50051 ")
    assert "grpcurl -plaintext" in notes and "Note:" not in notes


def test_the_notes_know_tls() -> None:
    notes = Rendered(values_of("tls")).notes
    assert "-plaintext" not in notes
    for words in ("get secret tandem-clients", "--tls-server-name tandem.example.com", "--tls-certificate-file"):
        assert words in notes
    assert "testSecretName" not in notes
    without = Rendered({"tls": {"clients": {"secretName": "c", "requireClientCertificate": True}}})
    assert "tls.clients.testSecretName" in without.notes
    assert not without.of("Pod")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("local-prompts", "decode workers compute prompts themselves"),
        ("rdma-host-network", "No NetworkPolicy applies"),
    ],
)
def test_the_notes_warn(name: str, words: str) -> None:
    assert words in " ".join(Rendered(values_of(name)).notes.split())
    assert words not in " ".join(Rendered().notes.split())


def test_the_notes_warn_of_pages_in_plaintext() -> None:
    values = {"tls": {"peers": {"secretName": "peers"}}, "rdma": {"trustedNetwork": True}}
    assert "plaintext" in Rendered(values).notes
    assert "plaintext, whatever" not in Rendered(values_of("tls")).notes
