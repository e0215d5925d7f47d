"""The chart installed as a user installs it: Helm 4, in process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helm_python as helm

CHART = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "tandem"


class Release:
    """One release of the chart in one namespace."""

    def __init__(self, kubeconfig: str, namespace: str, name: str, values: dict[str, Any]) -> None:
        """`values` are those that this cluster needs whatever is installed: images, and what it lacks."""
        self.name = name
        self.namespace = namespace
        self.kubeconfig = kubeconfig
        self._values = values

    def _config(self) -> Any:
        return helm.Config(kubeconfig_path=self.kubeconfig, namespace=self.namespace)

    def install(self, values: dict[str, Any] | None = None, timeout: int = 180) -> None:
        """Install and wait until all of it is ready."""
        with self._config() as helm_config:
            helm_config.install(
                str(CHART),
                self.name,
                merge(self._values, values or {}),
                create_namespace=True,
                wait="watcher",
                timeout=timeout,
            )

    def upgrade(self, values: dict[str, Any] | None = None, timeout: int = 300) -> None:
        """Upgrade and wait until all of it is rolled out."""
        with self._config() as helm_config:
            helm_config.upgrade(
                str(CHART), self.name, merge(self._values, values or {}), wait="watcher", timeout=timeout
            )

    def revision(self) -> int:
        """Return the number of the newest revision."""
        with self._config() as helm_config:
            return max(int(release["revision"]) for release in helm_config.history(self.name))

    def test(self, timeout: int = 120) -> None:
        """Run `helm test`; raises HelmError if it fails."""
        with self._config() as helm_config:
            helm_config.test(self.name, timeout=timeout, logs=True)

    def uninstall(self, timeout: int = 180) -> None:
        """Take all of it away and wait until it is gone."""
        with self._config() as helm_config:
            helm_config.uninstall(self.name, ignore_not_found=True, wait="watcher", timeout=timeout)


def merge(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `values` with `over` laid over it, table by table, as Helm merges value files."""
    merged = dict(values)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
