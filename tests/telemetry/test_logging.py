"""Log lines: one line a record, fields as keys, values bounded and unable to fake another line."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from tandem.telemetry.logging import MAX_VALUE_CHARS, set_up


@pytest.fixture(autouse=True)
def _root_logger_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(form: str, level: str = "info") -> tuple[logging.Logger, io.StringIO]:
    stream = io.StringIO()
    set_up(level, form, program="gateway", stream=stream)
    return logging.getLogger("some.module"), stream


def test_text() -> None:
    logger, stream = lines("text")
    logger.info("request ended", extra={"fields": {"code": "OK", "id": "a\nINFO forged"}})
    logger.debug("not shown")
    line = stream.getvalue()
    assert line.count("\n") == 1
    assert " INFO gateway: request ended code=OK id=a\\nINFO forged\n" in line


def test_json() -> None:
    logger, stream = lines("json", "warning")
    logger.info("not shown")
    try:
        raise ValueError("x")
    except ValueError:
        logger.exception("y" * 5000, extra={"fields": {"seconds": 0.5, "level": "forged"}})
    line = json.loads(stream.getvalue())
    assert (line["level"], line["program"], line["logger"], line["seconds"]) == ("error", "gateway", "some.module", 0.5)
    assert len(line["message"]) == MAX_VALUE_CHARS
    assert "ValueError: x" in line["exception"]


def test_set_up_again_replaces() -> None:
    lines("text")
    logger, stream = lines("text")
    logger.warning("once")
    assert stream.getvalue().count("once") == 1
