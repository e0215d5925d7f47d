"""The help text of a program, made from the fields of its configuration: nothing is written twice."""

from __future__ import annotations

import textwrap
from dataclasses import MISSING
from typing import Literal, get_args, get_origin

from tandem.config_load import FILE_VARIABLE, PROGRAM_SECTIONS, SHORT_FLAGS, Program
from tandem.config_values import SETTINGS, Setting

_WIDTH = 110
_COLUMN = 44
_WHAT = {
    "gateway": "Takes requests over gRPC, tokenizes them, and sends each to a decode worker and a prefill worker.",
    "prefill": "Computes prompts and keeps their KV pages readable until the decode worker has them.",
    "decode": "Answers requests: fetches the KV pages of the prompt from a prefill worker, then decodes.",
    "unified": "Answers requests alone: prompt and answer are computed here, nothing is handed over.",
}


def help_text(program: Program) -> str:
    """Return what `tandem PROGRAM --help` prints."""
    lines = [
        f"tandem {program} [--section.field VALUE ...]",
        "",
        _WHAT[program],
        "When it serves it prints one line of JSON on stdout: address, loop, transports, limits.",
        "SIGTERM or Ctrl-C lets running requests end (server.drain_seconds); a second one does not.",
        "",
        "Each setting comes from, the last one wins: default, --config FILE (TOML or JSON, one table a section),",
        "environment (TANDEM_SERVER__LOG_LEVEL=debug), flag (--server.log-level debug).",
        "",
        *_entry("--config FILE", f"settings file; also {FILE_VARIABLE}"),
        *_entry("--print-config", "print the settings in effect as TOML, with explanations, and exit"),
        *_entry("--help", "this text"),
    ]
    short = {key: flag for flag, key in SHORT_FLAGS.items()}
    for section in PROGRAM_SECTIONS[program]:
        lines += ["", f"{section}:"]
        for setting in SETTINGS.values():
            if setting.section == section:
                lines += _entry(_usage(setting, short.get(setting.key)), _explanation(setting))
    return "\n".join(lines)


def _usage(setting: Setting, short: str | None) -> str:
    flag = f"--{short}, {setting.flag}" if short else setting.flag
    return f"{flag} {_value_name(setting)}"


def _value_name(setting: Setting) -> str:
    if get_origin(setting.type) is Literal:
        return "NAME"
    if get_origin(setting.type) is tuple:
        return "A,B"
    return {int: "N", float: "X", bool: "on|off"}.get(setting.type, "TEXT")


def _explanation(setting: Setting) -> str:
    parts = [setting.field.metadata["help"]]
    if get_origin(setting.type) is Literal:
        parts.append("one of " + ", ".join(get_args(setting.type)))
    default = setting.field.default
    assert default is not MISSING, f"{setting.key} has no default"
    shown = (
        {True: "on", False: "off"}[default]
        if isinstance(default, bool)
        else ",".join(default)
        if isinstance(default, tuple)
        else default
    )
    return "; ".join(parts) + (f" [{shown}]" if shown != "" else "")


def _entry(usage: str, explanation: str) -> list[str]:
    wrapped = textwrap.wrap(explanation, _WIDTH - _COLUMN)
    if len(usage) + 4 > _COLUMN:
        return [f"  {usage}", *(" " * _COLUMN + line for line in wrapped)]
    return [f"  {usage}".ljust(_COLUMN) + wrapped[0], *(" " * _COLUMN + line for line in wrapped[1:])]
