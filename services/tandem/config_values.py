"""The leaves of the configuration tree, and how a value that somebody wrote becomes one of a leaf's type.

Not here: where values come from (config_load) and what values mean.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tandem.config import Config

ENVIRONMENT_PREFIX = "TANDEM_"
_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})


@dataclass(frozen=True, slots=True)
class Setting:
    """One leaf of the tree: `key` is section.field, `type` its resolved annotation."""

    key: str
    type: Any
    field: Field[Any]

    @property
    def section(self) -> str:
        return self.key.partition(".")[0]

    @property
    def flag(self) -> str:
        return "--" + self.key.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENVIRONMENT_PREFIX + self.key.replace(".", "__").upper()


def _all_settings() -> dict[str, Setting]:
    settings: dict[str, Setting] = {}
    for section, cls in get_type_hints(Config).items():
        hints = get_type_hints(cls)
        for item in fields(cls):
            key = f"{section}.{item.name}"
            settings[key] = Setting(key, hints[item.name], item)
    return settings


SETTINGS: Mapping[str, Setting] = _all_settings()


def convert(setting: Setting, value: Any, *, typed: bool) -> Any:
    """Return the value in the field's type; raises ValueError with what is wrong.

    `typed`: it comes from a file and has a type of its own; else it is text.
    """
    if get_origin(setting.type) is Literal:
        choices = get_args(setting.type)
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}{suggestion(str(value), choices)}")
        return value
    if get_origin(setting.type) is tuple:
        return _list(value)
    value = _CONVERTERS[setting.type](value, typed)
    low, high = setting.field.metadata["low"], setting.field.metadata["high"]
    if low is not None and not value >= low:
        raise ValueError(f"must be at least {low}")
    if high is not None and not value <= high:
        raise ValueError(f"must be at most {high}")
    return value


def _text(value: Any, typed: bool) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a string")
    return value


def _integer(value: Any, typed: bool) -> int:
    if typed:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError("must be a whole number")
        return value
    try:
        return int(value, 0)
    except ValueError:
        raise ValueError("must be a whole number") from None


def _number(value: Any, typed: bool) -> float:
    if isinstance(value, bool) or (typed and not isinstance(value, int | float)):
        raise ValueError("must be a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError("must be a number") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError("must be a finite number")
    return number


def _truth(value: Any, typed: bool) -> bool:
    if isinstance(value, bool):
        return value
    if typed or value.lower() not in _TRUE | _FALSE:
        raise ValueError("must be true or false")
    return value.lower() in _TRUE


_CONVERTERS: dict[Any, Callable[[Any, bool], Any]] = {str: _text, int: _integer, float: _number, bool: _truth}


def _list(value: Any) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise ValueError("must be a list of strings, or one string with commas")
    return tuple(item.strip() for item in items if item.strip())


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?", or nothing if nothing known is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""
