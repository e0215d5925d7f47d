"""Log lines of every program: text for people, JSON for machines. What is logged has no prompts, answers or secrets.

A record's own fields are passed as `extra={"fields": {...}}`; they become keys, or key=value at the end of the line.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, TextIO

MAX_VALUE_CHARS = 1024


def set_up(level: str, form: str, *, program: str, stream: TextIO | None = None) -> None:
    """Send the root logger's lines to `stream` (stderr), as `form`, "text" or "json"; replaces earlier handlers."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(program) if form == "json" else TextFormatter(program))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return the fields that a record was given."""
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


class TextFormatter(logging.Formatter):
    """`12:30:01.123 INFO gateway: message key=value`"""

    def __init__(self, program: str) -> None:
        super().__init__()
        self._program = program

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{clock}.{int(record.msecs):03d} {record.levelname} {self._program}: {_one_line(record.getMessage())}"
        for key, value in fields_of(record).items():
            line += f" {key}={_one_line(str(value))}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def __init__(self, program: str) -> None:
        super().__init__()
        self._program = program

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "program": self._program,
            "logger": record.name,
            "message": record.getMessage()[:MAX_VALUE_CHARS],
        }
        line |= {key: value for key, value in fields_of(record).items() if key not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _one_line(text: str) -> str:
    """Text that cannot start a line of its own, nor fill the log."""
    return text[:MAX_VALUE_CHARS].replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
