"""What the pods of a namespace amount to: the endpoints of the workers among them. Pure: no client, no thread.

Pods are objects as the API writes them, and nothing about their form is taken for granted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tandem.gateway.membership import Endpoint, bounded, host_port


class PodSet:
    """What the pods of a selector amount to, kept by list and events.

    A pod enters once it has an address and has been ready; from then on only its own word, its deletion or its end
    count, so that a failing probe does not tear down a session that works.
    """

    def __init__(self, port_name: str) -> None:
        self._port_name = port_name
        self._endpoints: dict[str, Endpoint] = {}  # by uid

    def endpoints(self) -> tuple[Endpoint, ...]:
        """Return the set; of two pods at one address the one that stays counts."""
        best: dict[str, Endpoint] = {}
        for endpoint in sorted(self._endpoints.values(), reverse=True):
            best[endpoint.address] = endpoint  # not draining sorts below draining, so it comes last
        return bounded(sorted(best.values()))

    def replace(self, pods: Iterable[Mapping[str, object]]) -> None:
        """Take a whole list for the truth."""
        before, self._endpoints = self._endpoints, {}
        for pod in pods:
            self._put(pod, before)

    def changed(self, pod: Mapping[str, object]) -> None:
        """A pod was added or modified."""
        before = dict(self._endpoints)
        self._endpoints.pop(_uid(pod), None)
        self._put(pod, before)

    def deleted(self, pod: Mapping[str, object]) -> None:
        """A pod is gone."""
        self._endpoints.pop(_uid(pod), None)

    def _put(self, pod: Mapping[str, object], before: Mapping[str, Endpoint]) -> None:
        uid, status = _uid(pod), _table(pod, "status")
        host, port = status.get("podIP"), self._port(pod)
        if not uid or not isinstance(host, str) or not host or port is None:
            return
        if status.get("phase") in ("Succeeded", "Failed"):
            return
        draining = "deletionTimestamp" in _table(pod, "metadata")
        if uid in before or (_is_ready(status) and not draining):
            self._endpoints[uid] = Endpoint(host_port(host, port), draining)

    def _port(self, pod: Mapping[str, object]) -> int | None:
        for container in _list(_table(pod, "spec"), "containers"):
            for port in _list(container, "ports"):
                number = port.get("containerPort")
                if port.get("name") == self._port_name and isinstance(number, int):
                    return number
        return None


def _uid(pod: Mapping[str, object]) -> str:
    uid = _table(pod, "metadata").get("uid")
    return uid if isinstance(uid, str) else ""


def _is_ready(status: Mapping[str, object]) -> bool:
    return any(
        condition.get("type") == "Ready" and condition.get("status") == "True"
        for condition in _list(status, "conditions")
    )


def _table(of: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = of.get(key)
    return value if isinstance(value, Mapping) else {}


def _list(of: Mapping[str, object], key: str) -> list[Mapping[str, object]]:
    value = of.get(key)
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []
