"""The programs' configuration files: every one loads for its program, and says what the values said."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tandem.config import Config, ParallelConfig
from tandem.config_load import PROGRAM_SECTIONS, Program, load
from tandem.transfer.huge_pages import HUGE_PAGE_BYTES
from tests.chart.rendered import VALUE_SETS, Rendered, values_of

POD_ADDRESS = "10.1.2.3"


def loaded(rendered: Rendered, role: str, folder: Path) -> Config:
    """Load the role's file as its container does: with its arguments and its environment."""
    path = folder / f"{role}.json"
    path.write_text(rendered.config_file(role))
    environment: dict[str, str] = {}
    for variable in rendered.container(role)["env"]:
        source = variable.get("valueFrom", {})
        given = {"fieldRef": POD_ADDRESS, "secretKeyRef": "secret"}.get(next(iter(source), ""), "")
        environment[variable["name"]] = variable.get("value", given)
    program, flag, _ = rendered.container(role)["args"]
    assert program == role
    return load(program, [flag, str(path)], environment)


@pytest.mark.parametrize("name", VALUE_SETS)
def test_every_file_loads(name: str, tmp_path: Path) -> None:
    rendered = Rendered(values_of(name))
    roles = rendered.by_role("Deployment").keys()
    assert "gateway" in roles and roles & {"decode", "unified"}
    for role in roles:
        config = loaded(rendered, role, tmp_path)
        program: Any = role
        sections = PROGRAM_SECTIONS[_as_program(program)]
        if name != "everything":  # it sets cache and handoff for all programs; a gateway reads over them
            assert rendered.config(role).keys() <= set(sections)
        assert config.server.host == "0.0.0.0"
        assert config.server.advertise_host == POD_ADDRESS


def _as_program(role: Any) -> Program:
    assert role in PROGRAM_SECTIONS
    program: Program = role
    return program


@pytest.mark.parametrize("name", VALUE_SETS)
def test_programs_listen_where_their_containers_say(name: str, tmp_path: Path) -> None:
    rendered = Rendered(values_of(name))
    for role in rendered.by_role("Deployment"):
        config = loaded(rendered, role, tmp_path)
        ports = {port["name"]: port["containerPort"] for port in rendered.container(role)["ports"]}
        assert ports.pop("grpc") == config.server.port
        assert ports.pop("metrics") == config.server.metrics_port
        if role in ("prefill", "decode"):
            assert ports.pop("kv") == config.transfer.port
        if role == "prefill":
            assert ports.pop("handoff") == config.server.handoff_port
        assert not ports


def test_defaults(tmp_path: Path) -> None:
    rendered = Rendered()
    gateway, prefill, decode = (loaded(rendered, role, tmp_path) for role in ("gateway", "prefill", "decode"))
    assert gateway.model == prefill.model == decode.model
    assert decode.model.path == "demo"
    assert (prefill.scheduler.loop, decode.scheduler.loop) == ("auto", "auto")
    assert prefill.parallel == decode.parallel == ParallelConfig()
    assert (gateway.server.drain_delay_seconds, gateway.server.drain_seconds) == (5, 600)
    assert (prefill.server.drain_seconds, decode.server.drain_seconds) == (60, 30)
    assert gateway.server.log_format == decode.server.log_format == "json"
    assert not decode.transfer.trusted_network
    assert gateway.tls == decode.tls == Config().tls
    assert gateway.telemetry == decode.telemetry == Config().telemetry


def test_sizes_are_each_roles_own(tmp_path: Path) -> None:
    rendered = Rendered(
        {"prefill": {"parallel": {"tensorSize": 2, "pipelineSize": 4}}, "decode": {"parallel": {"dataSize": 3}}}
    )
    prefill, decode = (loaded(rendered, role, tmp_path).parallel for role in ("prefill", "decode"))
    assert prefill == ParallelConfig(tensor_size=2, pipeline_size=4)
    assert decode == ParallelConfig(data_size=3)


