"""The chart's dashboards as data: their panels and the queries of these, for tests and for pictures of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "tandem" / "dashboards"
BOARDS = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel with queries. `data` is its JSON."""

    board: str
    data: dict[str, Any]

    @property
    def title(self) -> str:
        return str(self.data["title"])

    @property
    def targets(self) -> list[dict[str, Any]]:
        return list(self.data.get("targets", ()))

    def expressions(self, *, window: str) -> list[str]:
        """Return its expressions, every variable filled in: all namespaces and roles, rates over `window`."""
        return [fill_in(target["expr"], window) for target in self.targets]


def fill_in(expression: str, window: str) -> str:
    """Do what Grafana does with its variables."""
    return expression.replace("$__rate_interval", window).replace("$namespace", ".*").replace("$role", ".*")


def load(board: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((FOLDER / f"{board}.json").read_text())
    return data


def everything(board: str) -> Iterator[dict[str, Any]]:
    """Yield the JSON of rows and panels, in order."""
    for panel in load(board)["panels"]:
        yield panel
        yield from panel.get("panels", ())


def panels(board: str) -> list[Panel]:
    """Return what shows data."""
    return [Panel(board, data) for data in everything(board) if data["type"] not in ("row", "text")]
