"""Who may do what: the restricted Pod Security profile, rights, network policies, certificates."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tandem.cli.main import main
from tests.chart.pod_security import violations
from tests.chart.reachability import Endpoint, endpoint, reaches
from tests.chart.rendered import VALUE_SETS, WORKERS, Rendered, values_of
from tests.chart.test_configuration import loaded

CONTROL, METRICS, KV, HANDOFF = 50051, 9090, 50052, 50053
OUTSIDER = Endpoint({"app": "something-else"})
ELSEWHERE = Endpoint({"app": "something-else"}, {}, {"kubernetes.io/metadata.name": "elsewhere"})


# ---- restricted profile -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in VALUE_SETS if not name.startswith("rdma")])
def test_every_pod_keeps_the_restricted_profile(name: str) -> None:
    templates = Rendered(values_of(name)).pod_templates()
    assert "test" in templates
    for role, template in templates.items():
        assert not violations(template["spec"]), role
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_rdma_breaks_it_by_no_more_than_it_needs() -> None:
    found = {role: violations(t["spec"]) for role, t in Rendered(values_of("rdma")).pod_templates().items()}
    assert found == {"gateway": [], "test": [], "prefill": ["prefill: IPC_LOCK"], "decode": ["decode: IPC_LOCK"]}
    host = Rendered(values_of("rdma-host-network")).pod_templates()
    assert violations(host["decode"]["spec"]) == ["hostNetwork", "decode: IPC_LOCK"]


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("hostPID",), True, "hostPID"),
        (("volumes",), [{"name": "v", "hostPath": {"path": "/"}}], "volume v: hostPath"),
        (("securityContext", "runAsNonRoot"), False, "decode: runAsNonRoot"),
        (("securityContext", "runAsUser"), 0, "decode: runAsUser 0"),
        (("securityContext", "seccompProfile"), {"type": "Unconfined"}, "decode: seccompProfile"),
        (("containers", 0, "securityContext", "privileged"), True, "decode: privileged"),
        (("containers", 0, "securityContext", "allowPrivilegeEscalation"), None, "decode: allowPrivilegeEscalation"),
        (("containers", 0, "securityContext", "capabilities"), {"add": ["NET_ADMIN"]}, "decode: NET_ADMIN"),
        (("containers", 0, "securityContext", "runAsUser"), 0, "decode: runAsUser 0"),
        (("containers", 0, "ports"), [{"containerPort": 1, "hostPort": 1}], "decode: hostPort 1"),
    ],
)
def test_the_evaluator_sees(path: tuple[Any, ...], value: object, named: str) -> None:
    spec = Rendered().pod_templates()["decode"]["spec"]
    node = spec
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    assert named in violations(spec)


# ---- rights -------------------------------------------------------------------------------------------------------


def test_the_gateway_may_read_pods_of_its_namespace_and_nothing_else() -> None:
    rendered = Rendered()
    (role,) = rendered.of("Role").values()
    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}]
    (binding,) = rendered.of("RoleBinding").values()
    assert binding["roleRef"]["name"] == role["metadata"]["name"] and binding["roleRef"]["kind"] == "Role"
    (account,) = rendered.of("ServiceAccount")
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": "prod"}]
    specs = {name: template["spec"] for name, template in rendered.pod_templates().items()}
    assert specs.pop("gateway")["serviceAccountName"] == account
    for spec in specs.values():
        assert spec["automountServiceAccountToken"] is False and "serviceAccountName" not in spec


@pytest.mark.parametrize("name", VALUE_SETS)
def test_nobody_gets_rights_of_the_whole_cluster(name: str) -> None:
    rendered = Rendered(values_of(name))
    assert not {"ClusterRole", "ClusterRoleBinding"} & {document["kind"] for document in rendered.documents}
    tokens = {r for r, t in rendered.pod_templates().items() if t["spec"]["automountServiceAccountToken"] is not False}
    assert tokens == (set() if name == "dns" else {"gateway"})


def test_an_existing_account_is_bound_and_not_made() -> None:
    rendered = Rendered({"serviceAccount": {"create": False, "name": "existing"}})
    assert not rendered.of("ServiceAccount")
    (binding,) = rendered.of("RoleBinding").values()
    assert binding["subjects"][0]["name"] == "existing"
    assert rendered.pod_templates()["gateway"]["spec"]["serviceAccountName"] == "existing"


def test_dns_needs_no_rights() -> None:
    kinds = {document["kind"] for document in Rendered(values_of("dns")).documents}
    assert not {"Role", "RoleBinding", "ServiceAccount"} & kinds


# ---- network ------------------------------------------------------------------------------------------------------


class Network:
    """The release's pods and policies, and strangers in this namespace and another."""

    def __init__(self, values: dict[str, Any] | None = None) -> None:
        rendered = Rendered(values)
        self.policies = list(rendered.of("NetworkPolicy").values())
        self.pods = {role: endpoint(template) for role, template in rendered.pod_templates().items()}
        self.pods |= {"outsider": OUTSIDER, "elsewhere": ELSEWHERE}

    def who_reaches(self, role: str, port: int) -> set[str]:
        target = self.pods[role]
        return {name for name, pod in self.pods.items() if reaches(self.policies, pod, target, port)}

    @property
    def everybody(self) -> set[str]:
        return set(self.pods)