def test_every_transfer_process_has_a_kv_port(tmp_path: Path) -> None:
    rendered = Rendered(
        {"prefill": {"parallel": {"tensorSize": 2, "dataSize": 3}}, "decode": {"parallel": {"dataSize": 2}}}
    )
    for role, count in (("prefill", 6), ("decode", 2)):
        first = loaded(rendered, role, tmp_path).transfer.port
        (container,) = rendered.pod_templates()[role]["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        names = ["kv", *(f"kv-{number}" for number in range(1, count))]
        assert [ports.pop(name) for name in names] == list(range(first, first + count))
        assert not set(ports.values()) & set(range(first, first + count))
    rules = rendered.by_role("NetworkPolicy")["prefill"]["spec"]["ingress"]
    opened = {port["port"] for rule in rules for port in rule["ports"]}
    assert {"handoff", "kv", *(f"kv-{number}" for number in range(1, 6))} <= opened


def test_loops_are_each_roles_own(tmp_path: Path) -> None:
    for prefill, decode in (("normal", "overlap"), ("overlap", "normal")):
        rendered = Rendered({"prefill": {"loop": prefill}, "decode": {"loop": decode}})
        assert loaded(rendered, "prefill", tmp_path).scheduler.loop == prefill
        assert loaded(rendered, "decode", tmp_path).scheduler.loop == decode


def test_discovery(tmp_path: Path) -> None:
    rendered = Rendered(name="mine", namespace="here")
    discovery = loaded(rendered, "gateway", tmp_path).discovery
    assert (discovery.mode, discovery.namespace, discovery.port_name) == ("kubernetes", "here", "grpc")
    selected = set()
    for role, template in rendered.pod_templates().items():
        labels = template["metadata"]["labels"]
        terms = [term.partition("=") for term in discovery.selector.split(",")]
        if all(name in labels and (not sign or labels[name] == value) for name, sign, value in terms):
            selected.add(role)
    assert selected == {"prefill", "decode"}
    by_name = loaded(Rendered(values_of("dns"), namespace="here"), "gateway", tmp_path).discovery
    assert by_name.mode == "dns"
    assert by_name.dns_names == tuple(
        f"tandem-{role}-headless.here.svc:50051" for role in ("prefill", "decode", "unified")
    )


def test_models(tmp_path: Path) -> None:
    hub = Rendered(values_of("hub"))
    for role in ("gateway", "prefill", "decode"):
        model = loaded(hub, role, tmp_path).model
        assert (model.path, model.revision, model.served_name) == ("Qwen/Qwen3-0.6B", "main", "qwen")
        container, spec = hub.container(role), hub.pod_templates()[role]["spec"]
        environment = {variable["name"]: variable for variable in container["env"]}
        assert environment["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "hub", "key": "token"}
        cache = next(mount for mount in container["volumeMounts"] if mount["name"] == "hub")
        assert cache["mountPath"] == environment["HF_HOME"]["value"]
        volume = next(volume for volume in spec["volumes"] if volume["name"] == "hub")
        assert volume["persistentVolumeClaim"]["claimName"] == "hub-cache"
    volume_of = Rendered(values_of("pvc"))
    model = loaded(volume_of, "decode", tmp_path).model
    assert (model.path, model.dtype, model.max_context_tokens) == ("/models/qwen3/0.6b", "bfloat16", 8192)
    for role in ("gateway", "prefill", "decode"):
        mounts = {mount["name"]: mount for mount in volume_of.container(role)["volumeMounts"]}
        assert mounts["models"] == {"name": "models", "mountPath": "/models", "readOnly": True}
        assert "hub" not in mounts


def test_no_mount_is_within_another() -> None:
    """A folder below a read-only volume could not be made."""
    for name in VALUE_SETS:
        for template in Rendered(values_of(name)).pod_templates().values():
            for container in template["spec"]["containers"]:
                paths = [Path(mount["mountPath"]) for mount in container["volumeMounts"]]
                assert not [path for path in paths if set(path.parents) & set(paths)], name
                volumes = {volume["name"] for volume in template["spec"]["volumes"]}
                assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_config_values_go_over_each_other(tmp_path: Path) -> None:
    values = {
        "config": {"scheduler": {"budget_tokens": 100, "max_waiting_requests": 10}},
        "decode": {"config": {"scheduler": {"budget_tokens": 50}}},
    }
    rendered = Rendered(values)
    decode, prefill = (loaded(rendered, role, tmp_path).scheduler for role in ("decode", "prefill"))
    assert (decode.budget_tokens, decode.max_waiting_requests) == (50, 10)
    assert (prefill.budget_tokens, prefill.max_waiting_requests) == (100, 10)


def test_everything(tmp_path: Path) -> None:
    rendered = Rendered(values_of("everything"))
    gateway, prefill = (loaded(rendered, role, tmp_path) for role in ("gateway", "prefill"))
    assert gateway.gateway.max_inflight_requests == 512
    assert gateway.server.reflection is False  # from extraEnv
    assert (prefill.scheduler.budget_tokens, prefill.scheduler.loop) == (2048, "normal")
    assert prefill.transfer.shared_key_file == "/etc/tandem-key/key"
    assert (prefill.cache.page_tokens, prefill.handoff.lease_seconds) == (64, 12.5)
    for config in (gateway, prefill):
        telemetry = config.telemetry
        assert telemetry.vllm_metrics and telemetry.genai_metrics
        assert (telemetry.otlp_endpoint, telemetry.trace_ratio) == ("http://collector.tracing.svc:4317", 0.1)
        assert (config.server.log_level, config.server.log_format) == ("debug", "text")


def test_rdma(tmp_path: Path) -> None:
    rendered = Rendered(values_of("rdma"))
    for role in ("prefill", "decode"):
        transfer = loaded(rendered, role, tmp_path).transfer
        assert (transfer.transport, transfer.trusted_network) == ("mooncake-rdma", True)
        assert (transfer.mooncake_port_min, transfer.mooncake_port_max) == (15000, 15999)
        template, container = rendered.pod_templates()[role], rendered.container(role)
        assert template["metadata"]["annotations"]["k8s.v1.cni.cncf.io/networks"] == "rdma-network"
        device = {"rdma/hca_shared_devices_a": "1"}
        assert container["resources"] == {
            "requests": {"cpu": "4", "memory": "16Gi"} | device,
            "limits": {"memory": "32Gi", "nvidia.com/gpu": 1} | device,
        }
        assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
        assert "hostNetwork" not in template["spec"]
    gateway = rendered.container("gateway")
    assert "add" not in gateway["securityContext"]["capabilities"]
    assert "rdma/hca_shared_devices_a" not in gateway["resources"]["limits"]
    host = Rendered(values_of("rdma-host-network"))
    assert loaded(host, "decode", tmp_path).transfer.mooncake_devices == "mlx5_0,mlx5_1"
    for role, template in host.pod_templates().items():
        in_host = role in ("prefill", "decode")
        assert template["spec"].get("hostNetwork", False) is in_host
        assert template["spec"].get("dnsPolicy") == ("ClusterFirstWithHostNet" if in_host else None)


def test_huge_pages(tmp_path: Path) -> None:
    rendered = Rendered(values_of("huge-pages"))
    for role, amount, size in (("prefill", "512Mi", 512 << 20), ("decode", "4Gi", 4 << 30)):
        cache = loaded(rendered, role, tmp_path).cache
        assert (cache.huge_pages, cache.pool_bytes) == ("require", size)
        resources = rendered.container(role)["resources"]
        assert resources["requests"]["hugepages-2Mi"] == resources["limits"]["hugepages-2Mi"] == amount
        assert resources["requests"]["memory"] and resources["requests"]["cpu"], "Kubernetes wants one of them beside"
    assert "hugepages-2Mi" not in rendered.container("gateway")["resources"]["limits"]
    without = Rendered({"config": {"cache": {"huge_pages": "off", "pool_bytes": 1 << 30}}})
    assert "hugepages-2Mi" not in without.container("decode")["resources"]["limits"]
    cache = loaded(without, "decode", tmp_path).cache
    assert (cache.huge_pages, cache.pool_bytes) == ("off", 1 << 30)


@pytest.mark.parametrize("sizes", [{}, {"dataSize": 3}, {"tensorSize": 2, "pipelineSize": 3, "dataSize": 2}])
def test_all_pools_of_a_pod_fit_into_its_huge_pages(sizes: dict[str, int], tmp_path: Path) -> None:
    """Each pool ends in a page of its own; the worst is one byte of it."""
    rendered = Rendered({"decode": {"hugePages": "64Mi", "parallel": sizes}})
    pool_bytes = loaded(rendered, "decode", tmp_path).cache.pool_bytes
    num_pools = math.prod(sizes.values())
    most = pool_bytes // HUGE_PAGE_BYTES + num_pools - 1  # pages, however the pools share their bytes
    assert most == 32


def test_a_changed_configuration_replaces_the_pods_that_it_concerns() -> None:
    def sums(values: dict[str, Any]) -> dict[str, str]:
        templates = Rendered(values).pod_templates()
        annotations = {role: template["metadata"]["annotations"] for role, template in templates.items()}
        return {role: each["checksum/config"] for role, each in annotations.items() if role != "test"}

    before = sums({})
    assert before == sums({"decode": {"replicas": 3}, "networkPolicy": {"enabled": False}})
    decode = sums({"decode": {"config": {"scheduler": {"budget_tokens": 7}}}})
    assert [role for role in before if before[role] != decode[role]] == ["decode"]
    everywhere = sums({"logging": {"level": "debug"}})
    assert all(before[role] != everywhere[role] for role in before)
