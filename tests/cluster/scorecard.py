"""What the cluster tests print at their end: one line for each thing that was done to a service under load."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.cluster.load import Report


@dataclass(slots=True)
class Line:
    """One deed and what the clients saw of it. `resumed` counts answers that went on at another worker."""

    what: str
    seconds: float = 0.0
    answered: int | None = None
    failed: int | None = None
    resumed: int | None = None
    note: str = ""
    passed: bool = False


@dataclass(slots=True)
class Scorecard:
    """All lines, in the order in which they were done."""

    lines: list[Line] = field(default_factory=list)

    @contextmanager
    def line(self, what: str) -> Iterator[Line]:
        """Time a deed; it has passed if nothing is raised."""
        line = Line(what)
        self.lines.append(line)
        began = time.monotonic()
        try:
            yield line
            line.passed = True
        finally:
            line.seconds = time.monotonic() - began

    def write(self, path: Path) -> None:
        path.write_text(json.dumps([asdict(line) for line in self.lines], indent=2) + "\n")

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("", "seconds", "answered", "failed", "resumed", "")]
        for line in self.lines:
            figures = (line.answered, line.failed, line.resumed)
            shown = tuple("" if figure is None else str(figure) for figure in figures)
            rows.append(
                (line.what, f"{line.seconds:.1f}", *shown, ("ok" if line.passed else "FAILED") + " " + line.note)
            )
        width = max(len(row[0]) for row in rows)
        return "\n".join(f"{r[0]:<{width}} {r[1]:>8} {r[2]:>9} {r[3]:>7} {r[4]:>8}  {r[5]}".rstrip() for r in rows)


def fill(line: Line, report: Report) -> None:
    """Write down what the clients saw, and fail unless every request was answered, and answered right."""
    line.answered, line.failed = report.answered, report.failed
    assert not report.failed, str(report)
    assert report.answered, "nobody asked anything"
