"""May one pod reach a port of another? The ingress NetworkPolicies of a namespace answer, as Kubernetes reads them.

Only what the chart uses: peers by pod and namespace labels, ports by name, number and range, TCP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A pod as policies see it. `ports`: names of its container ports; `namespace`: labels, empty: the release's."""

    labels: Mapping[str, str]
    ports: Mapping[str, int] = field(default_factory=dict)
    namespace: Mapping[str, str] = field(default_factory=dict)
    host_network: bool = False


def endpoint(template: dict[str, Any]) -> Endpoint:
    """Return a pod of this template."""
    containers = template["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for container in containers for port in container.get("ports") or ()}
    return Endpoint(template["metadata"]["labels"], ports, {}, bool(template["spec"].get("hostNetwork")))


def reaches(policies: Sequence[dict[str, Any]], source: Endpoint, target: Endpoint, port: int) -> bool:
    """Return whether a connection is let through: nothing selects the target, or one rule of one policy allows it."""
    if target.host_network:
        return True  # Kubernetes leaves it undefined; plug-ins do not apply policies there
    applied = [policy["spec"] for policy in policies if _selects(policy["spec"]["podSelector"], target.labels)]
    applied = [spec for spec in applied if "Ingress" in spec["policyTypes"]]
    rules = [rule for spec in applied for rule in spec.get("ingress") or ()]
    return not applied or any(_to(rule, target, port) and _from(rule, source) for rule in rules)


def _to(rule: dict[str, Any], target: Endpoint, port: int) -> bool:
    ports = rule.get("ports")
    return not ports or any(_is_port(one, target, port) for one in ports)


def _is_port(one: dict[str, Any], target: Endpoint, port: int) -> bool:
    assert one.get("protocol", "TCP") == "TCP"
    first = one["port"]
    if isinstance(first, str):
        return target.ports.get(first) == port
    return bool(first <= port <= one.get("endPort", first))


def _from(rule: dict[str, Any], source: Endpoint) -> bool:
    peers = rule.get("from")
    return not peers or any(_is_peer(peer, source) for peer in peers)


def _is_peer(peer: dict[str, Any], source: Endpoint) -> bool:
    assert peer.keys() <= {"podSelector", "namespaceSelector"}, peer
    if "namespaceSelector" in peer:
        if not _selects(peer["namespaceSelector"], source.namespace):
            return False
    elif source.namespace:
        return False  # a pod selector alone means the policy's own namespace
    return not source.host_network and _selects(peer.get("podSelector", {}), source.labels)


def _selects(selector: dict[str, Any], labels: Mapping[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"}, selector
    return all(labels.get(name) == value for name, value in (selector.get("matchLabels") or {}).items())
