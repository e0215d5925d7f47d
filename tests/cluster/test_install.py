"""An install with no value at all, what it may and may not do, and that nothing is left of it."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import helm_python as helm
import pytest

from tests.cluster.conftest import ASKS, KUBECONFIG
from tests.cluster.load import answers_of
from tests.cluster.pods import Pods
from tests.cluster.release import Release
from tests.cluster.scorecard import Scorecard

INSTALL_SECONDS = 60.0
DEMO_BEGINS = ", *args, **kwargs):"  # what the demo model writes after the first of ASKS


def test_a_default_install_is_ready_in_time(release: Release, pods: Pods, scorecard: Scorecard) -> None:
    with scorecard.line("install with defaults") as line:
        began = time.monotonic()
        release.install()
        seconds = time.monotonic() - began
        assert seconds < INSTALL_SECONDS
        line.note = f"{seconds:.1f} s until all are ready"
    assert [len(pods.ready(role)) for role in ("gateway", "prefill", "decode")] == [2, 1, 1]
    assert pods.restarts() == {}


def test_helm_test_asks_for_an_answer(release: Release, scorecard: Scorecard) -> None:
    with scorecard.line("helm test"):
        release.test()


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_port_forward_as_the_notes_say(pods: Pods, scorecard: Scorecard) -> None:
    with scorecard.line("a stream through port-forward"), forwarded(pods) as address:
        answers = answers_of(address, ASKS[:1])
        assert answers[ASKS[0]].startswith(DEMO_BEGINS)


def test_the_answer_went_over_the_wire(pods: Pods) -> None:
    assert pods.metric("decode", "tandem_worker_transferred_bytes_total") > 0
    assert pods.metric("decode", "tandem_worker_local_prefills_total") == 0


def test_only_pods_may_be_read(pods: Pods) -> None:
    account = f"{pods.release}-gateway"
    assert all(pods.allowed(account, verb, "pods") for verb in ("get", "list", "watch"))
    for verb in ("create", "update", "patch", "delete", "deletecollection"):
        assert not pods.allowed(account, verb, "pods"), verb
    for resource in ("secrets", "configmaps", "services", "nodes", "serviceaccounts", "pods/exec", "pods/log"):
        assert not pods.allowed(account, "get", resource), resource
    assert not pods.allowed(account, "list", "pods", namespace="kube-system")
    assert not pods.allowed(account, "list", "pods", namespace="")
    assert not pods.allowed(account, "get", "deployments", group="apps")
    assert not pods.allowed("default", "list", "pods"), "workers run as this account"


def test_workers_have_no_token(pods: Pods) -> None:
    for role in ("prefill", "decode"):
        (pod,) = pods.ready(role)
        assert pod.spec.automount_service_account_token is False
        assert not [volume for volume in pod.spec.volumes if volume.secret or volume.projected]


def test_network_policies_are_there(pods: Pods) -> None:
    """What they mean is tested in tests/chart; here, that the API server has them as they were meant."""
    policies = {
        item.metadata.name: item for item in pods.networking.list_namespaced_network_policy(pods.namespace).items
    }
    assert set(policies) == {f"{pods.release}-{role}" for role in ("gateway", "prefill", "decode")}
    senders: dict[str, Any] = {}
    for rule in policies[f"{pods.release}-prefill"].spec.ingress:
        peers = [peer.pod_selector.match_labels["app.kubernetes.io/component"] for peer in rule._from or ()]
        senders |= {port.port: peers for port in rule.ports}
    assert senders == {"metrics": [], "grpc": ["gateway"], "handoff": ["decode"], "kv": ["decode"]}


def test_programs_end_well_as_process_1(pods: Pods, scorecard: Scorecard) -> None:
    with scorecard.line("SIGTERM as process 1: exit 0"):
        for role in ("gateway", "prefill", "decode"):
            ended = pods.terminate_program(pods.ready(role)[0])
            assert (ended.exit_code, ended.signal) == (0, None), f"{role}: {ended}"


def test_a_bad_value_is_refused_before_anything_changes(release: Release, pods: Pods, scorecard: Scorecard) -> None:
    before, versions = release.revision(), resource_versions(pods)
    with scorecard.line("upgrades with bad values are refused"):
        for values, named in (
            ({"decode": {"replicas": "three"}}, "replicas"),
            ({"decode": {"loop": "sideways"}}, "loop"),
            ({"decode": {"replicsa": 3}}, "replicsa"),
            ({"prefill": {"drain": {"seconds": 60}, "terminationGracePeriodSeconds": 30}}, "terminationGracePeriod"),
            ({"decode": {"config": {"scheduler": {"budget_tokens": -1}}}}, "budget_tokens"),
        ):
            with pytest.raises(helm.HelmError, match=named):
                release.upgrade(values)
    assert release.revision() == before
    assert resource_versions(pods) == versions


def test_an_uninstall_leaves_nothing(release: Release, pods: Pods, scorecard: Scorecard) -> None:
    assert len(pods.leftovers()) > 15
    with scorecard.line("uninstall leaves nothing"):
        release.uninstall()
        pods.wait(lambda: not pods.leftovers(), 60.0, "end of everything")


def resource_versions(pods: Pods) -> dict[str, str]:
    items = pods.apps.list_namespaced_deployment(pods.namespace).items
    return {item.metadata.name: str(item.metadata.generation) for item in items}


@contextmanager
def forwarded(pods: Pods) -> Iterator[str]:
    """Yield the address that `kubectl port-forward` gives the gateway's Service here."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = ["kubectl", "--kubeconfig", KUBECONFIG, "-n", pods.namespace]
    command += ["port-forward", f"svc/{pods.release}-gateway", f"{port}:50051"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and "Forwarding" in process.stdout.readline()
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate(timeout=10)
