"""The pods, objects and rights of one namespace, through the `kubernetes` client."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.stream import stream

ROLE_LABEL = "app.kubernetes.io/component"
_SAMPLE = re.compile(r"^(\w+)(?:\{[^}]*\})? ([-+.eE0-9naif]+)$", re.MULTILINE)


class Pods:
    """What runs in a namespace. Every wait has a bound, and says what it saw when it fails."""

    def __init__(self, kubeconfig: str, namespace: str, release: str) -> None:
        self.namespace = namespace
        self.release = release
        new_client: Any = config.new_client_from_config  # the client has no types
        api = new_client(kubeconfig)
        self.api: Any = api
        self.core: Any = client.CoreV1Api(api)
        self.apps: Any = client.AppsV1Api(api)
        self.networking: Any = client.NetworkingV1Api(api)
        self.rights: Any = client.RbacAuthorizationV1Api(api)
        self.authorization: Any = client.AuthorizationV1Api(api)

    def of(self, role: str) -> list[Any]:
        """Return the pods of a role that are not being deleted."""
        selector = f"app.kubernetes.io/instance={self.release},{ROLE_LABEL}={role}"
        pods = self.core.list_namespaced_pod(self.namespace, label_selector=selector).items
        return [pod for pod in pods if pod.metadata.deletion_timestamp is None]

    def ready(self, role: str) -> list[Any]:
        return [pod for pod in self.of(role) if is_ready(pod)]

    def wait_ready(self, role: str, count: int, seconds: float = 120.0) -> None:
        """Wait until the role has exactly `count` pods, all ready, and none on its way out."""

        def settled() -> bool:
            selector = f"app.kubernetes.io/instance={self.release},{ROLE_LABEL}={role}"
            pods = self.core.list_namespaced_pod(self.namespace, label_selector=selector).items
            return len(pods) == count and all(is_ready(pod) for pod in pods)

        self.wait(settled, seconds, f"{count} ready {role} pods")

    def wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"no {what} within {seconds:g} s:\n{self.describe()}"
            time.sleep(0.2)

    def scale(self, role: str, replicas: int) -> None:
        """Set the number of replicas, as `kubectl scale` does."""
        self.apps.patch_namespaced_deployment_scale(
            f"{self.release}-{role}", self.namespace, {"spec": {"replicas": replicas}}
        )

    def delete(self, pod: Any, *, kill: bool = False) -> None:
        """Delete a pod with its own grace period; `kill`: without any."""
        grace = {"grace_period_seconds": 0} if kill else {}
        self.core.delete_namespaced_pod(pod.metadata.name, self.namespace, **grace)

    def terminate_program(self, pod: Any) -> Any:
        """Send SIGTERM to the program, as the container runtime does; return how it ended, once it runs again."""
        restarts = pod.status.container_statuses[0].restart_count
        command = ["sh", "-c", "kill -TERM 1"]
        stream(
            self.core.connect_get_namespaced_pod_exec, pod.metadata.name, self.namespace, command=command, stdout=True
        )

        def ended() -> Any:
            found = self.core.read_namespaced_pod(pod.metadata.name, self.namespace)
            (status,) = found.status.container_statuses
            return status.last_state.terminated if is_ready(found) and status.restart_count > restarts else None

        self.wait(lambda: ended() is not None, 60.0, f"end and restart of the program in {pod.metadata.name}")
        return ended()

    def wait_gone(self, pod: Any, seconds: float = 120.0) -> None:
        """Wait until this very pod is no more."""

        def gone() -> bool:
            try:
                found = self.core.read_namespaced_pod(pod.metadata.name, self.namespace)
            except ApiException as error:
                return bool(error.status == 404)
            return bool(found.metadata.uid != pod.metadata.uid)

        self.wait(gone, seconds, f"end of pod {pod.metadata.name}")

    def restarts(self) -> dict[str, int]:
        """Return the containers that were restarted."""
        pods = self.core.list_namespaced_pod(self.namespace).items
        statuses = [(pod.metadata.name, status) for pod in pods for status in pod.status.container_statuses or ()]
        return {name: status.restart_count for name, status in statuses if status.restart_count}

    def metric(self, role: str, name: str, labels: str = "") -> float:
        """Return the sum of a metric over the role's ready pods, read from their metrics ports."""
        return sum(self.metric_of_each(role, name, labels))

    def metric_of_each(self, role: str, name: str, labels: str = "") -> list[float]:
        """Return a metric of each of the role's ready pods; its series are summed up."""
        return [_sample_sum(self.metrics(pod), name, labels) for pod in self.ready(role)]

    def metrics(self, pod: Any) -> str:
        """Return what the pod's metrics port says, asked through the API server."""
        name = f"{pod.metadata.name}:9090"
        return str(self.core.connect_get_namespaced_pod_proxy_with_path(name, self.namespace, path="metrics"))

    def node_address(self) -> str:
        """Return host:port of the gateway's NodePort: how it is reached from outside of the cluster."""
        service = self.core.read_namespaced_service(f"{self.release}-gateway", self.namespace)
        port = next(port.node_port for port in service.spec.ports if port.name == "grpc")
        addresses = self.core.list_node().items[0].status.addresses
        host = next(address.address for address in addresses if address.type == "InternalIP")
        return f"{host}:{port}"

    def allowed(self, account: str, verb: str, resource: str, group: str = "", namespace: str | None = None) -> bool:
        """Return whether a service account of this namespace may do something."""
        review = client.V1SubjectAccessReview(
            spec=client.V1SubjectAccessReviewSpec(
                user=f"system:serviceaccount:{self.namespace}:{account}",
                groups=["system:serviceaccounts", f"system:serviceaccounts:{self.namespace}", "system:authenticated"],
                resource_attributes=client.V1ResourceAttributes(
                    namespace=self.namespace if namespace is None else namespace,
                    verb=verb,
                    resource=resource,
                    group=group,
                ),
            )
        )
        return bool(self.authorization.create_subject_access_review(review).status.allowed)

    def leftovers(self) -> list[str]:
        """Return what of the release is still in the namespace, pods that are ending included."""
        selector = f"app.kubernetes.io/instance={self.release}"
        lists = (
            self.core.list_namespaced_pod,
            self.core.list_namespaced_service,
            self.core.list_namespaced_config_map,
            self.core.list_namespaced_service_account,
            self.apps.list_namespaced_deployment,
            self.apps.list_namespaced_replica_set,
            self.networking.list_namespaced_network_policy,
            self.rights.list_namespaced_role,
            self.rights.list_namespaced_role_binding,
        )
        found = [item for items in lists for item in items(self.namespace, label_selector=selector).items]
        found += self.core.list_namespaced_secret(self.namespace, label_selector="owner=helm").items
        return [item.metadata.name for item in found]

    def delete_namespace(self) -> None:
        try:
            self.core.delete_namespace(self.namespace)
        except ApiException as error:
            if error.status != 404:
                raise

    def logs(self, pod: Any, lines: int = 30, previous: bool = False) -> str:
        name = pod.metadata.name
        try:
            return str(self.core.read_namespaced_pod_log(name, self.namespace, tail_lines=lines, previous=previous))
        except ApiException as error:
            return f"(no log: {error.reason})"

    def describe(self) -> str:
        """Return what a person would look at first: every pod's state, and the last words of those not ready."""
        lines = []
        for pod in self.core.list_namespaced_pod(self.namespace).items:
            going = " (being deleted)" if pod.metadata.deletion_timestamp else ""
            lines.append(f"{pod.metadata.name}: {pod.status.phase}, ready {is_ready(pod)}{going}")
            for status in pod.status.container_statuses or ():
                lines.append(
                    f"  restarts {status.restart_count}, state {status.state.waiting or status.state.terminated}"
                )
                if status.restart_count:
                    lines.append("before: " + self.logs(pod, previous=True))
            if not is_ready(pod):
                lines.append(self.logs(pod))
        return "\n".join(lines)


def is_ready(pod: Any) -> bool:
    """Return whether the pod's Ready condition is true."""
    return any(c.type == "Ready" and c.status == "True" for c in pod.status.conditions or ())


def _sample_sum(text: str, name: str, labels: str) -> float:
    lines = (match for match in _SAMPLE.finditer(text) if match[1] == name and labels in match[0])
    return sum(float(match[2]) for match in lines)
