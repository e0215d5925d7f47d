"""The chart rendered as Helm 4 renders it, in process and without a cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import helm_python as helm
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "tandem"
VALUE_SETS = {path.name.removesuffix("-values.yaml"): path for path in sorted((CHART / "ci").glob("*-values.yaml"))}
WORKERS = ("prefill", "decode", "unified")
Document = dict[str, Any]


@cache
def chart() -> Any:
    """Return the loaded chart; it never changes."""
    return helm.Chart.load(str(CHART))


def values_of(name: str) -> dict[str, Any]:
    """Return one of the value sets of ci/."""
    values = yaml.safe_load(VALUE_SETS[name].read_text())
    assert isinstance(values, dict)
    return values


class Rendered:
    """What a release of the chart consists of, hooks and notes included."""

    def __init__(
        self, values: Mapping[str, Any] | None = None, *, name: str = "tandem", namespace: str = "prod"
    ) -> None:
        """Raises HelmValuesError for what the schema refuses, HelmRenderError for what the templates refuse."""
        files = chart().render(dict(values or {}), name=name, namespace=namespace)
        self.notes = next(text for path, text in files.items() if path.endswith("NOTES.txt"))
        self.documents: list[Document] = []
        for path, text in files.items():
            if path.endswith(".yaml"):
                self.documents += [document for document in yaml.load_all(text, Loader=yaml.CSafeLoader) if document]

    def of(self, kind: str) -> dict[str, Document]:
        """Return the objects of a kind, by name."""
        found = [document for document in self.documents if document["kind"] == kind]
        by_name = {document["metadata"]["name"]: document for document in found}
        assert len(by_name) == len(found), f"two {kind} of one name"
        return by_name

    def by_role(self, kind: str) -> dict[str, Document]:
        """Return the objects of a kind, by the component that they belong to."""
        return {d["metadata"]["labels"]["app.kubernetes.io/component"]: d for d in self.of(kind).values()}

    def pod_templates(self) -> dict[str, Document]:
        """Return metadata and spec of every pod that there will be, by component; `test` is the one of `helm test`."""
        templates = {role: document["spec"]["template"] for role, document in self.by_role("Deployment").items()}
        tests = list(self.of("Pod").values())
        return templates | ({"test": tests[0]} if tests else {})

    def container(self, role: str) -> Document:
        """Return the only container of a role's pods."""
        (container,) = self.pod_templates()[role]["spec"]["containers"]
        assert isinstance(container, dict)
        return container

    def config_file(self, role: str) -> str:
        """Return the configuration file that the role's container is started with, followed through its mount."""
        spec, container = self.pod_templates()[role]["spec"], self.container(role)
        path = Path(container["args"][container["args"].index("--config") + 1])
        mount = next(mount for mount in container["volumeMounts"] if mount["mountPath"] == str(path.parent))
        volume = next(volume for volume in spec["volumes"] if volume["name"] == mount["name"])
        return str(self.of("ConfigMap")[volume["configMap"]["name"]]["data"][path.name])

    def config(self, role: str) -> dict[str, Any]:
        """Return that file as a tree."""
        tree = json.loads(self.config_file(role))
        assert isinstance(tree, dict)
        return tree


def keys_of(tree: object) -> Iterator[str]:
    """Yield every key in a document, however deep."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield str(key)
            yield from keys_of(value)
    elif isinstance(tree, list):
        for item in tree:
            yield from keys_of(item)
