"""The restricted Pod Security profile of Kubernetes, as far as a pod's specification says whether it is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
_HOST = ("hostNetwork", "hostPID", "hostIPC")
_SYSCTLS = {"kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.tcp_syncookies"}


def violations(spec: dict[str, Any]) -> list[str]:
    """Return what the profile would refuse a pod for, nothing if it is kept."""
    return [*_of_pod(spec), *(fault for container in _containers(spec) for fault in _of_container(container, spec))]


def _containers(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for kind in ("containers", "initContainers", "ephemeralContainers"):
        yield from spec.get(kind) or ()


def _of_pod(spec: dict[str, Any]) -> Iterator[str]:
    yield from (name for name in _HOST if spec.get(name))
    for volume in spec.get("volumes") or ():
        yield from (f"volume {volume['name']}: {kind}" for kind in volume.keys() - {"name"} - _VOLUMES)
    for sysctl in spec.get("securityContext", {}).get("sysctls") or ():
        if sysctl["name"] not in _SYSCTLS:
            yield f"sysctl {sysctl['name']}"


def _of_container(container: dict[str, Any], spec: dict[str, Any]) -> Iterator[str]:
    name = container["name"]
    own: dict[str, Any] = container.get("securityContext") or {}
    both = (spec.get("securityContext") or {}) | own  # what a container says goes before what its pod says
    if own.get("privileged"):
        yield f"{name}: privileged"
    if own.get("allowPrivilegeEscalation") is not False:
        yield f"{name}: allowPrivilegeEscalation"
    capabilities = own.get("capabilities") or {}
    if "ALL" not in (capabilities.get("drop") or ()):
        yield f"{name}: capabilities are not dropped"
    yield from (f"{name}: {added}" for added in capabilities.get("add") or () if added != "NET_BIND_SERVICE")
    if both.get("runAsNonRoot") is not True:
        yield f"{name}: runAsNonRoot"
    if both.get("runAsUser") == 0:
        yield f"{name}: runAsUser 0"
    if (both.get("seccompProfile") or {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield f"{name}: seccompProfile"
    if own.get("procMount", "Default") != "Default":
        yield f"{name}: procMount"
    if (both.get("seLinuxOptions") or {}).keys() & {"user", "role"}:
        yield f"{name}: seLinuxOptions"
    yield from (f"{name}: hostPort {port['hostPort']}" for port in container.get("ports") or () if port.get("hostPort"))