@pytest.mark.parametrize("name", ["default", "tls", "dns", "unified", "hub", "local-prompts"])
def test_who_reaches_whom(name: str) -> None:
    network = Network(values_of(name))
    workers = network.pods.keys() & set(WORKERS)
    for role in workers:
        assert network.who_reaches(role, CONTROL) == {"gateway"}
        assert network.who_reaches(role, METRICS) == network.everybody
        data_plane = {"decode"} if role == "prefill" else set()
        assert network.who_reaches(role, KV) == network.who_reaches(role, HANDOFF) == data_plane
        assert network.who_reaches(role, 22) == network.who_reaches(role, 15000) == set()
    assert network.who_reaches("gateway", CONTROL) == network.everybody
    assert network.who_reaches("gateway", METRICS) == network.everybody
    assert network.who_reaches("gateway", KV) == set()


def test_clients_and_scrapers_can_be_named() -> None:
    values = {
        "networkPolicy": {
            "clients": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "elsewhere"}}}],
            "metrics": [{"podSelector": {"matchLabels": {"app": "something-else"}}}],
        }
    }
    network = Network(values)
    assert network.who_reaches("gateway", CONTROL) == {"elsewhere", "test"}
    for role in ("gateway", "prefill", "decode"):
        assert network.who_reaches(role, METRICS) == {"outsider"}


@pytest.mark.parametrize("version", ["1.20.2", "1.22.0", "1.30.0"])
def test_mooncake_has_its_ports_between_prefill_and_decode_only(version: str) -> None:
    values = values_of("kubernetes-1.20") | {"kubeVersion": version, "unified": {"replicas": 1}}
    network = Network(values)
    for port in (15000, 15010, 15031):
        assert network.who_reaches("prefill", port) == {"decode"}
        assert network.who_reaches("decode", port) == {"prefill"}
        assert network.who_reaches("unified", port) == set()
    assert network.who_reaches("prefill", 15032) == network.who_reaches("prefill", 14999) == set()
    ranges = [port for policy in network.policies for rule in policy["spec"]["ingress"] for port in rule["ports"]]
    assert any("endPort" in port for port in ranges) is (version != "1.20.2")


def test_no_policy_pretends_to_guard_the_nodes_network() -> None:
    network = Network(values_of("rdma-host-network"))
    assert [policy["metadata"]["name"] for policy in network.policies] == ["tandem-gateway"]


def test_policies_can_be_left_out() -> None:
    network = Network({"networkPolicy": {"enabled": False}})
    assert not network.policies
    assert network.who_reaches("prefill", KV) == network.everybody


# ---- certificates -------------------------------------------------------------------------------------------------


def _files(rendered: Rendered, role: str) -> dict[str, tuple[str, str]]:
    """Return the files that Secrets become in the role's container: path -> Secret and key."""
    mounts = {mount["name"]: mount for mount in rendered.container(role)["volumeMounts"]}
    files = {}
    for volume in rendered.pod_templates()[role]["spec"]["volumes"]:
        secret = volume.get("secret")
        if secret is None:
            continue
        mount = mounts[volume["name"]]
        assert mount["readOnly"] is True and secret["defaultMode"] == 0o440
        assert "subPath" not in mount, "a renewed certificate would not arrive"
        for item in secret["items"]:
            files[f"{mount['mountPath']}/{item['path']}"] = (secret["secretName"], item["key"])
    return files


def test_certificates_are_where_the_programs_look(tmp_path: Path) -> None:
    rendered = Rendered(values_of("tls"))
    for role in ("gateway", "prefill", "decode"):
        files, tls = _files(rendered, role), loaded(rendered, role, tmp_path).tls
        assert files[tls.peer_certificate_file] == ("tandem-peers", "tls.crt")
        assert files[tls.peer_key_file] == ("tandem-peers", "tls.key")
        assert files[tls.peer_ca_file] == ("tandem-peers", "ca.crt")
        assert (tls.peer_name, tls.reload_seconds) == ("pods.tandem.example.com", 30)
        if role != "gateway":
            assert not tls.certificate_file and len(files) == 3
    tls = loaded(rendered, "gateway", tmp_path).tls
    files = _files(rendered, "gateway")
    assert files[tls.certificate_file] == ("tandem-clients", "tls.crt")
    assert files[tls.key_file] == ("tandem-clients", "tls.key")
    assert files[tls.client_ca_file] == ("tandem-client-authorities", "ca.crt")
    assert len(files) == 6


def test_authorities_of_clients_may_be_in_the_same_secret(tmp_path: Path) -> None:
    rendered = Rendered({"tls": {"clients": {"secretName": "certificate", "requireClientCertificate": True}}})
    tls = loaded(rendered, "gateway", tmp_path).tls
    assert _files(rendered, "gateway")[tls.client_ca_file] == ("certificate", "ca.crt")
    assert not tls.peer_ca_file
    plain = Rendered({"tls": {"clients": {"secretName": "certificate"}}})
    assert not loaded(plain, "gateway", tmp_path).tls.client_ca_file
    assert ("certificate", "ca.crt") not in _files(plain, "gateway").values()


def test_the_test_speaks_tls_and_has_no_key_of_the_service() -> None:
    rendered = Rendered(values_of("tls"))
    files, script = _files(rendered, "test"), rendered.container("test")["args"][0]
    assert ("tandem-clients", "tls.key") not in files.values()
    secrets = {path: secret for path, (secret, _) in files.items()}
    assert secrets == {
        "/etc/tandem-tls/authorities/ca.crt": "tandem-clients",
        "/etc/tandem-tls/client/tls.crt": "tandem-test-client",
        "/etc/tandem-tls/client/tls.key": "tandem-test-client",
    }
    assert all(path in script for path in files)
    assert "--tls-server-name 'tandem.example.com'" in script
    assert "--tls" not in Rendered().container("test")["args"][0]
    (variable,) = rendered.container("test")["env"]
    assert variable["value"] == "tandem-gateway.prod.svc:50051"  # a name that a certificate can have


def test_the_flags_that_the_chart_uses_are_real(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    known = set(re.findall(r"--[a-z][-a-z]+", capsys.readouterr().out))
    rendered = Rendered(values_of("tls"))
    script, notes = rendered.container("test")["args"][0], rendered.notes.partition("tandem generate")[2]
    used = set(re.findall(r"(?<=\s)--[a-z][-a-z]+", script + notes))
    assert {"--tls", "--tls-ca-file", "--tls-server-name", "--tls-certificate-file", "--tls-key-file"} <= used <= known
