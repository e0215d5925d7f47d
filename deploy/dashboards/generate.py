"""Write the dashboards into the chart and the table of metrics into docs/; with --check, fail if they are stale.

python -m deploy.dashboards.generate [--check]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from deploy.dashboards import handoff, metrics_table, overview, workers
from grafana_foundation_sdk.cog.encoder import JSONEncoder

FOLDER = Path(__file__).resolve().parents[1] / "helm" / "tandem" / "dashboards"
BOARDS = {"overview": overview.build, "handoff": handoff.build, "workers": workers.build}


def rendered() -> dict[str, str]:
    """Return each dashboard's JSON by its file's name."""
    return {
        f"{name}.json": json.dumps(build().build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"
        for name, build in BOARDS.items()
    }


def stale() -> list[str]:
    """Return the files that are not what the code makes, or that it does not make."""
    made = rendered()
    there = {path.name: path.read_text() for path in FOLDER.glob("*.json")}
    found = sorted(name for name in made.keys() | there.keys() if made.get(name) != there.get(name))
    page = metrics_table.PAGE
    return found if page.read_text() == metrics_table.rendered() else [*found, page.name]


def main() -> int:
    if "--check" in sys.argv[1:]:
        if found := stale():
            print(f"stale, run python -m deploy.dashboards.generate: {', '.join(found)}", file=sys.stderr)
        return bool(found)
    FOLDER.mkdir(exist_ok=True)
    for name, text in rendered().items():
        (FOLDER / name).write_text(text)
    metrics_table.PAGE.write_text(metrics_table.rendered())
    return 0


if __name__ == "__main__":
    sys.exit(main())
