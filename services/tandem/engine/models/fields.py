"""Reads typed values out of a checkpoint's JSON and collects every fault instead of stopping at the first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tandem.errors import ConfigError

MAX_JSON_BYTES = 64 << 20


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object; raises ConfigError if the file is missing, too large or holds something else."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not a JSON object")
    return values


class Fields:
    """A JSON object with typed access. A key that is absent or null takes the default; a fault is noted in `faults`.

    Fields that are made by `inner` share the list of faults.
    """

    def __init__(self, values: Mapping[str, object], where: str, faults: list[str] | None = None) -> None:
        self.values = values
        self.faults: list[str] = [] if faults is None else faults
        self._where = where

    def fault(self, message: str) -> None:
        self.faults.append(f"{self._where}: {message}")

    def inner(self, name: str) -> Fields:
        """The object under a key; an empty one if it is absent or null."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            self.fault(f"{name} is not an object: {value!r}")
            value = None
        return Fields(value or {}, f"{self._where}: {name}", self.faults)

    def integer(self, name: str, default: int | None = None, low: int = 1) -> int:
        """An integer of at least `low`; a default of None makes the key required."""
        value = self.optional_integer(name, low)
        if value is not None:
            return value
        if default is None:
            if self.values.get(name) is None:
                self.fault(f"{name} is missing")
            return low
        return default

    def optional_integer(self, name: str, low: int = 1) -> int | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            self.fault(f"{name} is not an integer of at least {low}: {value!r}")
            return None
        return value

    def number(self, name: str, default: float | None = None, above: float = 0.0) -> float:
        """A number greater than `above`; a default of None makes the key required."""
        value = self.optional_number(name, above)
        if value is not None:
            return value
        if default is None:
            if self.values.get(name) is None:
                self.fault(f"{name} is missing")
            return above + 1.0
        return default

    def optional_number(self, name: str, above: float = 0.0) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < float("inf"):
            self.fault(f"{name} is not a number above {above:g}: {value!r}")
            return None
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fault(f"{name} is not true or false: {value!r}")
            return default
        return value

    def text(self, name: str, default: str = "") -> str:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            self.fault(f"{name} is not a string: {value!r}")
            return default
        return value

    def raise_faults(self) -> None:
        """Raise ConfigError with every fault noted so far, one a line."""
        if self.faults:
            raise ConfigError("\n".join(self.faults))
