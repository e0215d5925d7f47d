"""Messages as short lines: what is at its default is left out, tokens and numbers are unpacked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from typing import Any

from tandem.core.messages.plans import Row, Sample
from tandem.core.token_ids import unpack

_TOKENS = {"prompt_token_ids", "output_token_ids", "token_ids"}
_PACKED = {"checksums": 8, "page_numbers": 4, "remote_pages": 4}


def show(value: Any, name: str = "") -> str:
    """Return one line for a message, or a part of one."""
    if isinstance(value, Row):
        return _row(value)
    if is_dataclass(value):
        parts = [_part(value, field) for field in fields(value)]
        return f"{type(value).__name__}({', '.join(part for part in parts if part)})"
    if isinstance(value, bytes):
        return _bytes(value, name)
    if isinstance(value, Enum):
        return value.name
    if name in _TOKENS:
        return _tokens(value)
    if name == "attempt" and value >> 32:
        return f"{value >> 32}.{value & 0xFFFFFFFF}"
    if isinstance(value, tuple):
        return "[" + ", ".join(show(item) for item in value) + "]"
    return f"{value:g}" if isinstance(value, float) else repr(value)


def _part(message: Any, field: Field[Any]) -> str:
    value = getattr(message, field.name)
    if field.default is not MISSING and value == field.default:
        return ""
    if field.default_factory is not MISSING and value == field.default_factory():
        return ""
    return f"{field.name}={show(value, field.name)}"


def _bytes(value: bytes, name: str) -> str:
    if name in _TOKENS:
        return _tokens(unpack(value))
    size = _PACKED.get(name)
    if size is not None:
        numbers = [int.from_bytes(value[start : start + size], "little") for start in range(0, len(value), size)]
        return str(numbers)
    return value.decode("ascii", "backslashreplace")


def _tokens(tokens: Sequence[int]) -> str:
    """A run of ascending ids as first..last."""
    runs: list[list[int]] = []
    for token in tokens:
        if runs and token == runs[-1][-1] + 1:
            runs[-1].append(token)
        else:
            runs.append([token])
    return "[" + ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs) + "]"


def _row(row: Row) -> str:
    span = f"[{row.start}, {row.start + row.num_tokens})"
    tokens = _tokens(row.token_ids) if row.token_ids else "(the last sampled)"
    sample = f", sample {_sample(row.sample)}" if row.sample is not None else ""
    return (
        f"row of {row.request_id}: {span} {tokens} in {list(row.pages)}{sample}{', zero tail' if row.zero_tail else ''}"
    )


def _sample(sample: Sample) -> str:
    return f"{sample.output_index}{f', banned {list(sample.banned)}' if sample.banned else ''}"
